"""Images from saved adapters: seeds, settings kept with the files, reruns, scale and merging."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from PIL import Image

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.peft_methods import OftSettings
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import (
    Job,
    Sampling,
    generate,
    jobs_for,
    load_pipeline,
    pick_device,
    read_prompts,
    read_run,
    sample_images,
)
from ether_diffusion.generation.folders import complete_folder
from ether_diffusion.generation.pipelines import dtype_name
from ether_diffusion.generation.sampling import make_scheduler
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.families.stable_diffusion_v1 import SCHEDULER
from ether_diffusion.pictures import read_settings, save_png, sheet
from support.adapted_unets import move

FAST = Sampling(steps=2)


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def images_of(
    run: Path | None, jobs: list[Job], batch_size: int = 1, sampling: Sampling = FAST, **options: object
) -> dict:
    pipeline, _ = load_pipeline(run, base_model="tiny", **options)  # pyright: ignore[reportArgumentType]
    return {job: pixels(image) for job, image in sample_images(pipeline, jobs, sampling, seed=3, batch_size=batch_size)}


def test_batch_and_order_change_nothing(finished_run: Path) -> None:
    jobs = jobs_for(["a qwe toy", "a qwe toy on the beach"], 2)
    alone = images_of(finished_run, jobs)
    together = images_of(finished_run, jobs[::-1], batch_size=3)
    # Other batch shapes round differently in the last bit of a float: at most one level of 255.
    assert all(np.abs(alone[job] - together[job]).max() <= 1 for job in jobs)
    different = [np.abs(alone[jobs[0]] - alone[job]).max() for job in jobs[1:]]
    assert min(different) > 8


def test_a_batch_that_does_not_fit_into_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sample, tried = StableDiffusionPipeline.__call__, []

    def limited(self: StableDiffusionPipeline, prompt: list[str], **options: object) -> object:
        tried.append(len(prompt))
        if len(prompt) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sample(self, prompt, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", limited)
    jobs, limit = jobs_for(["a toy", "a cat"], 4), 2
    halved = images_of(None, jobs, batch_size=6)
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1, 1, 1]
    alone = images_of(None, jobs)
    assert all(np.array_equal(halved[job], alone[job]) for job in jobs)
    limit = 0
    with pytest.raises(
        UserError, match=r"Out of memory \(CUDA out of memory\.\)\. Try a smaller --resolution, --dtype"
    ):
        images_of(None, jobs, batch_size=2)


def test_an_image_depends_on_its_prompt_and_number_not_on_its_place() -> None:
    short = images_of(None, [Job("a toy", 1, "x.png")])
    long = images_of(None, [*jobs_for(["a dog", "a cat"], 2), Job("a toy", 1, "x.png")])
    assert np.array_equal(short[Job("a toy", 1, "x.png")], long[Job("a toy", 1, "x.png")])


def test_scale_zero_is_the_base_and_merging_changes_no_image(finished_run: Path) -> None:
    jobs = jobs_for(["a qwe toy"], 1)
    base = images_of(None, jobs)[jobs[0]]
    adapted = images_of(finished_run, jobs)[jobs[0]]
    assert np.array_equal(images_of(finished_run, jobs, scale=0.0)[jobs[0]], base)
    assert np.abs(adapted - base).max() > 1
    assert np.abs(images_of(finished_run, jobs, merged=True)[jobs[0]] - adapted).max() <= 1
    half = images_of(finished_run, jobs, scale=0.5)[jobs[0]]
    merged_half = images_of(finished_run, jobs, scale=0.5, merged=True)[jobs[0]]
    assert np.abs(half - merged_half).max() <= 1
    assert not np.array_equal(half, adapted)


def test_checkpoints_give_their_own_images(finished_run: Path) -> None:
    jobs = jobs_for(["a qwe toy"], 1)
    early = images_of(finished_run / "checkpoints/step-000002", jobs)[jobs[0]]
    assert not np.array_equal(early, images_of(finished_run, jobs)[jobs[0]])


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"])
def test_every_scheduler_gives_the_same_image_twice(scheduler: str) -> None:
    jobs = jobs_for(["a toy"], 1)
    sampling = Sampling(steps=4, scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    one, two = (images_of(None, jobs, sampling=sampling)[jobs[0]] for _ in range(2))
    assert np.array_equal(one, two)


def test_guidance_and_negative_prompt_have_an_effect() -> None:
    jobs = jobs_for(["a toy"], 1)
    plain = images_of(None, jobs)[jobs[0]]
    for sampling in (Sampling(steps=2, guidance=2.0), Sampling(steps=2, negative_prompt="a dog")):
        assert not np.array_equal(images_of(None, jobs, sampling=sampling)[jobs[0]], plain)


def test_files_record_their_settings_and_complete_ones_are_kept(finished_run: Path, tmp_path: Path) -> None:
    pipeline, saved = load_pipeline(finished_run)
    assert saved is not None
    arguments = {"images_per_prompt": 2, "seed": 5, "sampling": FAST, "record": {"adapter": saved.digest}}
    files = generate(pipeline, ["a qwe toy", "ein Spielzeug — schön"], tmp_path, **arguments).files
    assert len(files) == 4
    settings = read_settings(files[3])
    assert settings is not None
    assert (settings["prompt"], settings["k"], settings["seed"]) == ("ein Spielzeug — schön", 1, 5)
    assert settings["adapter"] == saved.digest
    rows = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [file.name for file in files]
    assert (tmp_path / "grid.png").exists()

    times = [file.stat().st_mtime_ns for file in files]
    content = files[1].read_bytes()
    files[1].write_bytes(content[:200])  # cut short, as by a full disk
    assert generate(pipeline, ["a qwe toy", "ein Spielzeug — schön"], tmp_path, **arguments).files == files
    again = [file.stat().st_mtime_ns for file in files]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True, True]
    assert files[1].read_bytes() == content
    with pytest.raises(UserError, match=r"made with seed = 5, not 6\. Choose another --output"):
        generate(pipeline, ["a qwe toy"], tmp_path, **{**arguments, "seed": 6})


@pytest.fixture(scope="module")
def oft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved OFT adapter that does something: a method without a scale."""
    unet = load_base("tiny").unet
    attach(unet, OftSettings())
    move(unet)
    return save_adapter(unet, tmp_path_factory.mktemp("oft") / "adapter", base_model="tiny")


def test_a_method_without_a_scale_is_left_out_at_zero_and_refused_in_between(oft_adapter: Path) -> None:
    jobs = jobs_for(["a toy"], 1)
    base, adapted = (images_of(run, jobs)[jobs[0]] for run in (None, oft_adapter))
    assert np.abs(adapted - base).max() > 8
    assert np.array_equal(images_of(oft_adapter, jobs, scale=0.0)[jobs[0]], base)
    assert np.array_equal(images_of(oft_adapter, jobs, scale=0.0, merged=True)[jobs[0]], base)
    run = read_run(oft_adapter)
    assert not run.facts.has_scale
    with pytest.raises(UserError, match=r"^--scale 0\.5: .*adapter is OFT, which has no scale; allowed: 0 and 1"):
        load_pipeline(run, base_model="no/such/base", scale=0.5)  # refused before a base is looked for


@pytest.mark.parametrize(("asked", "used"), [(None, "fp32"), ("fp32", "fp32"), ("bf16", "bf16")])
def test_a_pipeline_says_which_precision_it_computes_in(asked: str | None, used: str, oft_adapter: Path) -> None:
    pipeline, _ = load_pipeline(oft_adapter, device="cpu", dtype=asked)
    assert any(parameter.dtype == torch.float32 for parameter in pipeline.unet.parameters())  # the adapter's own
    assert dtype_name(pipeline.unet.dtype) == used


def test_faults_are_returned_as_they_were_known_when_sampling(tmp_path: Path) -> None:
    white, black, broken = (Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "black"))
    broken.info["nan"] = True
    images = {"white.png": white, "black.png": black, "sub/broken.png": broken}
    asked: list[str] = []

    def sample(files: Sequence[str], progress: object) -> Iterator[Image.Image]:
        asked[:] = files
        return (images[file] for file in files)

    for missing in (list(images), [], ["black.png"]):
        found = complete_folder(tmp_path, {file: {"prompt": file} for file in images}, sample)
        assert asked == missing
        assert found.files == [tmp_path / file for file in images]
        assert found.faults == {tmp_path / "black.png": "black", tmp_path / "sub/broken.png": "nan"}
        if not missing:
            (tmp_path / "black.png").unlink()


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\na qwe dog\n  in the snow  \n")
    assert read_prompts(path) == ["a qwe dog", "in the snow"]
    path.write_bytes(b"\xef\xbb\xbf# a comment\r\na qwe\xc2\x85dog\r\n")
    assert read_prompts(path) == ["a qwe\x85dog"]
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompt in it; expected one a line"):
        read_prompts(path)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(tmp_path / "nowhere.txt")


def test_file_names_never_collide() -> None:
    jobs = jobs_for(["A dog!", "a dog?", "犬", "", "x" * 300] * 3, 3)
    assert len({job.file for job in jobs}) == len(jobs) == 45
    assert all(len(job.file) < 100 for job in jobs)


def test_a_missing_device_is_one_error() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'quantum': expected cpu, cuda, mps or xpu"):
        pick_device("quantum")


def test_png_settings_survive_and_damage_is_seen(tmp_path: Path) -> None:
    path = save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "ü 犬", "n": 1})
    assert read_settings(path) == {"prompt": "ü 犬", "n": 1}
    path.write_bytes(path.read_bytes()[:-30])
    assert read_settings(path) is None
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_sheet_shows_every_image_under_its_caption() -> None:
    red, blue = Image.new("RGB", (64, 64), "#ff0000"), Image.new("RGB", (32, 64), "#0000ff")
    page = sheet([("one", [red, red, red]), ("two", [blue])])
    colours = {colour: count for count, colour in page.getcolors(1 << 20)}  # pyright: ignore
    assert colours[(255, 0, 0)] == 3 * 64 * 64
    assert colours[(0, 0, 255)] == 32 * 64


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_latents_are_not_clipped_where_the_base_does_not_mention_it(name: str) -> None:
    """Single-file bases have a scheduler without `clip_sample`, whose default in diffusers is to clip at 1."""
    scheduler = make_scheduler(name, PNDMScheduler(**SCHEDULER).config)
    scheduler.set_timesteps(10)
    first = int(scheduler.timesteps[0])
    alpha = scheduler.alphas_cumprod[first]
    latents, noise = torch.full((1, 4, 2, 2), 3.0), torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    generator = torch.Generator().manual_seed(0)
    found = scheduler.step(noise, first, noisy, generator=generator).pred_original_sample
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


def test_a_pipeline_of_a_base_does_not_clip_either() -> None:
    base = dataclasses.replace(load_base("tiny"), scheduler_config=dict(PNDMScheduler(**SCHEDULER).config))
    assert base.pipeline().scheduler.config["clip_sample"] is False
