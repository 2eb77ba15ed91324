"""The controllable trainer: what a run leaves behind, exact resume, and the laws of its steps."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import ether_diffusion_cli
from ether_diffusion.adapters.attach import attach
from ether_diffusion.config import load_config
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.errors import Interrupted, UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.conditioning import ConditionedUNet
from ether_diffusion.pictures import read_settings
from ether_diffusion.training import controllable
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.schedule import make_plan

MakeConfig = Callable[..., controllable.ControllableConfig]
ADAPTER, ENCODER = "adapter/adapter_model.safetensors", "condition_encoder/diffusion_pytorch_model.safetensors"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All that was trained: the encoder's, and the adapter's where there is one."""
    files = [folder / name for name in (ADAPTER, ENCODER) if (folder / name).exists()]
    return {f"{file.parent.name}/{key}": tensor for file in files for key, tensor in load_file(file).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max()) for key in left)


def make_task(make: MakeConfig, folder: Path, scenes: Path, *overrides: str) -> controllable.ControllableTask:
    """A task without a run, its encoder away from zero so that conditions count."""
    config = controllable.resolve(make(folder, *overrides))
    base = load_base("tiny")
    if config.adapter.method != "none":
        attach(base.unet, config.adapter, seed=1)
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    dataset = ControllableDataset(find_pairs(scenes), resolution=64, seed=config.seed)
    cpu = torch.device("cpu")
    return controllable.ControllableTask(config, base, encoder, dataset, dataset, cpu, torch.float32)


def predict(task: controllable.ControllableTask, batch: dict[str, Any]) -> torch.Tensor:
    inputs = (batch[name] for name in ("noisy_latents", "timesteps", "encoder_hidden_states", "hint"))
    with torch.no_grad():
        return ConditionedUNet.forward(task.module, *inputs)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def finished(make_controllable: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with a checkpoint every two, two validation pairs."""
    folder = tmp_path_factory.mktemp("controllable") / "run"
    overrides = ("training.steps=4", "training.checkpoint_every=2", "validation.images=2", "validation.every=2")
    controllable.run(make_controllable(folder, *overrides))
    return folder


def test_a_run_leaves_adapter_and_encoder_and_the_same_in_its_checkpoints(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "adapter", "condition_encoder", "checkpoints", "samples", "metrics.jsonl"}
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004"]
    early, late = (weights(finished / "checkpoints" / step) for step in steps)
    assert same(late, weights(finished))
    assert {tensor.dtype for tensor in late.values()} == {torch.float32}
    # What training started at is zero only in the encoder's last convolution: everything has moved since.
    assert not any(torch.equal(early[key], late[key]) for key in late)
    resolved = load_config(controllable.ControllableConfig, finished / "config.yaml")
    assert controllable.resolve(resolved) == resolved
    assert (resolved.training.learning_rate, resolved.training.encoder_learning_rate) == (1e-3, 1e-4)


def test_validation_shows_condition_drawn_image_and_image_of_the_validation_split(finished: Path) -> None:
    grids = sorted((finished / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    first, last = (Image.open(grids[k]).convert("RGB") for k in (0, 2))
    settings = read_settings(grids[2])
    assert settings is not None
    assert settings["sampling"]["scheduler"] == "ddim"
    # Rows of three cells of 64 pixels with margins of 6: only the cell in the middle is drawn anew.
    for x, changes in ((6, False), (76, True), (146, False)):
        left, right = (grid.crop((x, 0, x + 64, grid.height)).tobytes() for grid in (first, last))
        assert (left != right) == changes


def test_validation_changes_nothing_in_training(make_controllable: MakeConfig, tmp_path: Path) -> None:
    for name, images in (("without", 0), ("with", 1)):
        overrides = (f"validation.images={images}", "validation.every=1")
        controllable.run(make_controllable(tmp_path / name, *overrides))
    assert same(weights(tmp_path / "without"), weights(tmp_path / "with"))


@pytest.mark.parametrize("method", ["ether_plus", "none"])
def test_interrupted_at_the_unfriendliest_step_a_run_ends_bitwise_the_same(
    make_controllable: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Mid-epoch and mid-accumulation, with all that draws random numbers switched on: weights, losses and images."""
    common = (
        f"adapter={{method: {method}}}",
        "training.steps=4",
        "training.schedule=cosine",
        "training.warmup_steps=3",
        "training.gradient_accumulation=2",
        "training.ema_decay=0.5",
        "training.workers=1",
        "data.crop=random",
        "data.horizontal_flip=true",
        "data.caption_dropout=0.4",
        "validation.images=1",
        "validation.every=4",
    )
    controllable.run(make_controllable(tmp_path / "once", *common))
    prepare, calls = controllable.ControllableTask.prepare, []

    def prepare_and_interrupt(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        calls.append(batch)
        if len(calls) == 2 * 2 + 1:  # the first of two parts of the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return prepare(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(controllable.ControllableTask, "prepare", prepare_and_interrupt)
        with pytest.raises(Interrupted, match=r"after step 3 of 4.*training\.resume=true"):
            controllable.run(make_controllable(tmp_path / "twice", *common))
    controllable.run(make_controllable(tmp_path / "twice", *common, "training.resume=latest"))
    assert same(weights(tmp_path / "once"), weights(tmp_path / "twice"))
    assert (tmp_path / "once/adapter").exists() == (method != "none")
    assert metrics(tmp_path / "once") == metrics(tmp_path / "twice")
    for file in ("optimizer.safetensors", "trained.safetensors"):
        assert same(*(load_file(tmp_path / run / "checkpoints/step-000004" / file) for run in ("once", "twice")))
    grids = [(tmp_path / run / "samples/step-000004.png").read_bytes() for run in ("once", "twice")]
    assert grids[0] == grids[1]


def test_epochs_are_counted_in_pairs(make_controllable: MakeConfig, tmp_path: Path) -> None:
    overrides = ("training.steps=null", "training.epochs=2", "training.batch_size=4", "training.checkpoint_every=9")
    controllable.run(make_controllable(tmp_path / "run", *overrides))
    assert len(metrics(tmp_path / "run")) == 3  # 2 epochs of 6 pairs, 4 a step


def test_the_encoder_alone_learns_and_leaves_the_unet_as_it_is(
    make_controllable: MakeConfig, tmp_path: Path, scenes: Path
) -> None:
    task = make_task(make_controllable, tmp_path, scenes, "adapter={method: none}")
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    settings = task.config.training
    assert (settings.learning_rate, settings.encoder_learning_rate) == (1e-4, 1e-4)
    plan, run = make_plan(settings, len(task.pairs)), RunFolder(tmp_path / "run")
    trainer = Trainer(task, settings, Accelerator(), plan=plan, config=task.config, seed=0, run=run)
    trainer.train()
    assert not any(torch.equal(before[name], tensor) for name, tensor in task.encoder.state_dict().items())
    assert same(task.base.unet.state_dict(), load_base("tiny").unet.state_dict())
    assert not list((tmp_path / "run").rglob("adapter*"))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "run/checkpoints/step-000002"))


def test_dropping_the_hint_reproduces_the_base(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    """With features times 0, and with the zeros that an encoder starts with: bit for bit, with ETHER+ at its start."""
    task = make_task(make_controllable, tmp_path, scenes)
    batch = task.prepare(task.collate([task.dataset[k] for k in range(2)]))
    with torch.no_grad():
        plain = load_base("tiny").unet(batch["noisy_latents"], batch["timesteps"], batch["encoder_hidden_states"])
        assert not torch.allclose(predict(task, batch), plain.sample, atol=1e-3)
        task.encoder.embedding.conv_out.weight.zero_()
        task.encoder.embedding.conv_out.bias.zero_()
        assert torch.equal(predict(task, batch), plain.sample)


def test_the_condition_follows_its_sample_whatever_the_batch(
    make_controllable: MakeConfig, tmp_path: Path, scenes: Path
) -> None:
    task = make_task(make_controllable, tmp_path, scenes)
    samples = [task.dataset[k] for k in range(4)]
    together = predict(task, task.prepare(task.collate(samples)))
    order = [2, 0, 3, 1]
    shuffled = predict(task, task.prepare(task.collate([samples[k] for k in order])))
    assert torch.allclose(shuffled, together[order], atol=1e-5)
    alone = [predict(task, task.prepare(task.collate([sample]))) for sample in samples]
    assert torch.allclose(torch.cat(alone), together, atol=1e-5)
    # And it is the sample's own: with the hints alone exchanged, every prediction is another one.
    batch = task.prepare(task.collate(samples))
    exchanged = predict(task, {**batch, "hint": batch["hint"][order]})
    assert all(float((exchanged[k] - together[k]).abs().max()) > 1e-3 for k in range(4))


def test_the_loss_is_the_mean_of_the_samples_own(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    task = make_task(make_controllable, tmp_path, scenes, "training.min_snr_gamma=5")
    batch = task.prepare(task.collate([task.dataset[k] for k in (3, 8)]))  # of two epochs
    errors = (predict(task, batch) - batch["target"]).square().mean(dim=(1, 2, 3))
    expected = float((errors * batch["weights"]).mean())
    assert len(set(batch["weights"].tolist())) == 2
    assert float(task.module(batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_dropped_captions_keep_their_conditions(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    task = make_task(make_controllable, tmp_path, scenes)
    dropped = ControllableDataset(task.pairs, resolution=64, seed=0, caption_dropout=0.5)
    pairs = [(task.dataset[k], dropped[k]) for k in range(12)]
    empty = [left["hint"] for left, right in pairs if right["prompt"] == ""]
    assert 0 < len(empty) < 12
    assert all(torch.equal(left["hint"], right["hint"]) for left, right in pairs)
    hidden = task.prepare(task.collate([right for _, right in pairs]))["encoder_hidden_states"]
    unconditional = task.encode_text("")
    assert sum(torch.equal(row[None], unconditional) for row in hidden) == len(empty)


def test_text_features_that_no_longer_fit_are_encoded_again(
    make_controllable: MakeConfig, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(make_controllable, tmp_path, scenes)
    with torch.no_grad():
        whole = task.text(["a", "b", "c", "a"])["encoder_hidden_states"]
        assert len(task.features) == 3
        task.features.clear()
        monkeypatch.setattr("ether_diffusion.training.denoising.REMEMBERED", 2 * whole[0].nbytes)
        again = task.text(["a", "b", "c", "a"])["encoder_hidden_states"]
    assert torch.equal(whole, again)
    assert len(task.features) == 2


def test_checkpointing_accumulation_and_bf16_come_near_the_plain_run(
    make_controllable: MakeConfig, tmp_path: Path
) -> None:
    controllable.run(make_controllable(tmp_path / "plain"))
    plain = weights(tmp_path / "plain")
    controllable.run(make_controllable(tmp_path / "again", "training.gradient_checkpointing=true"))
    assert difference(weights(tmp_path / "again"), plain) < 1e-5
    parts = ("training.batch_size=1", "training.gradient_accumulation=2")
    controllable.run(make_controllable(tmp_path / "parts", *parts))
    for left, right in zip(metrics(tmp_path / "parts"), metrics(tmp_path / "plain"), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    AcceleratorState._reset_state()
    controllable.run(make_controllable(tmp_path / "half", "training.mixed_precision=bf16"))
    AcceleratorState._reset_state()
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float32}
    for left, right in zip(metrics(tmp_path / "half"), metrics(tmp_path / "plain"), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.03)


def test_warm_start_takes_both_parts_and_refuses_what_lacks_one(
    make_controllable: MakeConfig, finished: Path, finished_run: Path, tmp_path: Path
) -> None:
    still = ("training.learning_rate=0", f"adapter.init_from={finished}", "training.steps=1")
    controllable.run(make_controllable(tmp_path / "warm", *still))
    assert same(weights(tmp_path / "warm"), weights(finished))
    only = make_controllable(tmp_path / "only", f"adapter={{method: none, init_from: {finished_run}}}")
    with pytest.raises(UserError, match=r"holds no condition_encoder/; expected the folder of a controllable run"):
        controllable.run(only)
    assert not (tmp_path / "only").exists()


def test_dry_run_writes_nothing_and_says_what_would_be_trained(
    make_controllable: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = controllable.run(make_controllable(tmp_path / "run"), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.peak_memory > 2**20
    told = capsys.readouterr().out
    assert "Encoder: 99,760 trainable parameters, learning rate 0.0001" in told
    assert "Pairs:   6 in " in told
    assert "label maps of 23 classes" in told


def test_captions_of_the_training_split_do_not_stop_validation(
    make_controllable: MakeConfig, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ade20k"
    shutil.copytree(scenes, folder)
    common = (f"data.dataset_dir={folder}", "validation.images=1", "validation.every=1", "training.steps=1")
    captions = f"data.captions={folder / 'captions/training.jsonl'}"
    controllable.run(make_controllable(tmp_path / "found", *common, captions))
    assert "validation draws" not in capsys.readouterr().out
    (folder / "captions/validation.jsonl").unlink()
    controllable.run(make_controllable(tmp_path / "none", *common, captions))
    assert 'Note:    validation draws pairs of split "training": ' in capsys.readouterr().out
    with pytest.raises(UserError, match="no captions"):
        controllable.run(make_controllable(tmp_path / "named", *common, captions, "validation.split=validation"))


def drawn_by_the_line(told: str) -> int:
    """Runs what a run's last line says, one image in one step; its exit code."""
    (line,) = [line for line in told.splitlines() if line.startswith("Draw:")]
    program, *arguments = shlex.split(line.removeprefix("Draw:"))
    assert program == "ether-diffusion"
    return ether_diffusion_cli.main([*arguments, "--limit", "1", "--steps", "1"])


@pytest.mark.parametrize("captions", ["a folder of all splits", "a file of each", "of training alone"])
@pytest.mark.parametrize("images", [0, 1])
def test_the_line_that_says_how_to_draw_draws(
    make_controllable: MakeConfig,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    captions: str,
    images: int,
) -> None:
    """Captions come from where the run has them, spaces in paths stay, and no split is named that it could not take."""
    folder, texts = tmp_path / "my scenes", tmp_path / "my captions"
    shutil.copytree(scenes, folder)
    shutil.move(folder / "captions", texts)
    overrides = [f"data.dataset_dir={folder}", "training.steps=1", f"validation.images={images}"]
    if captions == "a folder of all splits":
        for image in (folder / "images").rglob("*.*"):
            (texts / f"{image.stem}.txt").write_text("a red house")
        overrides += [f"data.captions={texts}"]
    else:
        overrides += [f"data.captions={texts / 'training.jsonl'}"]
    if captions == "a file of each":
        overrides += [f"validation.captions={texts / 'validation.jsonl'}"]
    controllable.run(make_controllable(tmp_path / "my run", *overrides))
    assert drawn_by_the_line(capsys.readouterr().out) == 0
    (row,) = (tmp_path / "my run/images/images.jsonl").read_text().splitlines()
    split = "training" if captions == "of training alone" else "validation"
    assert f'split "{split}"' in capsys.readouterr().out
    assert ("a red house" in row) == (captions == "a folder of all splits")


def test_conditions_without_images_are_refused(make_controllable: MakeConfig, scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "ade20k")
    shutil.rmtree(tmp_path / "ade20k/images/training")
    with pytest.raises(UserError, match=r"6 of 6 conditions in .* have no image"):
        controllable.run(make_controllable(tmp_path / "run", f"data.dataset_dir={tmp_path / 'ade20k'}"))


def test_a_folder_of_pairs_and_photos_through_canny_train_too(
    make_controllable: MakeConfig, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    controllable.run(make_controllable(tmp_path / "canny", "data.condition=canny", cache, "training.steps=1"))
    assert "conditions: canny" in capsys.readouterr().out
    pairs = tmp_path / "pairs"
    shutil.copytree(scenes / "images/training", pairs / "images")
    shutil.copytree(scenes / "images/training", pairs / "conditions")
    overrides = (f"data.dataset_dir={pairs}", "data.caption_template=a picture", "training.steps=1")
    controllable.run(make_controllable(tmp_path / "image", *overrides, "validation.images=1"))
    assert "conditions: image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.dataset_dir=nowhere", "nowhere: no such folder"),
        ("data.split=test", "no split 'test'; it has training, validation"),
        ("data.resolution=50", "data.resolution: 50 is not a multiple of 16 pixels; try 48 or 64"),
        ("validation={images: 1, split: test}", "no split 'test'"),
        ("adapter.target=attentoin", "adapter.target: 'attentoin' matches no .* Near: attention"),
        ("adapter.init_from=nowhere", "nowhere is not a folder"),
        ("data.condition=cany", "cany"),
    ],
)
def test_bad_input_is_one_error_and_writes_nothing(
    make_controllable: MakeConfig, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        controllable.run(make_controllable(tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter={method: none, target: attention}"], "adapter.target: .* the condition encoder is trained"),
        (["adapter.text_encoder=true"], "a controllable run leaves the text encoder as it is"),
        (["training.optimizer=prodigy", "training.encoder_learning_rate=0.1"], "prodigy finds one rate for all"),
        (["training.epochs=2"], "give either steps or epochs"),
        (["data.croop=center"], "Did you mean 'crop'"),
    ],
)
def test_a_config_that_cannot_be_is_told_before_anything_is_loaded(
    make_controllable: MakeConfig, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_controllable(tmp_path / "run", *overrides)


def test_rates_default_by_method_and_the_encoders_is_bounded(make_controllable: MakeConfig, tmp_path: Path) -> None:
    expected = {
        "adapter={method: ether}": (1e-3, 1e-4),
        "adapter={method: lora}": (1e-4, 1e-4),
        "training.learning_rate=1e-5": (1e-5, 1e-5),
        "training.encoder_learning_rate=0.01": (1e-3, 1e-2),
        "training.optimizer=prodigy": (1.0, 1.0),
    }
    for override, rates in expected.items():
        config = controllable.resolve(make_controllable(tmp_path, override))
        assert (config.training.learning_rate, config.training.encoder_learning_rate) == rates
        assert getattr(config.adapter, "target", None) == "attention+geglu"


@pytest.mark.parametrize("mirrored", ["true", "false"])
def test_training_with_and_without_cache_is_the_same_bitwise(
    make_controllable: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored: str
) -> None:
    common = [f"data.horizontal_flip={mirrored}", "data.caption_dropout=0.3", "training.steps=3"]
    common += ["validation.images=1", "validation.every=3"]
    cached = [*common, "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}"]
    controllable.run(make_controllable(tmp_path / "plain", *common))
    controllable.run(make_controllable(tmp_path / "cached", *cached))
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "cached"))
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "cached")
    grids = [(tmp_path / name / "samples/step-000003.png").read_bytes() for name in ("plain", "cached")]
    assert grids[0] == grids[1]

    calls = []
    monkeypatch.setattr(controllable.ControllableTask, "_encode", lambda *args: calls.append(args))
    controllable.run(make_controllable(tmp_path / "again", *cached))
    assert not calls


def test_a_cache_of_random_crops_is_refused(make_controllable: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache.*data\.crop=center"):
        make_controllable(tmp_path / "run", "data.cache=true", "data.crop=random")
