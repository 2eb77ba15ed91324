"""Images drawn under the maps of a data set: found by the names of their scenes, or drawn from a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.pair_files import listed, shown
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.generation import generate_conditioned, load_pipeline, pair_sources, read_run
from ether_diffusion.models.condition_encoder import condition_encoder_digest
from ether_diffusion.models.controlnet import ConditionedPipeline

from .base_digest import base_digest
from .image_lists import LIST, check_sampling, common, read_list
from .protocols import MapProtocol


@dataclass(frozen=True)
class MapImages:
    """Files by the names of their scenes.

    Attributes:
        facts: What they say of how they were made, the same for all.
        prompts: By the names of their scenes, where they say it.
    """

    folder: Path
    files: Mapping[str, Path]
    facts: Mapping[str, Any]
    prompts: Mapping[str, str]

    def open(self, name: str, side: int) -> Image.Image | None:
        """The image of a scene; None if it is missing. Raises UserError for another size."""
        file = self.files.get(name)
        if file is None:
            return None
        image = open_photo(file)
        if image.size != (side, side):
            raise UserError(f"{file}: {image.width} x {image.height}; the protocol has {side} x {side}.")
        return image


def find_map_images(protocol: MapProtocol, folder: str | Path, pairs: Pairs) -> MapImages:
    """The images in a folder that `generate` filled (it lists them in images.jsonl), or of images named as the scenes,
    in the folder itself or in images/.

    Raises:
        UserError: nothing there, a list that cannot be read, images of other scenes or several of one, or images that
            were drawn with other settings than the protocol's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; expected one of images named as the scenes.")
    if (folder / LIST).is_file():
        rows = read_list(folder)
        check_sampling(protocol, folder, rows)
        names = [str(row.get("name", Path(row["file"]).stem)) for row in rows]
        files = {name: folder / row["file"] for name, row in zip(names, rows, strict=True)}
        twice = [name for name in files if names.count(name) > 1]
        if twice:
            raise UserError(f"{folder}: several images of {shown(twice)}; expected one of each scene.")
    else:
        rows, files = [], listed(folder / "images" if (folder / "images").is_dir() else folder)
    scenes = {pair.name for pair in pairs.pairs}
    others = [name for name in files if name not in scenes]
    if others:
        raise UserError(
            f"{folder}: {len(others):,} images of no scene that the protocol takes from {pairs.folder}, split "
            f"{pairs.split}: {shown(others)}."
        )
    prompts = {name: str(row["prompt"]) for name, row in zip(files, rows, strict=False) if "prompt" in row}
    return MapImages(folder, {name: file for name, file in files.items() if file.is_file()}, common(rows), prompts)


def generate_map_images(
    protocol: MapProtocol,
    run: str | Path,
    pairs: Pairs,
    output: str | Path,
    *,
    batch_size: int = 1,
    device: str | None = None,
) -> MapImages:
    """Draw the protocol's scenes from a controllable run into a folder; complete images are kept.

    Raises:
        UserError: no controllable run; another base than the judges know; or the folder holds images that were made
            otherwise.
    """
    saved = read_run(run)
    if saved.condition_encoder is None:
        raise UserError(f"{run}: no condition encoder in it; expected a run of controllable training.")
    if protocol.base_model not in (None, saved.base_model):
        known = f"the judges of {protocol.name} know base {protocol.base_model!r} alone"
        raise UserError(f"{run}: trained on {saved.base_model}; {known}.")
    pipeline, adapter = load_pipeline(run, device=device, resolution=protocol.resolution)
    assert isinstance(pipeline, ConditionedPipeline)
    record = {
        "base_model": saved.base_model,
        "base_sha256": base_digest(pipeline),
        "condition_encoder": condition_encoder_digest(saved.condition_encoder),
        "method": adapter.method if adapter else "condition encoder alone",
    }
    if adapter is not None:
        record |= {"parameters": adapter.parameters, "adapter": adapter.digest}
    generate_conditioned(
        pipeline,
        pair_sources(pairs, protocol.resolution),
        output,
        seed=protocol.seed,
        sampling=protocol.sampling,
        batch_size=batch_size,
        record=record,
    )
    return find_map_images(protocol, output, pairs)
