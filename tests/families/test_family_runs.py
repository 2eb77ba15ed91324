"""Whole DreamBooth runs of each family: trained, resumed, cached, generated from, exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

from ether_diffusion.errors import UserError
from ether_diffusion.exporting import export
from ether_diffusion.exporting.hub_folder import write_hub_folder
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.training import dreambooth
from ether_diffusion_cli import main
from support.benchmark_folders import write_protocol
from support.pipelines import SIDE
from support.runs import assert_same_run, difference, losses, stopped_after, trained_weights, weights

FAMILIES = ["sd2", "sdxl", "sd3", "flux", "flux schnell", "z-image"]
TEXT = ["sd2", "sdxl", "sd3", "flux"]
FolderOf = Callable[[str], Path]


def settings(base: Path, **more: Any) -> list[str]:
    given = {
        "base_model": base,
        "data.resolution": SIDE,
        "data.prior.sampling.scheduler": "euler",
        "validation.prompts": "[a qwe toy]",
        "validation.sampling.scheduler": "euler",
        "training.steps": 4,
        "training.checkpoint_every": 2,
        "training.learning_rate": 0.01,
        **more,
    }
    return [f"{key}={value}" for key, value in given.items()]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_resumes_bit_for_bit_caches_and_generates(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = settings(folder_of(name))
    dreambooth.run(make_config(tmp_path / "run", *common))
    printed = capsys.readouterr().out
    assert "attention layers, " in next(line for line in printed.splitlines() if line.startswith("Reach:"))
    assert "Certified:" in printed
    stopped_after(tmp_path / "run", 2, tmp_path / "resumed")
    dreambooth.run(make_config(tmp_path / "resumed", *common, "training.resume=true"))
    assert_same_run(tmp_path / "run", tmp_path / "resumed", "step-000004")

    cached = [f"data.cache_dir={tmp_path / 'cache'}", "data.cache=true", "data.crop=center", "validation.prompts=[]"]
    for folder in ("cached", "read"):
        dreambooth.run(make_config(tmp_path / folder, *common, *cached))
    dreambooth.run(make_config(tmp_path / "plain", *common, "data.crop=center", "validation.prompts=[]"))
    assert losses(tmp_path / "cached") == losses(tmp_path / "read")
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)

    pipeline, saved = load_pipeline(tmp_path / "run", device="cpu")
    sampling = Sampling(scheduler="euler", steps=2, guidance=3.0)
    [(_, image)] = sample_images(pipeline, jobs_for(["a qwe toy"], 1), sampling, seed=0, resolution=SIDE)
    assert image.size == (SIDE, SIDE)
    assert saved is not None
    assert main(["inspect", str(tmp_path / "run"), "--base", str(folder_of(name))]) == 0
    assert "equal to the base that it was made for" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in FAMILIES for text in (False, True) if name != "z-image" or not text],  # no adapter there
)
def test_half_precision_with_checkpointing_comes_near_the_plain_run(
    name: str, text: bool, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    """As the shipped configs train, with validation images in between."""
    common = settings(folder_of(name), **{"data.prior": "null", "adapter.text_encoder": str(text).lower()})
    dreambooth.run(make_config(tmp_path / "plain", *common))
    AcceleratorState._reset_state()
    half = ["training.mixed_precision=bf16", "training.gradient_checkpointing=true"]
    dreambooth.run(make_config(tmp_path / "half", *common, *half))
    AcceleratorState._reset_state()
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "plain"), rel=0.05)
    assert {tensor.dtype for tensor in trained_weights(tmp_path / "half").values()} == {torch.float32}
    assert len(list((tmp_path / "half/samples").glob("*.png"))) == len(list((tmp_path / "plain/samples").glob("*.png")))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_a_lora_file_of_the_whole_adapter_makes_the_same_images_in_plain_diffusers(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    common = settings(folder_of(name), **{"adapter.text_encoder": "true", "validation.prompts": "[]"})
    dreambooth.run(make_config(tmp_path / "run", *common))
    parts = {key.split("/")[1] for key in trained_weights(tmp_path / "run") if key.count("/") > 1}
    assert parts == ({"text_encoder", "text_encoder_2"} if name in ("sdxl", "sd3") else {"text_encoder"})
    ours, _ = load_pipeline(tmp_path / "run", device="cpu")
    formats = ["diffusers"] if name in ("sd3", "flux") else ["kohya", "diffusers"]
    for format in formats:
        file = tmp_path / ("lora.safetensors" if format == "kohya" else "lora")
        export(tmp_path / "run", format, file, dtype="fp32")
        plain = DiffusionPipeline.from_pretrained(folder_of(name))
        before = image(plain)
        plain.load_lora_weights(file)
        assert np.abs(image(plain) - image(ours)).max() < 2e-4
        assert np.abs(before - image(ours)).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_merged_model_and_a_published_lora_make_the_same_images(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *settings(folder_of(name), **{"validation.prompts": "[]"})))
    ours, _ = load_pipeline(tmp_path / "run", device="cpu")
    expected = image(ours)
    export(tmp_path / "run", "merged", tmp_path / "merged", dtype="fp32")
    assert np.abs(image(DiffusionPipeline.from_pretrained(tmp_path / "merged")) - expected).max() < 2e-4
    with pytest.raises(UserError, match=r"^--output .*: single files are written of Stable Diffusion v1, "):
        export(tmp_path / "run", "merged", tmp_path / "merged.safetensors")
    hub = write_hub_folder(tmp_path / "run", "me/toy", tmp_path / "hub")
    plain = DiffusionPipeline.from_pretrained(folder_of(name))
    plain.load_lora_weights(hub.files["toy.safetensors"])
    assert np.abs(image(plain) - expected).max() < 5e-3  # the file is fp16
    card = hub.files["README.md"].read_text()
    assert "DiffusionPipeline.from_pretrained(" in card
    assert f"ether_diffusion.load_adapter(pipeline.{'unet' if name == 'sdxl' else 'transformer'}, " in card


def image(made: Any) -> np.ndarray:
    made.set_progress_bar_config(disable=True)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    plain = type(made).__name__.startswith("StableDiffusion") and "3" not in type(made).__name__
    if plain:
        from diffusers import DDIMScheduler

        made.scheduler = DDIMScheduler.from_config(made.scheduler.config, clip_sample=False)
    return made("a photo of qwe toy", generator=torch.Generator().manual_seed(5), **options).images[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "z-image"])
def test_runs_in_shared_passes_are_those_alone(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    common = settings(folder_of(name), **{"validation.prompts": "[]", "training.epsilon": 1e-4})

    def configs(folder: Path) -> list[Any]:
        return [make_config(folder / str(seed), *common, f"seed={seed}") for seed in (0, 1)]

    dreambooth.run_many(configs(tmp_path / "together"))
    for config in configs(tmp_path / "alone"):
        dreambooth.run(config)
    for seed in ("0", "1"):
        together, alone = (losses(tmp_path / kind / seed) for kind in ("together", "alone"))
        assert together == pytest.approx(alone, rel=1e-3)
        assert difference(weights(tmp_path / "together" / seed), weights(tmp_path / "alone" / seed)) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux schnell", "z-image"])
def test_a_run_is_scored_under_a_protocol(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    """With the protocol's own sampler, dpm++, whatever the base was trained by."""
    dreambooth.run(make_config(tmp_path / "run", *settings(folder_of(name), **{"data.prior": "null"})))
    protocol = write_protocol(tmp_path, base_model=None)
    assert main(["score", str(tmp_path / "run"), "--protocol", str(protocol), "--device", "cpu"]) == 0
    [results] = (tmp_path / "run").rglob("results.json")
    assert len(list(results.parent.rglob("*.png"))) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3", "flux", "z-image"])
def test_a_transformer_has_no_kohya_file_and_says_what_to_take(
    name: str, make_config: Callable[..., Any], folder_of: FolderOf, tmp_path: Path
) -> None:
    dreambooth.run(make_config(tmp_path / "run", *settings(folder_of(name), **{"data.prior": "null"})))
    with pytest.raises(UserError, match=r"^--format kohya: .* take --format diffusers") as caught:
        export(tmp_path / "run", "kohya", tmp_path / "lora.safetensors")
    assert "\n" not in str(caught.value)
    assert export(tmp_path / "run", "diffusers", tmp_path / "lora", dtype="fp32").error < 2e-5
