"""The controllable trainer: what a run leaves behind, exact resume, and the laws of its steps."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

import ether_diffusion_cli
from ether_diffusion.adapters.attach import attach
from ether_diffusion.config import load_config
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.conditioning import ConditionedUNet
from ether_diffusion.pictures import read_settings
from ether_diffusion.training import controllable, frozen_encoders
from ether_diffusion.training.frozen_encoders import FrozenEncoders
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.schedule import make_plan
from support.runs import difference, metrics, same, trained_weights

MakeConfig = Callable[..., controllable.ControllableConfig]
ADAPTER, ENCODER = "adapter/adapter_model.safetensors", "condition_encoder/diffusion_pytorch_model.safetensors"


def make_task(make: MakeConfig, folder: Path, *overrides: str) -> controllable.ControllableTask:
    """A task without a run, its encoder away from zero so that conditions count."""
    config = controllable.resolve(make(folder, *overrides))
    base = load_base("tiny")
    if config.adapter.method != "none":
        attach(base.unet, config.adapter, seed=1)
    task = controllable.ControllableTask(config, None, resumed=False)
    task.build(base, make_plan(config.training, task.samples_per_epoch), Accelerator())
    with torch.no_grad():
        task.encoder.embedding.conv_out.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return task


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


@pytest.fixture(scope="module")
def plain(make_controllable: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of two samples, for comparison with runs under other options."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    controllable.run(make_controllable(folder, "training.batch_size=2"))
    return folder


def test_a_run_leaves_adapter_and_encoder_and_the_same_in_its_checkpoints(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.yaml", "adapter", "condition_encoder", "checkpoints", "samples", "metrics.jsonl"}
    steps = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert steps == ["step-000002", "step-000004"]
    early, late = (trained_weights(finished / "checkpoints" / step) for step in steps)
    assert same(late, trained_weights(finished))
    assert {tensor.dtype for tensor in late.values()} == {torch.float32}
    # What training started at is zero only in the encoder's last convolution: everything has moved since.
    assert not any(torch.equal(early[key], late[key]) for key in late)
    resolved = load_config(controllable.ControllableConfig, finished / "config.yaml")
    assert controllable.resolve(resolved) == resolved
    assert (resolved.training.learning_rate, resolved.training.encoder_learning_rate) == (1e-3, 1e-4)


def test_validation_shows_condition_sampled_image_and_real_image_of_the_validation_split(finished: Path) -> None:
    grids = sorted((finished / "samples").iterdir())
    assert [grid.name for grid in grids] == ["step-000000.png", "step-000002.png", "step-000004.png"]
    first, last = (Image.open(grids[k]).convert("RGB") for k in (0, 2))
    settings = read_settings(grids[2])
    assert settings is not None
    assert settings["sampling"]["scheduler"] == "ddim"
    # Rows of three cells of 64 pixels with margins of 6: only the cell in the middle is generated again.
    for x, changes in ((6, False), (76, True), (146, False)):
        left, right = (grid.crop((x, 0, x + 64, grid.height)).tobytes() for grid in (first, last))
        assert (left != right) == changes


def test_validation_changes_nothing_in_training(make_controllable: MakeConfig, plain: Path, tmp_path: Path) -> None:
    overrides = ("training.batch_size=2", "validation.images=1", "validation.every=1")
    controllable.run(make_controllable(tmp_path, *overrides))
    assert len(list((tmp_path / "samples").iterdir())) == 3
    assert same(trained_weights(tmp_path), trained_weights(plain))


def test_epochs_are_counted_in_pairs(make_controllable: MakeConfig, tmp_path: Path) -> None:
    overrides = ("training.steps=null", "training.epochs=2", "training.batch_size=4", "training.checkpoint_every=9")
    controllable.run(make_controllable(tmp_path / "run", *overrides))
    assert len(metrics(tmp_path / "run")) == 3  # 2 epochs of 6 pairs, 4 a step


def test_the_encoder_alone_learns_and_leaves_the_unet_as_it_is(
    make_controllable: MakeConfig, tmp_path: Path, scenes: Path
) -> None:
    task = make_task(make_controllable, tmp_path, "adapter={method: none}")
    before = {name: tensor.clone() for name, tensor in task.encoder.state_dict().items()}
    settings = task.config.training
    assert (settings.learning_rate, settings.encoder_learning_rate) == (1e-4, 1e-4)
    plan, run = make_plan(settings, len(task.pairs)), RunFolder(tmp_path / "run")
    trainer = Trainer(task, task.config, Accelerator(), plan, run)
    trainer.train()
    assert not any(torch.equal(before[name], tensor) for name, tensor in task.encoder.state_dict().items())
    assert same(task.base.unet.state_dict(), load_base("tiny").unet.state_dict())
    assert not list((tmp_path / "run").rglob("adapter*"))
    assert same(trained_weights(tmp_path / "run"), trained_weights(tmp_path / "run/checkpoints/step-000002"))


def test_dropping_the_hint_reproduces_the_base(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    """With features times 0, and with the zeros that an encoder starts with: bit for bit, with ETHER+ at its start."""
    task = make_task(make_controllable, tmp_path)
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
    task = make_task(make_controllable, tmp_path)
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


def test_the_loss_is_the_mean_over_samples(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    task = make_task(make_controllable, tmp_path, "training.min_snr_gamma=5")
    batch = task.prepare(task.collate([task.dataset[k] for k in (3, 8)]))  # of two epochs
    errors = (predict(task, batch) - batch["target"]).square().mean(dim=(1, 2, 3))
    expected = float((errors * batch["weights"]).mean())
    assert len(set(batch["weights"].tolist())) == 2
    assert float(task.module(batch)["loss"].detach()) == pytest.approx(expected, rel=1e-5)


def test_dropped_captions_keep_their_conditions(make_controllable: MakeConfig, tmp_path: Path, scenes: Path) -> None:
    task = make_task(make_controllable, tmp_path)
    dropped = ControllableDataset(task.pairs, resolution=64, seed=0, caption_dropout=0.5)
    pairs = [(task.dataset[k], dropped[k]) for k in range(12)]
    empty = [left["hint"] for left, right in pairs if right["prompt"] == ""]
    assert 0 < len(empty) < 12
    assert all(torch.equal(left["hint"], right["hint"]) for left, right in pairs)
    hidden = task.prepare(task.collate([right for _, right in pairs]))["encoder_hidden_states"]
    unconditional = task.encoders.encode_text("")["encoder_hidden_states"]
    assert sum(torch.equal(row[None], unconditional) for row in hidden) == len(empty)


def test_text_features_that_no_longer_fit_are_encoded_again(
    make_controllable: MakeConfig, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(make_controllable, tmp_path)
    with torch.no_grad():
        whole = task.encoders.text(["a", "b", "c", "a"])["encoder_hidden_states"]
        assert len(task.encoders.features) == 3
        task.encoders.features.clear()
        monkeypatch.setattr(frozen_encoders, "CACHED_FEATURES_BYTES", 2 * whole[0].nbytes)
        again = task.encoders.text(["a", "b", "c", "a"])["encoder_hidden_states"]
    assert torch.equal(whole, again)
    assert len(task.encoders.features) == 2


def test_checkpointing_accumulation_and_bf16_come_near_the_plain_run(
    make_controllable: MakeConfig, plain: Path, tmp_path: Path
) -> None:
    two = "training.batch_size=2"
    controllable.run(make_controllable(tmp_path / "again", two, "training.gradient_checkpointing=true"))
    assert difference(trained_weights(tmp_path / "again"), trained_weights(plain)) < 1e-5
    parts = ("training.batch_size=1", "training.gradient_accumulation=2")
    controllable.run(make_controllable(tmp_path / "parts", *parts))
    for left, right in zip(metrics(tmp_path / "parts"), metrics(plain), strict=True):
        assert left == pytest.approx(right, rel=1e-4)
    AcceleratorState._reset_state()
    controllable.run(make_controllable(tmp_path / "half", two, "training.mixed_precision=bf16"))
    assert {tensor.dtype for tensor in trained_weights(tmp_path / "half").values()} == {torch.float32}
    for left, right in zip(metrics(tmp_path / "half"), metrics(plain), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=0.03)


def test_warm_start_takes_both_parts_and_refuses_what_lacks_one(
    make_controllable: MakeConfig, finished: Path, finished_run: Path, tmp_path: Path
) -> None:
    still = ("training.learning_rate=0", f"adapter.init_from={finished}", "training.steps=1")
    controllable.run(make_controllable(tmp_path / "warm", *still, "training.require_certificate=false"))
    assert same(trained_weights(tmp_path / "warm"), trained_weights(finished))
    only = make_controllable(tmp_path / "only", f"adapter={{method: none, init_from: {finished_run}}}")
    with pytest.raises(UserError, match=r"holds no condition_encoder/; expected the folder of a controllable run"):
        controllable.run(only)
    assert not (tmp_path / "only").exists()


def test_dry_run_writes_nothing_and_prints_what_would_be_trained(
    make_controllable: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = controllable.run(make_controllable(tmp_path / "run"), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.peak_memory > 2**20
    printed = capsys.readouterr().out
    assert "Encoder: 99,760 trainable parameters, learning rate 0.0001" in printed
    assert "Pairs:   6 in " in printed
    assert "label maps of 23 classes" in printed


def test_captions_of_the_training_split_do_not_stop_validation(
    make_controllable: MakeConfig, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "ade20k"
    shutil.copytree(scenes, folder)
    common = (f"data.dataset_dir={folder}", "validation.images=1", "validation.every=1", "training.steps=1")
    captions = f"data.captions={folder / 'captions/training.jsonl'}"
    controllable.run(make_controllable(tmp_path / "found", *common, captions))
    assert "validation uses" not in capsys.readouterr().out
    (folder / "captions/validation.jsonl").unlink()
    controllable.run(make_controllable(tmp_path / "none", *common, captions))
    assert 'Note:    validation uses pairs of split "training": ' in capsys.readouterr().out
    with pytest.raises(UserError, match="no captions"):
        controllable.run(make_controllable(tmp_path / "named", *common, captions, "validation.split=validation"))


def run_last_line(printed: str) -> int:
    """Run the command in a run's last line, for one image in one step. Returns its exit code."""
    (line,) = [line for line in printed.splitlines() if line.startswith("Generate:")]
    program, *arguments = shlex.split(line.removeprefix("Generate:"))
    assert program == "ether-diffusion"
    return ether_diffusion_cli.main([*arguments, "--limit", "1", "--steps", "1"])


CAPTIONS = {"a folder of all splits": 1, "a file of each": 0, "of training alone": 1}
"""Where a run's captions are; the quick tests validate with so many images, the slow ones with the other number."""


@pytest.mark.parametrize(
    ("captions", "images"),
    [
        pytest.param(captions, images, marks=() if images == quick else pytest.mark.slow)
        for captions, quick in CAPTIONS.items()
        for images in (0, 1)
    ],
)
def test_the_last_line_is_a_command_that_generates(
    make_controllable: MakeConfig,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    captions: str,
    images: int,
) -> None:
    """It names captions from where the run has them and a split that has captions, and quotes paths with spaces."""
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
    assert run_last_line(capsys.readouterr().out) == 0
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
        ("data.resolution=512", "data.resolution: 512, but the base 'tiny' generates 64 x 64 pixels"),
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
def test_an_invalid_config_is_refused_before_anything_is_loaded(
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


@pytest.mark.parametrize("mirrored", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_training_with_and_without_cache_is_the_same_bitwise(
    make_controllable: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrored: str
) -> None:
    common = [f"data.horizontal_flip={mirrored}", "data.caption_dropout=0.3", "training.steps=2"]
    common += ["validation.images=1", "validation.every=2"]
    cached = [*common, "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}"]
    controllable.run(make_controllable(tmp_path / "plain", *common))
    controllable.run(make_controllable(tmp_path / "cached", *cached))
    assert same(trained_weights(tmp_path / "plain"), trained_weights(tmp_path / "cached"))
    assert metrics(tmp_path / "plain") == metrics(tmp_path / "cached")
    grids = [(tmp_path / name / "samples/step-000002.png").read_bytes() for name in ("plain", "cached")]
    assert grids[0] == grids[1]

    calls = []
    monkeypatch.setattr(FrozenEncoders, "moments", lambda *args: calls.append(args))
    controllable.run(make_controllable(tmp_path / "again", *cached, "training.steps=1", "validation.images=0"))
    assert not calls


def test_a_cache_of_random_crops_is_refused(make_controllable: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache.*data\.crop=center"):
        make_controllable(tmp_path / "run", "data.cache=true", "data.crop=random")
