"""Data options of DreamBooth: the cache, captions, masks, buckets, several subjects."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from ether_diffusion.config import ConfigError
from ether_diffusion.data.photo_dataset import DreamBoothDataset
from ether_diffusion.data.photos import find_photos
from ether_diffusion.data.subjects import Subject
from ether_diffusion.errors import UserError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.frozen_encoders import FrozenEncoders
from ether_diffusion.training.latent_cache import read_encoded
from ether_diffusion.training.schedule import make_plan
from support.runs import assert_same_run, metrics, stopped_after
from support.tasks import make_task

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]


@pytest.mark.parametrize(
    "crops", [pytest.param(["data.crop=center"], marks=pytest.mark.slow), ["data.crops_per_photo=2"]]
)
def test_training_with_and_without_cache_is_the_same_bitwise(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crops: list[str]
) -> None:
    common = [*crops, "data.horizontal_flip=true", "data.caption_dropout=0.2", "training.steps=2"]
    common += ["validation.prompts=[a qwe toy]", "validation.every=2"]
    cached = [*common, "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}"]
    dreambooth.run(make_config(tmp_path / "plain", *common))
    dreambooth.run(make_config(tmp_path / "cached", *cached))
    assert_same_run(tmp_path / "plain", tmp_path / "cached")
    grids = [(tmp_path / name / "samples/step-000002.png").read_bytes() for name in ("plain", "cached")]
    assert grids[0] == grids[1]

    # A second run encodes nothing but what was damaged, and with the same result.
    calls = []
    encode = FrozenEncoders.moments

    def counting(self: Any, pixels: torch.Tensor) -> Any:
        calls.append(pixels)
        return encode(self, pixels)

    monkeypatch.setattr(FrozenEncoders, "moments", counting)
    file = next((tmp_path / "cache/latents").glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-10])
    dreambooth.run(make_config(tmp_path / "mended", *cached))
    assert len(calls) == 1
    assert_same_run(tmp_path / "plain", tmp_path / "mended")


def fill_caches(task: dreambooth.DreamBoothTask) -> None:
    task.fill_caches(make_plan(task.config.training, task.samples_per_epoch), Accelerator())


def test_encoders_leave_memory_once_everything_is_cached(make_config: MakeConfig, tmp_path: Path) -> None:
    cached = ("data.crop=center", "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}", "training.steps=3")
    task = make_task(make_config, tmp_path, *cached)
    plain = task.prepare(task.collate([task.dataset[2]]))
    fill_caches(task)
    for encoder in (task.base.vae, task.base.text_encoder):
        assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    prepared = task.prepare(task.collate([task.dataset[2]]))
    for name in ("noisy_latents", "encoder_hidden_states", "target"):
        assert torch.equal(plain[name], prepared[name])


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_flipped_byte_in_the_cache_is_noticed_and_made_anew(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    cached = ("data.crop=center", "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}", "training.steps=3")
    task = make_task(make_config, tmp_path, *cached)
    fill_caches(task)
    file = next((tmp_path / "cache" / kind).glob("*/*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(UserError, match="its content has changed; run the command again, which encodes it anew"):
        read_encoded(file)
    fill_caches(make_task(make_config, tmp_path, *cached))
    assert file.read_bytes() == whole


def test_another_encoder_does_not_find_the_cache_of_the_first(make_config: MakeConfig, tmp_path: Path) -> None:
    cached = ("data.crop=center", "data.cache=true", f"data.cache_dir={tmp_path / 'cache'}", "training.steps=1")
    for scale in (1.0, 1.1):
        task = make_task(make_config, tmp_path, *cached)
        with torch.no_grad():
            next(task.base.vae.parameters()).mul_(scale)
        fill_caches(task)
    assert len(list((tmp_path / "cache/latents").iterdir())) == 2
    assert len(list((tmp_path / "cache/text").iterdir())) == 1


def test_a_cache_of_random_crops_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache needs fixed crops: data\.crops_per_photo=8"):
        make_config(tmp_path, "data.cache=true")


def test_the_mask_weighs_the_loss_of_each_place(make_config: MakeConfig, tmp_path: Path) -> None:
    task = make_task(make_config, tmp_path)
    batch = task.prepare(task.collate([task.dataset[0], task.dataset[1]]))
    size = batch["target"].shape[-2:]
    whole = task.module({**batch, "masks": torch.ones(4, 1, *size)})["loss"]
    assert float(whole) == pytest.approx(float(task.module(batch)["loss"]), rel=1e-5)
    left = torch.zeros(4, 1, *size)
    left[..., : size[1] // 2] = 1
    masked = {**batch, "masks": left}
    hidden = batch["target"].clone()
    hidden[..., size[1] // 2 :] += 5  # where the mask is black
    assert float(task.module({**masked, "target": hidden})["loss"]) == float(task.module(masked)["loss"])
    with torch.no_grad():
        prediction = task.base.unet(batch["noisy_latents"], batch["timesteps"], batch["encoder_hidden_states"]).sample
    errors = (prediction - batch["target"])[..., : size[1] // 2].square().mean(dim=(1, 2, 3)) / 2
    assert float(task.module(masked)["loss"]) == pytest.approx(float(errors[:2].mean() + errors[2:].mean()), rel=1e-4)


def photo_folder(folder: Path, sizes: list[tuple[int, int]]) -> Path:
    folder.mkdir()
    for k, size in enumerate(sizes):
        Image.linear_gradient("L").resize(size).convert("RGB").save(folder / f"{k}.png")
    return folder


def test_captions_masks_and_buckets_from_the_config(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = photo_folder(tmp_path / "photos", [(128, 64), (128, 64), (64, 128), (64, 128)])
    masks = photo_folder(tmp_path / "masks", [(128, 64), (128, 64), (64, 128), (64, 128)])
    for k in range(3):
        (photos / f"{k}.txt").write_text(f"qwe toy number {k}\n")
    seen: list[Any] = []
    prepare = dreambooth.DreamBoothTask.prepare

    def looking(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        done = prepare(self, batch)
        seen.append((batch["prompts"], tuple(done["noisy_latents"].shape[-2:]), tuple(done["masks"].shape)))
        return done

    monkeypatch.setattr(dreambooth.DreamBoothTask, "prepare", looking)
    overrides = [f"data.instance_dir={photos}", f"data.masks={masks}", "data.captions=true", "data.crop=bucket"]
    overrides += ["data.bucket_factor=16", "data.prior=null", "training.batch_size=2", "training.steps=4"]
    dreambooth.run(make_config(tmp_path / "run", *overrides))
    assert {prompt for prompts, _, _ in seen for prompt in prompts} == {
        *(f"qwe toy number {k}" for k in range(3)),
        "a photo of qwe toy",
    }
    shapes = {shape for _, shape, _ in seen}
    assert len(shapes) == 2
    assert all(h != w and h * w <= 16 * 16 for h, w in shapes)
    assert all(mask == (2, 1, *shape) for _, shape, mask in seen)
    assert "Note:" in capsys.readouterr().out  # one photo has no caption


def test_bucketed_runs_resume_and_cache_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos", [(128, 64), (128, 64), (64, 128)])
    common = [f"data.instance_dir={photos}", "data.crop=bucket", "data.bucket_factor=16", "data.prior=null"]
    common += ["training.batch_size=2", "training.steps=4", "training.checkpoint_every=1", "training.keep_states=3"]
    dreambooth.run(make_config(tmp_path / "once", *common))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice")
    cache = ["data.cache=true", f"data.cache_dir={tmp_path / 'cache'}"]
    dreambooth.run(make_config(tmp_path / "cached", *common, *cache))
    assert_same_run(tmp_path / "once", tmp_path / "cached")


def test_fixed_crops_are_few() -> None:
    photos = find_photos("builtin:robot")
    dataset = DreamBoothDataset([Subject(photos, "a toy")], resolution=48, crops_per_photo=3)
    assert len({dataset.key(index) for index in range(300)}) <= 3 * len(photos.photos)


def test_several_subjects_are_learned_in_one_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """Each with its own prompt and its own class's images; the run resumes exactly."""
    photos = photo_folder(tmp_path / "photos", [(64, 64), (64, 64)])
    second = f"{{instance_dir: {photos}, class_name: board, identifier: xyz}}"
    common = [f"data.more_subjects=[{second}]", f"data.prior.cache_dir={tmp_path / 'classes'}"]
    common += ["training.steps=4", "training.checkpoint_every=1", "training.keep_states=3"]
    dreambooth.run(make_config(tmp_path / "once", *common))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *common, "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice")
    prompts = {json.loads(file.read_text())["prompt"] for file in (tmp_path / "classes").glob("*/manifest.json")}
    assert prompts == {"a photo of toy", "a photo of board"}
    card = (tmp_path / "once/adapter/README.md").read_text()
    assert "`a photo of qwe toy`, `a photo of xyz board`" in card
    with pytest.raises(ConfigError, match="share identifier and class_name"):
        make_config(tmp_path / "x", "data.more_subjects=[{instance_dir: y, class_name: toy}]")


def test_epochs_of_several_subjects_have_their_full_length_and_are_cached_whole(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each subject has as many samples per epoch as the one with most photos: 2 x 3, not 3 + 1."""
    many, one = photo_folder(tmp_path / "many", [(64, 64)] * 3), photo_folder(tmp_path / "one", [(64, 64)])
    overrides = [f"data.instance_dir={many}", "data.prior=null", "data.crop=center", "data.cache=true"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "training.epochs=1", "training.steps=null"]
    overrides += [f"data.more_subjects=[{{instance_dir: {one}, class_name: board, identifier: xyz}}]"]
    dreambooth.run(make_config(tmp_path / "run", *overrides, "training.batch_size=1"))
    assert "Steps:   6 with 1 sample each" in capsys.readouterr().out
    assert len(metrics(tmp_path / "run")) == 6


def test_the_last_line_is_one_command(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = 'the "qwe" toy, at night'
    run = make_config(tmp_path / "my run", "training.steps=1", f"validation.prompts=['{prompt}']", "data.prior=null")
    dreambooth.run(run)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Generate:")]
    folder = str(tmp_path / "my run")
    assert shlex.split(line)[3:] == ["--adapter", folder, "--prompt", prompt, "--output", f"{folder}/images"]
