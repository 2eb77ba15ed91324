"""`ether-diffusion generate`: comparisons with the base for every method, the recorded precision, faulty images."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.adapters.attach import attach, set_scale, trainable_parameters
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import GeneratedImages, Sampling, fault, jobs_for, load_pipeline, sample_images
from ether_diffusion.generation.sampling import SCHEDULERS, make_scheduler
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.condition_encoder import build_condition_encoder
from ether_diffusion.models.controlnet import build_controlnet
from ether_diffusion.models.module_files import save_module
from ether_diffusion.models.saved_modules import CONTROLNET, save_whole_module
from ether_diffusion.pictures import read_settings, save_png
from ether_diffusion.randomness import generator
from ether_diffusion_cli import main
from ether_diffusion_cli.generate_request import default_output, print_images

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PEFT_METHODS = [name for name, method in METHODS.items() if method.peft_type]
QUICK = ("ether_plus", "lora", "dora", "magnitude")  # two with a scale, two without
PROMPT = ["--prompt", "a red ball", "--steps", "1", "--device", "cpu"]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`ether-diffusion generate` with one prompt: exit code, output and errors."""

    def generate(*arguments: object) -> tuple[int, str, str]:
        code = main(["generate", *PROMPT, *map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return generate


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def only_image(folder: Path) -> np.ndarray:
    (file,) = [file for file in folder.glob("*.png") if file.stem not in ("grid", "contact_sheet")]
    return pixels(file)


def save_run(folder: Path, method: str) -> Any:
    """An adapter of random weights on one layer, so strong that every image shows it. Returns the UNet."""
    unet = load_base("tiny").unet
    settings = {"target": [LAYER], **({"after": folder} if method == "magnitude" else {})}
    attach(unet, METHODS[method](**settings))
    noise = generator(0, method)
    for parameter in trainable_parameters(unet).values():
        parameter.data += torch.randn(parameter.shape, generator=noise)
    save_adapter(unet, folder / "adapter", base_model="tiny")
    return unet


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A condition encoder of random weights, whose features every image shows."""
    base, folder = load_base("tiny"), tmp_path_factory.mktemp("encoder") / "condition_encoder"
    encoder = build_condition_encoder(base.unet, base.vae_factor)
    with torch.no_grad():
        encoder.embedding.conv_out.weight.normal_(generator=generator(0, "encoder"))
    save_module(encoder, folder)
    return folder


@pytest.fixture(scope="module")
def condition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label map of two classes of ADE20K's."""
    labels = np.full((64, 64), 3, np.uint8)
    labels[20:, 10:50] = 13
    return save_png(Image.fromarray(labels), tmp_path_factory.mktemp("map") / "map.png")


@pytest.fixture(scope="module")
def base_images(tmp_path_factory: pytest.TempPathFactory, condition: Path) -> dict[str, np.ndarray]:
    """What the base alone generates: of the prompt, and from the noise of the condition."""
    folder = tmp_path_factory.mktemp("base")
    assert main(["generate", *PROMPT, "--base-model", "tiny", "--output", str(folder)]) == 0
    pipeline: Any = load_base("tiny").pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = make_scheduler("ddim", pipeline.scheduler.config)
    noise = generator(0, f"image/{condition.stem}")
    image = pipeline("a red ball", num_inference_steps=1, guidance_scale=9.0, generator=noise).images[0]
    return {"prompt": only_image(folder), "condition": np.asarray(image)}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PEFT_METHODS]
)
def test_a_controllable_run_of_every_method_is_compared_with_the_base(
    method: str, tmp_path: Path, encoder: Path, condition: Path, base_images: dict[str, np.ndarray], call: Any
) -> None:
    """Methods without a scale, too: before is the base without the adapter, not the adapter at scale 0."""
    unet = save_run(tmp_path / "run", method)
    shutil.copytree(encoder, tmp_path / "run/condition_encoder")
    command = ("--adapter", tmp_path / "run", "--condition", condition)
    code, out, errors = call(*command, "--compare", "--output", tmp_path / "images")
    assert (code, errors) == (0, "")
    assert f"Contact sheet: {tmp_path / 'images/contact_sheet.png'}" in out
    assert np.array_equal(only_image(tmp_path / "images/before"), base_images["condition"])
    assert not np.array_equal(only_image(tmp_path / "images"), base_images["condition"])
    try:
        set_scale(unet, 0.5)
    except UserError:
        # A method without a scale refuses any but 1 before anything is generated.
        assert call(*command, "--scale", "0.5", "--output", tmp_path / "half")[0] == 2
        assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("method", ["none", "controlnet"])
def test_a_controllable_run_without_an_adapter_is_compared_with_the_base(
    method: str, tmp_path: Path, encoder: Path, condition: Path, base_images: dict[str, np.ndarray], call: Any
) -> None:
    run, base = tmp_path / "run", load_base("tiny")
    if method == "none":
        shutil.copytree(encoder, run / "condition_encoder")
        (run / "config.yaml").write_text("base_model: tiny\nadapter: {method: none}\n")
    else:
        controlnet = build_controlnet(base.unet, base.vae_factor)
        with torch.no_grad():
            controlnet.controlnet_mid_block.weight.normal_(generator=generator(0, "controlnet"))
        save_whole_module(controlnet, run / CONTROLNET.folder, CONTROLNET, base_model="tiny")
    output = tmp_path / "images"
    code, _, errors = call("--adapter", run, "--condition", condition, "--compare", "--output", output)
    assert (code, errors) == (0, "")
    assert np.array_equal(only_image(output / "before"), base_images["condition"])
    assert not np.array_equal(only_image(output), base_images["condition"])


@pytest.mark.parametrize("method", ["oft", "magnitude"])
def test_a_subjects_run_is_compared_with_the_base(
    method: str, tmp_path: Path, base_images: dict[str, np.ndarray], call: Any
) -> None:
    save_run(tmp_path / "run", method)
    code, _, errors = call("--adapter", tmp_path / "run", "--compare", "--output", tmp_path / "images")
    assert (code, errors) == (0, "")
    assert np.array_equal(only_image(tmp_path / "images/before"), base_images["prompt"])
    assert not np.array_equal(only_image(tmp_path / "images"), base_images["prompt"])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().splitlines()]


def test_the_precision_that_was_used_is_recorded_and_not_mixed(tmp_path: Path, call: Any) -> None:
    output = tmp_path / "images"
    command = ("--base-model", "tiny", "--output", output)
    assert call(*command)[0] == 0
    (file,) = output.glob("00-*.png")
    assert rows(output)[0]["dtype"] == "fp32"
    assert (read_settings(file) or {})["dtype"] == "fp32"
    time = file.stat().st_mtime_ns
    # The same precision by name is the same image; another one is refused, as on a device with another default.
    assert call(*command, "--dtype", "fp32")[0] == 0
    code, _, errors = call(*command, "--dtype", "bf16", "--num-images", "2")
    assert code == 2
    assert "was made with --dtype 'fp32', not 'bf16'. Choose another --output" in errors
    assert [path.stat().st_mtime_ns for path in output.glob("00-*.png")] == [time]
    assert call(*command[:2], "--dtype", "bf16", "--output", tmp_path / "other")[0] == 0
    assert rows(tmp_path / "other")[0]["dtype"] == "bf16"


def test_images_that_record_no_precision_are_kept_and_listed_without_one(tmp_path: Path, call: Any) -> None:
    command = ("--base-model", "tiny", "--output", tmp_path)
    assert call(*command)[0] == 0
    (file,) = tmp_path.glob("00-*.png")
    save_png(Image.open(file), file, {**(read_settings(file) or {}), "dtype": None})
    time = file.stat().st_mtime_ns
    assert call(*command, "--num-images", "2")[0] == 0
    assert file.stat().st_mtime_ns == time
    assert [row["dtype"] for row in rows(tmp_path)] == [None, "fp32"]


def test_faulty_images_are_counted_without_opening_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"{k}.png" for k in range(4)]  # none of them is there
    print_images(GeneratedImages(files, {files[1]: "nan", files[2]: "black", files[3]: "nan"}), tmp_path)
    printed = capsys.readouterr()
    assert printed.out == f"4 images, grid.png and images.jsonl in {tmp_path}\n"
    assert "of 4 images 2 NaN and 1 black; images.jsonl says which. Try --dtype fp32." in printed.err


def listing(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", ["grid.png", "images.jsonl", "00-a-red-ball-{digest}-00.png", "contact_sheet.png"])
def test_files_of_the_user_are_refused_before_anything_is_written(
    tmp_path: Path, call: Any, base_images: dict[str, np.ndarray], name: str
) -> None:
    save_run(tmp_path / "run", "ether_plus")
    (file,) = [job.file for job in jobs_for(["a red ball"], 1)]
    output = tmp_path / "mine"
    save_png(Image.new("RGB", (64, 64), "red"), output / (file if name.startswith("00") else name))
    before = listing(output)
    code, out, errors = call("--adapter", tmp_path / "run", "--compare", "--output", output)
    assert (code, out, len(errors.splitlines())) == (2, "", 1)
    assert "it stays as it is" in errors
    assert listing(output) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", "1001"), "--steps 1001; dpm++ takes 1 to 1000 with this base."),
        (("--scheduler", "pndm"), "--steps 1; pndm takes 4 to 1000 with this base."),
        (("--num-images", str(10**6)), "--num-images 1000000: expected at most 100,000."),
        (("--resolution", str(64 * 10**4)), "--resolution 640000: expected at most 8,192."),
        (("--batch-size", str(10**6)), "--batch-size 1000000: expected at most 1,024."),
        (("--prompt", "word " * 30_000), "a prompt of 150,000 characters; expected at most 100,000."),
        (("--device", "cuda:77"), "device 'cuda:77' cannot be used here"),
    ],
)
def test_numbers_out_of_range_are_one_line_and_write_nothing(
    tmp_path: Path, call: Any, options: tuple[str, ...], message: str
) -> None:
    code, _, errors = call("--base-model", "tiny", "--output", tmp_path / "images", *options)
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert message in errors
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_takes_its_least_number_of_steps(scheduler: Any) -> None:
    pipeline, _ = load_pipeline(base_model="tiny")
    sampling = Sampling(scheduler=scheduler, steps=4 if scheduler == "pndm" else 1)
    ((_, image),) = sample_images(pipeline, jobs_for(["a red ball"], 1), sampling, seed=0)
    assert fault(image) is None


def test_prompts_that_the_encoder_cuts_and_words_that_tiny_does_not_know_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a red ball {'beside a red ball ' * 20}\na red ball\na spaceship over Paris\n")
    arguments = ["generate", "--prompts", str(prompts), "--base-model", "tiny", "--steps", "1", "--num-images", "2"]
    assert main([*arguments, "--output", str(tmp_path / "images")]) == 0
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "1 of 3 prompts exceed the 38 tokens that the text encoder reads" in errors[0]
    assert '"a red ball beside a red ball beside a red ball beside a r…" (83)' in errors[0]
    assert "3 words of the prompts: spaceship, over, paris." in errors[1]


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("runs/a", {"prompt": "A qwe toy, in the snow!"}, "runs/a/images/a-qwe-toy-in-the-snow"),
        ("runs/a/checkpoints/step-000200", {"prompt": "x"}, "runs/a/images/step-000200-x"),
        ("runs/a/adapter", {"prompts": "lists/ten.txt"}, "runs/a/images/ten"),
        ("runs/a", {"condition": "maps/room.png", "prompt": "a b"}, "runs/a/images/room-a-b"),
        (None, {"prompt": "..."}, "images/all"),
    ],
)
def test_images_go_under_the_run_unless_another_place_is_given(path: str, given: dict[str, str], expected: str) -> None:
    none = {"prompt": None, "prompts": None, "condition": None, "dataset": None}
    arguments = Namespace(**{**none, "adapter": [(".", 1.0)], **given})  # one that is here, and not on the hub
    saved: Any = SimpleNamespace(path=Path(path)) if path else None
    assert default_output(arguments, saved) == Path(expected)
