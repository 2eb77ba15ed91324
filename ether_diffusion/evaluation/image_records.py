"""Images to score: what their folder's images.jsonl records of them, checked against the protocol, and their faults."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from torch import nn

from ether_diffusion.adapters.saved_adapter import SavedAdapter
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.files import Digest
from ether_diffusion.generation import SavedRun, load_pipeline
from ether_diffusion.input_files import read_text
from ether_diffusion.models.families.table import denoiser_of, family_of
from ether_diffusion.models.module_files import module_digest
from ether_diffusion.models.saved_modules import UNET, SavedModule

from .protocols import MapProtocol, Protocol, SubjectProtocol
from .results import UNRECORDED

LIST = "images.jsonl"

OWN = ("file", "name", "prompt", "k", "width", "height", "condition", "fault")
"""The keys of a row that differ from image to image."""


def read_list(
    folder: Path, protocol: SubjectProtocol | MapProtocol | None = None, needed: Sequence[str] = ("file",)
) -> list[dict[str, Any]]:
    """The rows of a folder's list in their order, one for each image.

    Args:
        protocol: If given, the seed, resolution and sampling that rows record must be the protocol's. The seed is that
            of the whole set: an image's noise depends on it, on its prompt or scene, and on k.
        needed: Keys that every row must have.

    Raises:
        UserError: a line that is no JSON object with these keys; a file outside the folder; or the first setting that
            differs from the protocol's.
    """
    path, rows = folder / LIST, []
    lines = read_text(path).removesuffix("\n").split("\n")  # a prompt may hold any other separator of lines
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not all(isinstance(row[key], str) for key in needed):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number}: expected a JSON object with {' and '.join(needed)} as text.") from None
        if Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts:
            raise UserError(f"{path}:{number}: {row['file']} is outside the folder.")
        if protocol is not None:
            _check_generation(f"{path}:{number}", row, protocol)
        rows.append(row)
    return rows


def unrecorded(protocol: SubjectProtocol | MapProtocol, facts: Mapping[str, Any]) -> dict[str, str]:
    """The generation settings that facts lack, in words, under `not_told`. The resolution can be seen in the images."""
    stated = _generation(protocol)
    missing = [key for key in stated if facts.get(key) is None]
    if not missing:
        return {}
    return {UNRECORDED: "settings" if len(missing) == len(stated) else ", ".join(missing)}


def common(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts that all rows share."""
    first = dict(rows[0]) if rows else {}
    return {key: v for key, v in first.items() if key not in OWN and all(row.get(key) == v for row in rows)}


def run_facts(run: SavedRun, pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What images.jsonl records of the run that generates images: base, method, and digests of what was trained."""
    saved = run.adapter
    facts = {"base_model": run.base_model, "base_sha256": base_digest(base_of(pipeline, saved))}
    if run.condition_encoder is not None:
        facts["condition_encoder"] = module_digest(run.condition_encoder)
    if saved is None:
        return {**facts, "method": "condition encoder alone"}
    return {**facts, "method": saved.method, "parameters": saved.parameters, "adapter": saved.digest}


def open_image(file: Path, protocol: Protocol) -> Image.Image:
    """Open an image. Raises UserError if it cannot be read or is not of the protocol's size."""
    image, side = open_photo(file), protocol.resolution
    if image.size != (side, side):
        raise UserError(f"{file}: {image.width} x {image.height}; {protocol.name} states {side} x {side}.")
    return image


def is_black(image: Image.Image) -> bool:
    """Whether every pixel is black, as NaN or a safety checker leaves an image."""
    return image.convert("RGB").getbbox() is None


def faults(expected: int, images: int, black: int, digests: Iterable[str]) -> dict[str, int]:
    """Counts of images and faults; `digests` are the `pixel_digest`s of the images that are not black."""
    seen = list(digests)
    return {
        "images": images,
        "expected": expected,
        "black": black,
        "missing": expected - images,
        "duplicate": len(seen) - len(set(seen)),
    }


def _check_generation(where: str, row: Mapping[str, Any], protocol: SubjectProtocol | MapProtocol) -> None:
    for key, stated in {"resolution": protocol.resolution, **_generation(protocol)}.items():
        if row.get(key) not in (None, stated):
            found = f"{row['file']} was generated with {key} {row[key]!r}"
            raise UserError(f"{where}: {found}; {protocol.name} states {stated!r}.")


def _generation(protocol: SubjectProtocol | MapProtocol) -> dict[str, Any]:
    return {"seed": protocol.seed, **protocol.sampling.model_dump(mode="json")}


def base_of(pipeline: DiffusionPipeline, saved: SavedAdapter | SavedModule | None) -> DiffusionPipeline:
    """The base that a run was trained on: the run's own pipeline, or a fresh one if the run trained the whole UNet."""
    if not isinstance(saved, SavedModule) or saved.kind is not UNET:
        return pipeline
    dtype = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(denoiser_of(pipeline).dtype, "fp32")
    options: dict[str, Any] = {"base_model": saved.base_model, "revision": saved.revision, "vae": saved.vae}
    return load_pipeline(None, device="cpu", dtype=dtype, **options)[0]


def base_digest(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the weights of denoiser, VAE and text encoders, by name, shape and value in fp32.

    An attached adapter is left out. A merged one is part of the weights.
    """
    digest = Digest()
    for part in family_of(pipeline).modules:
        module = getattr(pipeline, part)
        for name, tensor in sorted(_base_weights(module).items()) if module is not None else ():
            value = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(f"{part}.{name}{tuple(value.shape)}", value.numpy().tobytes())
    return digest.hex()


def _base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the names that they have without adapters."""
    adapters: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            adapters |= {f"{name}.{own}." for own in (*layer.adapter_layer_names, *layer.other_param_names)}
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(prefix) for prefix in adapters)
    }
