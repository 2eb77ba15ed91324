"""The DreamBooth trainer: what a run leaves behind, and the laws of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.config import load_config
from ether_diffusion.errors import TrainingFailed, UserError
from ether_diffusion.files import checkpoint_name
from ether_diffusion.models.bases import load_base
from ether_diffusion.pictures import read_cached_png, read_settings, save_png
from ether_diffusion.training import dreambooth
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.schedule import make_plan
from support.runs import assert_same_run, difference, metrics, same, stopped_after, weights
from support.tasks import make_task

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


PLAIN = ("training.steps=3", "training.checkpoint_every=1", "training.keep_states=3")


@pytest.fixture(scope="module")
def plain(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps with a checkpoint after each, for comparison with runs under other options."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    dreambooth.run(make_config(folder, *PLAIN))
    return folder


def weights_after(run: Path, step: int) -> dict[str, torch.Tensor]:
    return weights(run / "checkpoints" / checkpoint_name(step))


def test_a_run_folder_holds_all_files_of_the_run(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {"config.yaml", "adapter", "checkpoints", "samples", "metrics.jsonl", "logs"}
    steps = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004", "step-000006"]
    kept = [(finished_run / "checkpoints" / step / "optimizer.safetensors").exists() for step in steps]
    assert kept == [False, True, True]
    assert [row["step"] for row in metrics(finished_run)] == [1, 2, 3, 4, 5, 6]
    assert same(weights(finished_run), weights(finished_run / "checkpoints" / "step-000006"))
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


def test_validation_changes_nothing_in_training(make_config: MakeConfig, plain: Path, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path, "training.steps=2", "validation.prompts=[a qwe toy]", "validation.every=1"))
    assert len(list((tmp_path / "samples").iterdir())) == 3
    assert same(weights(tmp_path), weights_after(plain, 2))


def test_n_and_n_steps_equal_2n_bitwise(make_config: MakeConfig, tmp_path: Path) -> None:
    common = ("training.gradient_accumulation=2", "training.warmup_steps=3", "data.horizontal_flip=true")
    dreambooth.run(make_config(tmp_path / "once", *common, "training.steps=4"))
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.steps=2"))
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.steps=4", "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000004")


def test_workers_change_nothing(make_config: MakeConfig, plain: Path, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path, "training.steps=2", "training.workers=2"))
    assert same(weights(tmp_path), weights_after(plain, 2))


def test_accumulated_batches_equal_one_batch_to_rounding(make_config: MakeConfig, tmp_path: Path) -> None:
    # Adam divides a gradient by its own size, of which rounding is all that is left where it is almost 0.
    common = ("training.steps=2", "training.epsilon=1e-4")
    split = ("training.batch_size=1", "training.gradient_accumulation=4")
    dreambooth.run(make_config(tmp_path / "one", *common, "training.batch_size=4"))
    dreambooth.run(make_config(tmp_path / "split", *common, *split))
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "split"), strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert difference(weights(tmp_path / "one"), weights(tmp_path / "split")) < 1e-4


def test_gradient_checkpointing_equals_plain_to_rounding(make_config: MakeConfig, plain: Path, tmp_path: Path) -> None:
    dreambooth.run(make_config(tmp_path, "training.steps=2", "training.gradient_checkpointing=true"))
    assert difference(weights(tmp_path), weights_after(plain, 2)) < 1e-4


def test_bf16_trains_fp32_vectors_near_the_fp32_run(make_config: MakeConfig, plain: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state()
    dreambooth.run(make_config(tmp_path, "training.steps=2", "training.mixed_precision=bf16"))
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}
    for one, two in zip(metrics(plain)[:2], metrics(tmp_path), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=0.02)


def test_zero_rate_leaves_the_adapter_as_it_was_made(make_config: MakeConfig, tmp_path: Path) -> None:
    still = ("training.steps=2", "training.learning_rate=0", "training.require_certificate=false")
    dreambooth.run(make_config(tmp_path / "run", *still))
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
    alphas = task.objective.scheduler.alphas_cumprod
    errors = []
    for k in range(4):
        t = batch["timesteps"][k]
        a, s = alphas[t].sqrt(), (1 - alphas[t]).sqrt()
        x, target = batch["noisy_latents"][k], batch["target"][k]
        # Solve the batch for latents and noise, and compute it again from them.
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


def test_the_random_numbers_of_a_sample_do_not_depend_on_its_batch(make_config: MakeConfig, tmp_path: Path) -> None:
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
    trainer = Trainer(task, task.config, Accelerator(), plan, run=None)
    with pytest.raises(TrainingFailed, match=r"loss is (nan|inf) at step 1.*no checkpoint yet.*Try"):
        trainer.train()


def test_dry_run_writes_nothing(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    report = dreambooth.run(make_config(tmp_path / "run", f"data.prior.cache_dir={cache}"), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.seconds_per_step > 0
    assert report.peak_memory > 2**20
    printed = capsys.readouterr().out
    assert "32,256 trainable parameters" in printed
    assert "peak memory" in printed


def test_prompts_that_the_encoder_cuts_are_named_once(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "red " * 40
    dreambooth.run(make_config(tmp_path, f"data.instance_prompt={long}", "data.prior=null"), dry_run=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if "exceed" in line]
    assert len(lines) == 1
    assert lines[0].startswith("Note:    1 of ")
    assert "prompts and captions exceed the 38 tokens that the text encoder reads" in lines[0]


def test_class_images_are_reused_when_the_manifest_matches(make_config: MakeConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    common = (f"data.prior.cache_dir={cache}", "training.steps=1")
    dreambooth.run(make_config(tmp_path / "a", *common))
    (folder,) = cache.iterdir()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["prompt"] == "a photo of toy"
    assert manifest["base_model"] == "tiny"
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    assert len(before) == 2
    whole = read_cached_png(folder / "00001.png")
    assert whole is not None
    changed = whole.copy()
    changed.putpixel((5, 5), (1, 2, 3))
    for k, damage in enumerate(
        (
            lambda path: path.write_bytes(b"cut short"),
            lambda path: save_png(changed, path, read_settings(path)),  # a whole image, but not the one of before
        )
    ):
        damage(folder / "00001.png")
        dreambooth.run(make_config(tmp_path / f"b{k}", *common))
        kept = read_cached_png(folder / "00001.png")
        assert kept is not None
        assert kept.tobytes() == whole.tobytes()
        assert (folder / "00000.png").stat().st_mtime_ns == before["00000.png"]
    whole_manifest = (folder / "manifest.json").read_bytes()
    for k, content in enumerate((whole_manifest[:-3], whole_manifest.replace(b"a photo of toy", b"a photo of toz"))):
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            dreambooth.run(make_config(tmp_path / f"d{k}", *common))
    (folder / "manifest.json").write_bytes(whole_manifest)
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
    still = ("training.steps=1", "training.learning_rate=0", "training.require_certificate=false")
    overrides = (f"adapter.init_from={finished_run}", *still)
    dreambooth.run(make_config(tmp_path / "warm", *overrides))
    assert same(weights(tmp_path / "warm"), weights(finished_run))
    with pytest.raises(UserError, match="of another shape"):
        dreambooth.run(make_config(tmp_path / "other", *overrides, "adapter.num_blocks=2"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.instance_dir=nowhere", "nowhere"),
        ("data.resolution=50", "data.resolution: 50 is not a multiple of 16 pixels; try 48 or 64"),
        ("data.resolution=512", "data.resolution: 512, but the base 'tiny' generates 64 x 64 pixels"),
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
def test_a_damaged_checkpoint_is_skipped_with_a_line(
    make_config: MakeConfig, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = stopped_after(plain, 2, tmp_path / "run") / "checkpoints/step-000002" / damage
    path.write_bytes(path.read_bytes()[:-20])
    dreambooth.run(make_config(tmp_path / "run", *PLAIN, "training.resume=true"))
    printed = capsys.readouterr().out
    assert "step-000002 is damaged" in printed
    assert "Resuming" in printed
    assert "step-000001, step 1 of 3" in printed
    assert_same_run(plain, tmp_path / "run", "step-000003")


def test_real_photos_jpeg_and_mpo(make_config: MakeConfig, shared: Path, tmp_path: Path) -> None:
    for subject, class_name in (("dog", "dog"), ("poop_emoji", "toy")):
        folder = shared / "data/dreambooth/dataset" / subject
        overrides = (f"data.instance_dir={folder}", f"data.class_name={class_name}", "data.prior=null")
        dreambooth.run(make_config(tmp_path / subject, *overrides, "training.steps=1"))
        assert len(metrics(tmp_path / subject)) == 1
