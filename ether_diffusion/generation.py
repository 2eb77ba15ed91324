"""Images from prompts and a saved adapter: assembles a pipeline, draws, and keeps what is complete."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from pydantic import NonNegativeFloat, PositiveInt

from .adapters.attach import merge, set_scale
from .adapters.storage import TEXT_ENCODER, SavedAdapter, load_adapter, read_adapter
from .config import Settings
from .errors import UserError
from .models.bases import check_resolution, load_base
from .models.quantized import check_quantization, quantize
from .pictures import read_settings, save_png, sheet
from .progress import progress_bar
from .randomness import generator
from .version import __version__

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


class Sampling(Settings):
    """How an image is drawn. The defaults are the paper's for subject-driven generation."""

    scheduler: Literal["dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"] = "dpm++"
    steps: PositiveInt = 25
    guidance: NonNegativeFloat = 7.5
    """Classifier-free guidance scale; 1 and below: none."""
    negative_prompt: str = ""


@dataclass(frozen=True)
class Job:
    """One image: the k-th of a prompt."""

    prompt: str
    k: int
    file: str


def pick_device(device: str | None = None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    if device:
        try:
            chosen = torch.device(device)
            torch.empty(0, device=chosen)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}).") from error
        return chosen
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype:
    """The dtype asked for (fp32, fp16, bf16), else fp16 on CUDA and fp32 elsewhere."""
    if dtype:
        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    return torch.float16 if device.type == "cuda" else torch.float32


def load_pipeline(
    adapter: str | Path | None = None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    vae: str | None = None,
    allow_pickle: bool = False,
    scale: float = 1.0,
    merged: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    resolution: int | None = None,
    quantization: str | None = None,
    offload: Literal["none", "model", "sequential"] = "none",
) -> tuple[StableDiffusionPipeline, SavedAdapter | None]:
    """A diffusers pipeline with a saved adapter in it, ready to draw.

    Args:
        adapter: A run folder, a checkpoint folder or a PEFT folder; None: the base alone.
        base_model: Hub name, folder, single file or `tiny`; default: the one the adapter names, in its revision.
        revision: Branch, tag or commit of a hub name.
        vae: Another VAE than the base's own; default: the one that the adapter was trained with.
        allow_pickle: Let a `.ckpt` run code of its own while it is read. Never taken from a run.
        scale: The adapter's strength: 0 the base, 1 as trained.
        merged: Write the adapter into the base's weights: no extra work an image, no way back.
        device, dtype: Default: CUDA in fp16, else MPS or the CPU in fp32.
        resolution: Side of the images to come, checked against what the base can draw.
        quantization: Of the UNet's linear layers, as for `quantize`; None: as they were saved.
        offload: Where parts wait that do not run: on the device (`none`), or on the CPU, whole models (`model`) or
            layers (`sequential`), as in diffusers.

    Returns:
        The pipeline, without a safety checker, and what is known of the adapter.

    Raises:
        UserError: no adapter there, no such base, or the two do not fit; or settings that exclude each other.
    """
    check_quantization(quantization)
    if quantization is not None and merged:
        raise UserError("--merge cannot write into quantised weights. Leave out --merge, or --quantization.")
    if quantization is not None and offload == "sequential":
        raise UserError("--offload sequential and --quantization exclude each other. Take --offload model.")
    saved = read_adapter(adapter) if adapter is not None else None
    name = base_model or (saved.base_model if saved else None)
    if not name:
        raise UserError("No base model: the adapter does not name one. Say which with --base-model.")
    chosen = pick_device(device)
    if offload != "none" and chosen.type == "cpu":
        raise UserError(f"--offload {offload} keeps parts away from an accelerator, and the device is the CPU already.")
    if saved is not None:
        vae = vae or saved.vae
        revision = revision or (saved.revision if name == saved.base_model else None)
    base = load_base(name, pick_dtype(chosen, dtype), revision=revision, vae=vae, allow_pickle=allow_pickle)
    if quantization is not None:
        quantize(base.unet, quantization, chosen)
    if resolution is not None:
        check_resolution(resolution, base, "--resolution")
    if saved is not None:
        carriers: list[torch.nn.Module] = [base.unet]
        load_adapter(base.unet, saved.folder)
        if (saved.folder / TEXT_ENCODER).is_dir():
            load_adapter(base.text_encoder, saved.folder / TEXT_ENCODER)
            carriers.append(base.text_encoder)
        for model in carriers:
            if scale != 1:
                set_scale(model, scale)
            if merged:
                merge(model)
    pipeline = base.pipeline()
    if offload == "model":
        pipeline.enable_model_cpu_offload(device=chosen)
    elif offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=chosen)
    else:
        pipeline.to(chosen)
    return pipeline, saved


def jobs_for(prompts: Sequence[str], images_per_prompt: int) -> list[Job]:
    """Every image of every prompt, each with its file name."""
    digits = max(2, len(str(len(prompts) - 1)))
    return [
        Job(prompt, k, f"{row:0{digits}d}-{_slug(prompt)}-{k:02d}.png")
        for row, prompt in enumerate(prompts)
        for k in range(images_per_prompt)
    ]


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline,
    jobs: Sequence[Job],
    sampling: Sampling,
    *,
    seed: int,
    resolution: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[tuple[Job, Image.Image]]:
    """Draw the jobs in order. An image depends on (seed, prompt, k), not on its batch or its place in the list.

    Numbers that are NaN become black, and `fault` tells of them.
    """
    pipeline.scheduler = make_scheduler(sampling.scheduler, pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        with _matching_dtypes(pipeline):
            output: Any = pipeline(
                prompt=[job.prompt for job in batch],
                negative_prompt=[sampling.negative_prompt] * len(batch),
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                height=resolution,
                width=resolution,
                eta=0.0,
                generator=[generator(seed, f"image/{job.prompt}", job.k) for job in batch],
                output_type="pt",
            )
        yield from zip(batch, _to_images(pipeline, output.images), strict=True)
        if progress:
            progress(len(batch))


def _to_images(pipeline: StableDiffusionPipeline, drawn: torch.Tensor) -> list[Image.Image]:
    """(B, 3, H, W) from 0 to 1, as diffusers itself makes pictures of it, with a mark on those that hold NaN."""
    broken = drawn.isnan().flatten(1).any(1).tolist()
    processor: Any = pipeline.image_processor
    images = processor.numpy_to_pil(processor.pt_to_numpy(drawn.nan_to_num(0.0)))
    for image, is_broken in zip(images, broken, strict=True):
        image.info["nan"] = is_broken
    return images


def fault(image: Image.Image) -> Literal["nan", "black"] | None:
    """What is wrong with an image that was just drawn: NaN somewhere in it, or black all over."""
    if image.info.get("nan"):
        return "nan"
    return None if image.getbbox() else "black"


def _matching_dtypes(pipeline: StableDiffusionPipeline) -> torch.autocast:
    """While training, a half-precision UNet stands between a text encoder and a VAE in full precision."""
    dtype = pipeline.unet.dtype
    mixed = dtype in (torch.float16, torch.bfloat16) and pipeline.vae.dtype != dtype
    # Not `pipeline.device`, which is "meta" where layers are offloaded.
    return torch.autocast(pipeline._execution_device.type, dtype if mixed else torch.bfloat16, enabled=mixed)


def make_scheduler(name: str, config: Any) -> Any:
    """A diffusers scheduler by its short name, with the base's noise schedule."""
    class_name, options = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(dict(config), **options)


def generate(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    output: str | Path,
    *,
    images_per_prompt: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    resolution: int | None = None,
    batch_size: int = 1,
    record: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw prompts into a folder: a PNG an image with its settings inside, `grid.png`, and `images.jsonl`.

    Files that are complete and were made with the same settings are kept. Returns the files in order. One that is
    black or holds NaN says so as its `fault`, in the file and in `images.jsonl`.

    Args:
        record: Facts to keep with each image beside the settings: base, adapter, its digest.

    Raises:
        UserError: the folder holds an image of the same name that was made with other settings.
    """
    sampling, output = sampling or Sampling(), Path(output)
    jobs = jobs_for(prompts, images_per_prompt)
    common = {"seed": seed, "resolution": resolution, **sampling.model_dump(), **(record or {})}
    settings = {job.file: {"prompt": job.prompt, "k": job.k, **common} for job in jobs}
    todo, faults = [], {}
    for job in jobs:
        path = output / job.file
        found = read_settings(path) if path.exists() else None
        if found is not None:
            _check_same(path, found, settings[job.file])
            faults[job.file] = found.get("fault")
        else:
            todo.append(job)
    output.mkdir(parents=True, exist_ok=True)
    kept = len(jobs) - len(todo)
    with progress_bar(len(jobs), "images", "image", initial=kept) as bar:
        drawn = draw(
            pipeline, todo, sampling, seed=seed, resolution=resolution, batch_size=batch_size, progress=bar.update
        )
        for job, image in drawn:
            faults[job.file] = fault(image)
            told = {"fault": faults[job.file]} if faults[job.file] else {}
            save_png(image, output / job.file, {**settings[job.file], **told, "ether_diffusion": __version__})
    rows = [{"file": job.file, **settings[job.file]} for job in jobs]
    rows = [row | ({"fault": faults[row["file"]]} if faults[row["file"]] else {}) for row in rows]
    _write_lines(output / "images.jsonl", [json.dumps(row, ensure_ascii=False) for row in rows])
    save_png(grid(output, jobs), output / "grid.png")
    return [output / job.file for job in jobs]


def grid(folder: Path, jobs: Sequence[Job]) -> Image.Image:
    """One row a prompt."""
    rows: dict[str, list[Image.Image]] = {}
    for job in jobs:
        rows.setdefault(job.file[: -len("-00.png")], []).append(Image.open(folder / job.file).convert("RGB"))
    captions = {job.file[: -len("-00.png")]: job.prompt for job in jobs}
    return sheet([(captions[key], images) for key, images in rows.items()])


def read_prompts(path: str | Path) -> list[str]:
    """Prompts from a text file, one a line; empty lines and lines that start with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error}).") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise UserError(f"--prompts {path}: no prompt in it; expected one a line.")
    return prompts


def _slug(prompt: str) -> str:
    """A short, readable and unambiguous file name part."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words}-{hashlib.blake2b(prompt.encode(), digest_size=3).hexdigest()}".lstrip("-")


def _check_same(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        key = different[0]
        raise UserError(
            f"{path} was made with {key} = {found.get(key)!r}, not {wanted[key]!r}. Choose another --output, or delete "
            "the file."
        )


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    partial.replace(path)
