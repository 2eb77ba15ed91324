"""The DreamBooth trainer: what a run leaves behind, and the laws of its steps."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tests_support import make_task

from ether_diffusion.adapters.attach import attach
from ether_diffusion.config import load_config
from ether_diffusion.errors import Interrupted, TrainingFailed, UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.pictures import read_settings
from ether_diffusion.training import dreambooth
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.schedule import make_plan

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_weights(left: Path, right: Path) -> None:
    one, two = weights(left), weights(right)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def assert_close_weights(left: Path, right: Path, tolerance: float) -> None:
    one, two = weights(left), weights(right)
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < tolerance


def test_run_folder_holds_what_the_plan_says(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.yaml", "adapter", "checkpoints", "samples", "metrics.jsonl", "logs"}
    steps = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004", "step-000006"]
    kept = [(finished_run / "checkpoints" / step / "optimizer.safetensors").exists() for step in steps]
    assert kept == [False, True, True]
    assert [row["step"] for row in metrics(finished_run)] == [1, 2, 3, 4, 5, 6]
    assert_same_weights(finished_run, finished_run / "checkpoints" / "step-000006")
    assert list((finished_run / "logs").rglob("events.out.tfevents*"))


def test_resolved_config_is_loadable_and_complete(finished_run: Path) -> None:
    config = load_config(dreambooth.DreamBoothConfig, finished_run / "config.yaml")
    assert config.training.learning_rate == 6e-3
    assert config.data.instance_prompt == "a photo of qwe toy"
    assert dreambooth.resolve(config) == config


def test_validation_grids_come_from_fixed_seeds(finished_run: Path) -> None:
    grids = sorted(path.name for path in (finished_run / "samples").iterdir())
    assert grids == ["step-000000.png", "step-000003.png", "step-000006.png"]
    settings = read_settings(finished_run / "samples" / "step-000003.png")
    assert settings is not None
    assert settings["prompts"] == ["a qwe toy"]
    first, last = (np.asarray(Image.open(finished_run / "samples" / grids[k])) for k in (0, 2))
    assert first.shape == last.shape
    assert (first != last).any()


def test_validation_changes_nothing_in_training(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, prompts in (("without", "[]"), ("with", "[a qwe toy]")):
        overrides = ("training.steps=3", f"validation.prompts={prompts}", "validation.every=1")
        dreambooth.run(make_config(tmp_path / name, *overrides))
    assert_same_weights(tmp_path / "without", tmp_path / "with")


def test_n_and_n_steps_equal_2n_bitwise(make_config: MakeConfig, tmp_path: Path) -> None:
    common = ("training.gradient_accumulation=3", "training.warmup_steps=4", "data.horizontal_flip=true")
    dreambooth.run(make_config(tmp_path / "once", *common, "training.steps=6"))
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.steps=3"))
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.steps=6", "training.resume=true"))
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "twice")
    states = [load_file(tmp_path / run / "checkpoints/step-000006/optimizer.safetensors") for run in ("once", "twice")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_interrupted_at_the_unfriendliest_step_a_run_ends_bitwise_the_same(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mid-epoch and mid-accumulation, with all that draws random numbers switched on: weights, losses and images."""
    common = (
        "training.steps=4",
        "training.schedule=cosine",
        "training.warmup_steps=3",
        "training.gradient_accumulation=3",
        "training.workers=2",
        "training.noise_offset=0.1",
        "data.horizontal_flip=true",
        "data.caption_dropout=0.3",
        "validation.prompts=[a qwe toy]",
        "validation.every=4",
    )
    dreambooth.run(make_config(tmp_path / "once", *common))
    prepare, calls = dreambooth.DreamBoothTask.prepare, []

    def prepare_and_interrupt(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(batch)
        if len(calls) == 2 * 3 + 2:  # the second of three parts of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(dreambooth.DreamBoothTask, "prepare", prepare_and_interrupt)
        with pytest.raises(Interrupted, match=r"after step 3 of 4.*training\.resume=true") as stopped:
            dreambooth.run(make_config(tmp_path / "twice", *common))
    assert stopped.value.signum == signal.SIGTERM
    assert (tmp_path / "twice/checkpoints/step-000003/optimizer.safetensors").exists()
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.resume=latest"))
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "twice")
    states = [load_file(tmp_path / run / "checkpoints/step-000004/optimizer.safetensors") for run in ("once", "twice")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    grids = [(tmp_path / run / "samples/step-000004.png").read_bytes() for run in ("once", "twice")]
    assert grids[0] == grids[1]


def test_workers_change_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "main", "training.steps=2"))
    dreambooth.run(make_config(tmp_path / "workers", "training.steps=2", "training.workers=2"))
    assert_same_weights(tmp_path / "main", tmp_path / "workers")


def test_accumulated_batches_equal_one_batch_to_rounding(make_config: MakeConfig, tmp_path: Path) -> None:
    # Adam divides a gradient by its own size, of which rounding is all that is left where it is almost 0.
    common = ("training.steps=2", "training.epsilon=1e-4")
    split = ("training.batch_size=1", "training.gradient_accumulation=4")
    dreambooth.run(make_config(tmp_path / "one", *common, "training.batch_size=4"))
    dreambooth.run(make_config(tmp_path / "split", *common, *split))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "split"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert_close_weights(tmp_path / "one", tmp_path / "split", 1e-4)


def test_gradient_checkpointing_equals_plain_to_rounding(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "plain", "training.steps=2"))
    dreambooth.run(make_config(tmp_path / "again", "training.steps=2", "training.gradient_checkpointing=true"))
    assert_close_weights(tmp_path / "plain", tmp_path / "again", 1e-4)


def test_bf16_trains_fp32_vectors_near_the_fp32_run(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "fp32", "training.steps=2"))
    AcceleratorState._reset_state()
    dreambooth.run(make_config(tmp_path / "bf16", "training.steps=2", "training.mixed_precision=bf16"))
    AcceleratorState._reset_state()
    assert {tensor.dtype for tensor in weights(tmp_path / "bf16").values()} == {torch.float32}
    for one, two in zip(metrics(tmp_path / "fp32"), metrics(tmp_path / "bf16"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)


@pytest.mark.parametrize("method", ["ether", "ether_plus", "lora"])
def test_every_method_learns_and_leaves_the_base_alone(make_config: MakeConfig, tmp_path: Path, method: str) -> None:
    """The mean loss of the last epochs is below the first's, for the same noise, and no base weight is in the file."""
    config = make_config(tmp_path / method, f"adapter.method={method}", "training.steps=3", "data.prior=null")
    dreambooth.run(config)
    assert all(("ether_" in key) or ("lora_" in key) for key in weights(tmp_path / method))
    assert config.training.learning_rate is None
    resolved = load_config(dreambooth.DreamBoothConfig, tmp_path / method / "config.yaml")
    assert resolved.training.learning_rate == {"ether": 6e-3, "ether_plus": 6e-3, "lora": 6e-4}[method]


def test_zero_rate_leaves_the_adapter_as_it_was_made(make_config: MakeConfig, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path / "run", "training.steps=2", "training.learning_rate=0"))
    base = load_base("tiny")
    attach(base.unet, make_config(tmp_path / "x").adapter, seed=0)
    start = dict(base.unet.named_parameters())
    for key, tensor in weights(tmp_path / "run").items():
        module, vector = key.removeprefix("base_model.model.").rsplit(".", 1)
        assert torch.equal(tensor, start[f"{module}.default.{vector}"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_equals_the_formula_written_out(make_config: MakeConfig, tmp_path: Path, prediction: str) -> None:
    """Noising and both targets from the schedule's own alphas, sample by sample; prior weighted."""
    task = make_task(make_config, tmp_path, "data.prior.weight=0.5", prediction=prediction)
    batch = task.prepare(task.collate([task.dataset[3], task.dataset[7]]))
    alphas = task.noise.alphas_cumprod
    errors = []
    for k in range(4):
        t = batch["timesteps"][k]
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        x, target = batch["noisy_latents"][k], batch["target"][k]
        # Two unknowns, latents and noise: solved from what the task says, and put together again.
        noise = target if prediction == "epsilon" else a * target + s * x
        latents = (x - s * noise) / a if prediction == "epsilon" else a * x - s * target
        assert torch.allclose(a * latents + s * noise, x, atol=1e-4)
        # The latents are the picture's: the VAE's mean, scaled, up to its small noise.
        part = task.dataset[(3, 7)[k % 2]]["pixel_values" if k < 2 else "class_pixel_values"]
        mean = task.base.vae.encode(part[None]).latent_dist.mean[0] * task.base.vae.config.scaling_factor
        assert (latents - mean).abs().max() < 0.5
        text = task.base.tokenizer(
            ["a photo of qwe toy", "a photo of toy"][k // 2], padding="max_length", return_tensors="pt"
        )
        hidden = task.base.text_encoder(text["input_ids"])[0]
        errors.append(F.mse_loss(task.base.unet(x[None], t[None], hidden).sample[0], target))
    expected = (errors[0] + errors[1]) / 2 + 0.5 * (errors[2] + errors[3]) / 2
    assert float(task.module(batch)["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_what_a_sample_draws_does_not_depend_on_its_batch(make_config: MakeConfig, tmp_path: Path) -> None:
    task = make_task(make_config, tmp_path)
    together = task.prepare(task.collate([task.dataset[4], task.dataset[9]]))
    alone = task.prepare(task.collate([task.dataset[9]]))
    assert torch.equal(together["timesteps"][[1, 3]], alone["timesteps"])
    assert torch.equal(together["target"][[1, 3]], alone["target"])
    assert torch.allclose(together["noisy_latents"][[1, 3]], alone["noisy_latents"], atol=1e-5)


def test_not_a_number_stops_with_step_and_hint(make_config: MakeConfig, tmp_path: Path) -> None:
    task = make_task(make_config, tmp_path)
    with torch.no_grad():
        for parameter in task.base.unet.parameters():
            if parameter.requires_grad:
                parameter.fill_(float("nan"))
    settings = task.config.training
    plan = make_plan(settings, len(task.dataset))
    trainer = Trainer(task, settings, Accelerator(), plan=plan, config=task.config, seed=0, run=None)
    with pytest.raises(TrainingFailed, match=r"loss is (nan|inf) at step 1.*no checkpoint yet.*Try"):
        trainer.train()


def test_dry_run_writes_nothing(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    report = dreambooth.run(make_config(tmp_path / "run", f"data.prior.cache_dir={cache}"), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.seconds_per_step > 0
    assert report.peak_memory > 2**20
    told = capsys.readouterr().out
    assert "32,256 trainable parameters" in told
    assert "peak memory" in told


def test_class_images_are_reused_when_the_manifest_matches(make_config: MakeConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    common = (f"data.prior.cache_dir={cache}", "training.steps=1")
    dreambooth.run(make_config(tmp_path / "a", *common))
    (folder,) = cache.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["prompt"] == "a photo of toy"
    assert manifest["base_model"] == "tiny"
    drawn = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(drawn) == 2
    (folder / "00001.png").write_bytes(b"cut short")
    dreambooth.run(make_config(tmp_path / "b", *common))
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert again["00000.png"] == drawn["00000.png"]  # kept
    assert again["00001.png"] != drawn["00001.png"]  # damaged, so drawn anew
    dreambooth.run(make_config(tmp_path / "c", *common, "data.prior.sampling.guidance=2.5"))
    assert len(list(cache.iterdir())) == 2  # another sampler, another folder


def test_own_class_images_are_taken_as_they_are(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (80, 70), "red").save(tmp_path / "mine" / "red.png")
    cache = tmp_path / "cache"
    overrides = (f"data.prior.class_dir={tmp_path / 'mine'}", f"data.prior.cache_dir={cache}", "training.steps=1")
    dreambooth.run(make_config(tmp_path / "run", *overrides))
    assert not cache.exists()
    assert "prior_loss" in metrics(tmp_path / "run")[0]


def test_warm_start_begins_at_the_saved_adapter(make_config: MakeConfig, finished_run: Path, tmp_path: Path) -> None:
    overrides = (f"adapter.init_from={finished_run}", "training.steps=1", "training.learning_rate=0")
    dreambooth.run(make_config(tmp_path / "warm", *overrides))
    assert_same_weights(tmp_path / "warm", finished_run)
    with pytest.raises(UserError, match="of another shape"):
        dreambooth.run(make_config(tmp_path / "other", *overrides, "adapter.num_blocks=2"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.instance_dir=nowhere", "nowhere"),
        ("data.resolution=50", "data.resolution: 50 is not a multiple of 16 pixels; try 48 or 64"),
        ("adapter.target=attentoin", "adapter.target: 'attentoin' matches no .* Near: attention"),
        ("adapter.num_blocks=5", "num_blocks = 5 does not divide .* These counts fit all target layers: 1, 2"),
        ("adapter.init_from=nowhere", "nowhere is not a folder"),
        ("base_model=./nowhere", "base_model: './nowhere' does not exist"),
        ("training.resume=step-000001", "training.resume: .*step-000001 is no checkpoint folder"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    make_config: MakeConfig, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        dreambooth.run(make_config(tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_refused_without_resume(make_config: MakeConfig, finished_run: Path) -> None:
    before = sorted(finished_run.rglob("*"))
    with pytest.raises(UserError, match=r"is not empty.*training\.resume=true"):
        dreambooth.run(make_config(finished_run))
    assert sorted(finished_run.rglob("*")) == before


def test_resume_refuses_other_settings_and_names_them(make_config: MakeConfig, finished_run: Path) -> None:
    overrides = ("training.resume=true", "training.steps=6", "training.learning_rate=0.5", "data.identifier=abc")
    with pytest.raises(UserError, match=r"data\.identifier was 'qwe', is 'abc'.*learning_rate was 0\.006, is 0\.5"):
        dreambooth.run(make_config(finished_run, *overrides))


@pytest.mark.parametrize("damage", ["optimizer.safetensors", "adapter/adapter_model.safetensors", "checkpoint.json"])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    common = ("training.checkpoint_every=1",)
    dreambooth.run(make_config(tmp_path / "run", *common, "training.steps=2"))
    path = tmp_path / "run/checkpoints/step-000002" / damage
    path.write_bytes(path.read_bytes()[:-20])
    dreambooth.run(make_config(tmp_path / "run", *common, "training.steps=3", "training.resume=true"))
    told = capsys.readouterr().out
    assert "step-000002 is damaged" in told
    assert "Resuming" in told
    assert "step-000001, step 1 of 3" in told
    dreambooth.run(make_config(tmp_path / "whole", *common, "training.steps=3"))
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_real_photos_jpeg_and_mpo(make_config: MakeConfig, shared: Path, tmp_path: Path) -> None:
    for subject, class_name in (("dog", "dog"), ("poop_emoji", "toy")):
        folder = shared / "data/dreambooth/dataset" / subject
        overrides = (f"data.instance_dir={folder}", f"data.class_name={class_name}", "training.steps=2")
        dreambooth.run(make_config(tmp_path / subject, *overrides))
        assert len(metrics(tmp_path / subject)) == 2
