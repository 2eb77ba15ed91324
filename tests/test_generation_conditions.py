"""Images under conditions: seeds, sizes, reruns, strict run folders, and the command as a user calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ether_diffusion.adapters.attach import attach, trainable_parameters
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.data.condition_kind import ConditionKind, read_condition_kind, save_condition_kind
from ether_diffusion.data.conditions import to_hint
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.errors import UserError
from ether_diffusion.generation import (
    ControllableSampling,
    Job,
    fitting_size,
    load_pipeline,
    pair_sources,
    read_run,
    sample_images,
)
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.controllable_pipeline import ControllablePipeline
from ether_diffusion.models.module_files import save_module
from ether_diffusion.pictures import read_settings
from ether_diffusion.randomness import generator
from ether_diffusion.tinyworld.layouts import write_ade20k_splits
from ether_diffusion_cli import main

FAST = ControllableSampling(steps=2)
NAMES = [f"ADE_val_{number:08d}" for number in (1, 2, 3)]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenes of the miniature's world, in ADE20K's layout with a palette and captions of their own."""
    first = 30_000_000
    return write_ade20k_splits(tmp_path_factory.mktemp("data") / "scenes", {"validation": range(first, first + 3)})


@pytest.fixture(scope="session")
def pairs(scenes: Path) -> Pairs:
    return find_pairs(scenes, split="validation")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, pairs: Pairs) -> Path:
    """A controllable run as training leaves it, of random weights that a condition and an adapter show in."""
    folder = tmp_path_factory.mktemp("run") / "controllable"
    base = load_base("tiny")
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    noise = generator(0, "weights")
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(generator=noise)
    attach(base.unet, EtherPlusSettings(target="attention+geglu"))
    for parameter in trainable_parameters(base.unet).values():
        parameter.data += torch.randn(parameter.shape, generator=noise)
    save_module(encoder, folder / "condition_encoder")
    save_condition_kind(ConditionKind.of(pairs), folder / "condition_encoder")
    save_adapter(base.unet, folder / "adapter", base_model="tiny")
    (folder / "config.yaml").write_text("base_model: tiny\nadapter: {method: ether_plus}\n")
    return folder


@pytest.fixture
def own_run(run_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(run_folder, tmp_path / "own"))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """`ether-diffusion generate` in this process: its exit code, what it printed, and its lines of errors."""

    def generate(*arguments: str | Path) -> tuple[int, str, list[str]]:
        code = main(["generate", "--steps", "2", *map(str, arguments)])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if line.startswith("ether-diffusion: ")]
        return code, printed.out, errors

    return generate


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image).astype(int)


def jobs_of(pairs: Pairs) -> list[Job]:
    return [
        Job(source.prompt, condition=source.name, hint=to_hint(source.open().condition))
        for source in pair_sources(pairs, 64)
    ]


def images_of(
    run: Path, jobs: list[Job], sampling: ControllableSampling = FAST, *, batch_size: int = 1, **options: Any
) -> dict[tuple[str | None, int], np.ndarray]:
    pipeline, _ = load_pipeline(run, **options)
    assert isinstance(pipeline, ControllablePipeline)
    sampled = sample_images(pipeline, jobs, sampling, seed=3, batch_size=batch_size)
    return {(job.condition, job.k): pixels(image) for job, image in sampled}


def test_batches_order_and_images_of_other_sizes_change_nothing(run_folder: Path, pairs: Pairs) -> None:
    first, second, third = jobs_of(pairs)
    wide = Job("a red ball", condition="wide", hint=torch.rand(3, 64, 96, generator=generator(0, "hint")))
    again = replace(first, k=1)
    alone = images_of(run_folder, [first, second, third, wide, again])
    together = images_of(run_folder, [wide, again, third, second, first], batch_size=3)
    assert alone[("wide", 0)].shape == (64, 96, 3)
    # Other batch shapes round differently in the last bit of a float: at most one level of 255.
    assert all(np.abs(alone[key] - together[key]).max() <= 1 for key in alone)
    assert np.abs(alone[(first.condition, 0)] - alone[(first.condition, 1)]).max() > 8


def test_the_condition_changes_the_image_and_without_it_and_the_adapter_it_is_the_bases(
    run_folder: Path, pairs: Pairs
) -> None:
    job = jobs_of(pairs)[0]
    key = (job.condition, 0)
    image = images_of(run_folder, [job])[key]
    assert job.hint is not None
    swapped = images_of(run_folder, [replace(job, hint=1 - job.hint)])[key]
    late = images_of(run_folder, [job], FAST.model_copy(update={"condition_start": 0.5}))[key]
    assert min(np.abs(image - swapped).max(), np.abs(image - late).max()) > 8
    assert np.abs(images_of(run_folder, [job], merged=True)[key] - image).max() <= 1

    blind = images_of(run_folder, [job], FAST.model_copy(update={"condition_scale": 0.0}), scale=0.0)[key]
    pipeline: Any = load_base("tiny").pipeline()
    pipeline.set_progress_bar_config(disable=True)
    noise = generator(3, f"image/{job.condition}")
    base = pipeline(job.prompt, num_inference_steps=2, guidance_scale=9.0, generator=noise).images[0]
    assert np.array_equal(pixels(base), blind)


def test_a_data_set_is_generated_completed_and_never_mixed(
    run_folder: Path, scenes: Path, tmp_path: Path, call: Callable[..., tuple[int, str, list[str]]]
) -> None:
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    command = ["--adapter", run_folder, "--dataset", data, "--output", tmp_path / "out"]
    code, printed, _ = call(*command, "--batch-size", "2", "--compare")
    assert code == 0
    assert "label maps of 23 classes" in printed
    files = [tmp_path / f"out/images/{name}.png" for name in NAMES]
    rows = [json.loads(line) for line in (tmp_path / "out/images.jsonl").read_text().splitlines()]
    captions = [json.loads(line)["prompt"] for line in (data / "captions/validation.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"images/{name}.png" for name in NAMES]
    assert [row["prompt"] for row in rows] == captions
    assert (rows[0]["scheduler"], rows[0]["guidance"], rows[0]["seed"]) == ("ddim", 9.0, 0)
    settings = read_settings(files[0])
    assert settings is not None
    assert all(settings[key] == value for key, value in rows[0].items() if key != "file")
    assert {"adapter", "condition_encoder", "condition"} < settings.keys()
    assert (tmp_path / "out/grid.png").exists()
    assert (tmp_path / "out/contact_sheet.png").exists()
    assert np.abs(pixels(files[0]) - pixels(tmp_path / f"out/before/images/{NAMES[0]}.png")).max() > 8

    whole, times = pixels(files[1]), [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(files[1].read_bytes()[:200])  # cut short, as by a full disk
    assert call(*command, "--batch-size", "2")[0] == 0
    assert [file.stat().st_mtime_ns == time for file, time in zip(files, times, strict=True)] == [True, False, True]
    assert np.abs(pixels(files[1]) - whole).max() <= 1  # it is alone in its batch this time

    code, _, errors = call(*command, "--seed", "1")
    assert (code, len(errors)) == (2, 1)
    assert "was made with --seed 0, not 1. Choose another --output" in errors[0]
    label_map = data / f"annotations/validation/{NAMES[2]}.png"
    Image.fromarray(255 - np.clip(np.asarray(Image.open(label_map)), 232, None)).save(label_map)
    code, _, errors = call(*command)
    assert (code, len(errors)) == (2, 1)
    assert f"{NAMES[2]}.png was made with condition = " in errors[0]


def test_label_maps_painted_maps_and_photos_are_recognised(
    run_folder: Path, pairs: Pairs, tmp_path: Path, call: Callable[..., tuple[int, str, list[str]]]
) -> None:
    pair, palette = pairs.pairs[0], pairs.palette
    assert pair.condition is not None
    assert pair.image is not None
    assert palette is not None
    labels = Image.open(pair.condition).resize((192, 128), Image.Resampling.NEAREST)
    images = {}
    for kind, image, kind_in_words in (
        ("grey", labels, "a label map of 23 classes"),
        ("painted", Image.fromarray(palette[np.asarray(labels)]), "a map painted with the palette of 23 classes"),
    ):
        (tmp_path / kind).mkdir()
        image.save(tmp_path / kind / "map.png")
        command = [
            "--condition",
            tmp_path / kind / "map.png",
            "--prompt",
            "a dog",
            "--output",
            tmp_path / f"{kind}-out",
        ]
        code, out, _ = call("--adapter", run_folder, *command)
        assert code == 0
        assert f"read as {kind_in_words}, images of 96 x 64" in out
        (file,) = (tmp_path / f"{kind}-out").glob("map-*.png")
        images[kind] = pixels(file)
    assert images["grey"].shape == (64, 96, 3)
    assert np.array_equal(images["grey"], images["painted"])

    photo = ["--condition", pair.image, "--prompt", "a dog", "--height", "64", "--width", "80"]
    code, _, errors = call("--adapter", run_folder, *photo, "--output", tmp_path / "photo")
    assert (code, len(errors)) == (2, 1)
    assert "name a preprocessor" in errors[0]
    assert not (tmp_path / "photo").exists()
    code, out, _ = call("--adapter", run_folder, *photo, "--output", tmp_path / "photo", "--preprocessor", "canny")
    assert code == 0
    assert "read as a photo, through canny, images of 80 x 64" in out
    assert "was trained on labels, not on --preprocessor canny" in out


def test_a_folder_of_conditions_is_combined_with_each_prompt(
    run_folder: Path, scenes: Path, tmp_path: Path, call: Callable[..., tuple[int, str, list[str]]]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red ball\n")
    maps = scenes / "annotations/validation"
    arguments = ["--condition", maps, "--prompts", prompts, "--num-images", "2", "--output", tmp_path / "out"]
    code, out, _ = call("--adapter", run_folder, *arguments)
    assert code == 0
    assert f"{maps}: 3 files read as a label map of 23 classes, images of 64 x 64" in out
    assert len(list((tmp_path / "out").glob("ADE_val_*.png"))) == 3 * 2 * 2
    assert len(list((tmp_path / "out").glob(f"{NAMES[0]}-a-dog-*-01.png"))) == 1


def test_a_run_trained_on_edges_preprocesses_photos(
    own_run: Path, pairs: Pairs, tmp_path: Path, call: Callable[..., tuple[int, str, list[str]]]
) -> None:
    save_condition_kind(ConditionKind("canny"), own_run / "condition_encoder")
    arguments = ["--condition", str(pairs.pairs[0].image), "--prompt", "a dog", "--output", tmp_path / "out"]
    code, out, _ = call("--adapter", own_run, *arguments)
    assert code == 0
    assert "read as a photo, through canny" in out
    assert "Note" not in out


def test_arguments_that_exclude_each_other_are_refused_in_one_line(
    run_folder: Path, scenes: Path, tmp_path: Path, call: Callable[..., tuple[int, str, list[str]]]
) -> None:
    label_map = scenes / f"annotations/validation/{NAMES[0]}.png"
    data, condition, prompt = ["--dataset", scenes], ["--condition", label_map], ["--prompt", "a dog"]
    plain = tmp_path / "plain"
    shutil.copytree(run_folder / "adapter", plain / "adapter")
    other = Path(shutil.copytree(scenes, tmp_path / "other"))
    table = (other / "color23.csv").read_text().splitlines()
    (other / "color23.csv").write_text("\n".join([table[0], "1,1,2,3,wall", *table[2:]]))
    for run, arguments, message in (
        (plain, [*condition, *prompt], "--condition needs a controllable run"),
        (plain, [*prompt, "--condition-scale", "0.5"], "--condition-scale needs a controllable run"),
        (plain, [], "give --prompt TEXT"),
        (run_folder, prompt, "follows conditions: give --dataset DIR, or --condition FILE"),
        (run_folder, [*data, *condition], "follows conditions"),
        (run_folder, [*data, *prompt], "leave out --prompt"),
        (run_folder, [*data, "--width", "96"], "leave out --width"),
        (run_folder, [*data, "--split", "testing"], "'testing'"),
        (run_folder, ["--dataset", other], "its maps have other colours"),
        (run_folder, condition, "--condition needs --prompt TEXT"),
        (run_folder, [*condition, *prompt, "--split", "validation"], "--split needs --dataset"),
        (run_folder, [*condition, *prompt, "--height", "60"], "--height: 60 is not a multiple of"),
        (run_folder, [*condition, *prompt, "--condition-start", "1"], "--condition-start 1 must be below"),
        (run_folder, ["--condition", tmp_path / "no.png", *prompt], "no such file"),
        (run_folder, ["--condition", plain, *prompt], "no image in it"),
    ):
        code, _, errors = call("--adapter", run, *arguments, "--output", tmp_path / "out")
        assert code == 2, arguments
        assert len(errors) == 1, errors
        assert message in errors[0]
    code, _, errors = call("--base-model", "tiny", *condition, *prompt, "--output", tmp_path / "out")
    assert (code, len(errors)) == (2, 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["condition_encoder/diffusion_pytorch_model", "adapter/adapter_model"])
@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_both_parts_of_a_run_are_loaded_strictly(own_run: Path, part: str, damage: str) -> None:
    path = own_run / f"{part}.safetensors"
    tensors = load_file(path)
    key = min(tensors)
    if damage == "missing":
        del tensors[key]
    elif damage == "extra":
        tensors["one.more"] = torch.zeros(1)
    else:
        tensors[key] = tensors[key][..., :-1].contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="does not fit") as caught:
        load_pipeline(own_run)
    assert "\n" not in str(caught.value)


def test_a_missing_part_of_a_run_is_an_error(own_run: Path) -> None:
    encoder_alone = own_run / "condition_encoder"
    shutil.move(own_run / "adapter", own_run / "gone")
    with pytest.raises(UserError, match="adapter is not a folder"):
        read_run(own_run)
    (own_run / "config.yaml").write_text("base_model: tiny\nadapter: {method: none}\n")
    for path in (own_run, encoder_alone):
        run = read_run(path)
        assert (run.adapter, run.condition_encoder, run.base_model) == (None, encoder_alone, "tiny")
        pipeline, saved = load_pipeline(path)
        assert isinstance(pipeline, ControllablePipeline)
        assert saved is None


def test_runs_and_their_parts_are_found_from_every_folder(run_folder: Path) -> None:
    for path in (run_folder, run_folder / "adapter", run_folder / "condition_encoder"):
        run = read_run(path)
        assert run.adapter is not None
        assert run.adapter.folder == run_folder / "adapter"
        assert run.condition_encoder == run_folder / "condition_encoder"
        assert run.config["adapter"] == {"method": "ether_plus"}


def test_inspect_describes_both_parts(own_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(own_run)]) == 0
    printed = capsys.readouterr().out
    assert "ETHER+" in printed
    assert "labels of 23 classes" in printed
    shutil.rmtree(own_run / "adapter")
    (own_run / "config.yaml").write_text("base_model: tiny\nadapter: {method: none}\n")
    assert main(["inspect", str(own_run)]) == 0
    printed = capsys.readouterr().out
    assert "ETHER+" not in printed
    assert "base model         tiny" in printed


def test_the_kind_of_conditions_is_saved_with_the_encoder(pairs: Pairs, tmp_path: Path) -> None:
    save_condition_kind(ConditionKind.of(pairs), tmp_path)
    kind = read_condition_kind(tmp_path)
    assert kind is not None
    assert (kind.kind, kind.names) == ("labels", pairs.names)
    assert kind.same_colours(pairs.palette)
    assert not kind.same_colours(ConditionKind().colours)
    (tmp_path / "condition.json").write_text('{"kind": "labels", "palette": ["00"], "names": []}')
    with pytest.raises(UserError, match=r"condition\.json: cannot be read"):
        read_condition_kind(tmp_path)
    assert read_condition_kind(tmp_path / "nowhere") is None


def test_images_keep_their_conditions_proportions() -> None:
    def size(condition: tuple[int, int], height: int | None = None, width: int | None = None) -> tuple[int, int]:
        return fitting_size(condition, resolution=512, multiple=64, height=height, width=width)

    assert size((683, 512)) == (704, 512)
    assert size((300, 400)) == (512, 704)
    assert size((3000, 500)) == (1024, 512)
    assert size((10, 2000)) == (512, 1024)
    assert size((683, 512), width=1024) == (1024, 768)
    assert size((683, 512), height=256, width=320) == (320, 256)
    with pytest.raises(UserError, match="--width: 100 is not a multiple of 64 pixels; try 64 or 128"):
        size((683, 512), width=100)


def test_the_papers_sampling_is_the_default() -> None:
    sampling = ControllableSampling()
    assert (sampling.scheduler, sampling.steps, sampling.guidance, sampling.condition_scale) == ("ddim", 50, 9.0, 1.0)
