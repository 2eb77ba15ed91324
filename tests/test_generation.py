"""Images from saved adapters: seeds, settings kept with the files, reruns, scale and merging."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from PIL import Image

from ether_diffusion.errors import UserError
from ether_diffusion.files import partial_of
from ether_diffusion.generation import (
    Job,
    Sampling,
    generate,
    jobs_for,
    load_pipeline,
    pick_device,
    read_prompts,
    sample_images,
)
from ether_diffusion.generation.sampling import make_scheduler
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.stable_diffusion_v1 import SCHEDULER
from ether_diffusion.pictures import read_settings, save_png, sheet

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


def test_an_image_belongs_to_its_prompt_and_number_not_to_its_place() -> None:
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


def test_checkpoints_draw_their_own_images(finished_run: Path) -> None:
    jobs = jobs_for(["a qwe toy"], 1)
    early = images_of(finished_run / "checkpoints/step-000002", jobs)[jobs[0]]
    assert not np.array_equal(early, images_of(finished_run, jobs)[jobs[0]])


@pytest.mark.parametrize("scheduler", ["dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"])
def test_every_scheduler_draws_the_same_image_twice(scheduler: str) -> None:
    jobs = jobs_for(["a toy"], 1)
    sampling = Sampling(steps=4, scheduler=scheduler)  # pyright: ignore[reportArgumentType]
    one, two = (images_of(None, jobs, sampling=sampling)[jobs[0]] for _ in range(2))
    assert np.array_equal(one, two)


def test_guidance_and_negative_prompt_have_an_effect() -> None:
    jobs = jobs_for(["a toy"], 1)
    plain = images_of(None, jobs)[jobs[0]]
    for sampling in (Sampling(steps=2, guidance=2.0), Sampling(steps=2, negative_prompt="a dog")):
        assert not np.array_equal(images_of(None, jobs, sampling=sampling)[jobs[0]], plain)


def test_files_say_how_they_were_made_and_complete_ones_are_kept(finished_run: Path, tmp_path: Path) -> None:
    pipeline, saved = load_pipeline(finished_run)
    assert saved is not None
    arguments = {"images_per_prompt": 2, "seed": 5, "sampling": FAST, "record": {"adapter": saved.digest}}
    files = generate(pipeline, ["a qwe toy", "ein Spielzeug — schön"], tmp_path, **arguments)
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
    assert generate(pipeline, ["a qwe toy", "ein Spielzeug — schön"], tmp_path, **arguments) == files
    again = [file.stat().st_mtime_ns for file in files]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False, True, True]
    assert files[1].read_bytes() == content
    with pytest.raises(UserError, match=r"made with seed = 5, not 6\. Choose another --output"):
        generate(pipeline, ["a qwe toy"], tmp_path, **{**arguments, "seed": 6})


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("# a comment\n\na qwe dog\n  in the snow  \n")
    assert read_prompts(path) == ["a qwe dog", "in the snow"]
    path.write_text("# nothing\n")
    with pytest.raises(UserError, match="no prompt in it; expected one a line"):
        read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")


def test_file_names_never_collide() -> None:
    jobs = jobs_for(["A dog!", "a dog?", "犬", "", "x" * 300] * 3, 3)
    assert len({job.file for job in jobs}) == len(jobs) == 45
    assert all(len(job.file) < 100 for job in jobs)


def test_a_device_that_is_not_there_is_one_error() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device 'quantum' cannot be used here"):
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
def test_latents_are_not_clipped_where_the_base_does_not_say(name: str) -> None:
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


def test_two_processes_do_not_share_the_file_they_write_into(tmp_path: Path) -> None:
    name = partial_of(tmp_path / "image.png").name
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\nfrom ether_diffusion.files import partial_of\n"
            "print(partial_of(Path('image.png')).name)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() != name
