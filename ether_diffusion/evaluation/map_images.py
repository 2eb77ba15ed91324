"""Scenes of a protocol, and images generated under their label maps: found by the names of scenes, or generated.

Maps, real images and generated ones show the same field of view: short side to the protocol's resolution (images
bicubic with antialiasing, labels nearest), centre crop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ether_diffusion.data.conditions import labels_of, open_raw
from ether_diffusion.data.frames import Frame, scaled_size
from ether_diffusion.data.pair_files import first_names, list_images
from ether_diffusion.data.pairs import Pair, Pairs, find_pairs
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.generation import SavedRun, generate_conditioned, load_pipeline, pair_sources, read_run
from ether_diffusion.models.controlnet import ConditionedPipeline

from .image_records import LIST, common, read_list, run_facts
from .protocols import MapProtocol


def find_scenes(
    protocol: MapProtocol, dataset: str | Path, captions: Path | None = None, caption_template: str | None = None
) -> Pairs:
    """The pairs that the protocol asks for.

    Args:
        dataset: ADEChallengeData2016 or a folder like it, or `builtin:scenes`.
        captions, caption_template: As for `find_pairs`.

    Raises:
        UserError: as `find_pairs`; too few pairs; another number of classes; or a map without a real image.
    """
    pairs = find_pairs(
        dataset,
        split=protocol.split,
        condition="labels",
        captions=captions,
        caption_template=caption_template,
        limit=protocol.images,
    )
    assert pairs.palette is not None
    if len(pairs) < protocol.images:
        found = f"{len(pairs):,} pairs in split {protocol.split!r}"
        raise UserError(f"{dataset}: {found}; {protocol.name} takes {protocol.images:,}.")
    if len(pairs.palette) - 1 != protocol.num_classes:
        classes = len(pairs.palette) - 1
        raise UserError(f"{dataset}: {classes} classes; {protocol.name} has {protocol.num_classes}.")
    lonely = next((pair.name for pair in pairs.pairs if pair.image is None), None)
    if lonely is not None:
        raise UserError(f"{dataset}: {lonely} has no real image; {protocol.name} compares with real images.")
    return pairs


@dataclass(frozen=True)
class Scene:
    """A real image and its labels, (H, W) int64, as the protocol frames them."""

    name: str
    image: Image.Image
    labels: np.ndarray


def read_scene(pair: Pair, pairs: Pairs, side: int) -> Scene:
    """Open a pair, `side` pixels wide and high.

    Raises:
        UserError: a file cannot be read; image and map differ in size; or the map is painted in colours, which may
            stand for two classes.
    """
    assert pair.image is not None
    assert pair.condition is not None
    assert pairs.palette is not None
    image = open_photo(pair.image, apply_exif=not pairs.ignore_exif)
    labels = labels_of(open_raw(pair.condition), pairs.palette)
    if labels is None:
        raise UserError(f"{pair.condition}: a map painted in colours; expected one channel of labels to score against.")
    if labels.shape != (image.height, image.width):
        height, width = labels.shape
        raise UserError(f"{pair.condition}: {width} x {height}, but its image is {image.width} x {image.height}.")
    scaled = scaled_size(image.size, (side, side))
    frame = Frame.at(scaled, (side, side))
    resized = Image.fromarray(labels.astype(np.int32)).resize(scaled, Image.Resampling.NEAREST)
    framed = frame.cut(image.resize(scaled, Image.Resampling.BICUBIC))
    return Scene(pair.name, framed, np.asarray(frame.cut(resized)).astype(np.int64))


@dataclass(frozen=True)
class MapImages:
    """Generated images by the names of their scenes.

    Attributes:
        facts: What the images record of how they were generated, as far as they agree.
        prompts: By scene, where images record them.
    """

    folder: Path
    files: Mapping[str, Path]
    facts: Mapping[str, Any]
    prompts: Mapping[str, str]


def find_map_images(protocol: MapProtocol, folder: str | Path, pairs: Pairs) -> MapImages:
    """The images of a folder that `generate` filled (listed in images.jsonl), or of images named as the scenes, in the
    folder itself or in images/.

    Raises:
        UserError: no images; a list that cannot be read; images of other scenes, or several of one scene; or other
            generation settings than the protocol's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder; expected one of images named as the scenes.")
    if (folder / LIST).is_file():
        rows = read_list(folder, protocol)
        names = [str(row.get("name", Path(row["file"]).stem)) for row in rows]
        files = {name: folder / row["file"] for name, row in zip(names, rows, strict=True)}
        twice = [name for name in files if names.count(name) > 1]
        if twice:
            raise UserError(f"{folder}: several images of {first_names(twice)}; expected one of each scene.")
    else:
        rows, files = [], list_images(folder / "images" if (folder / "images").is_dir() else folder)
    scenes = {pair.name for pair in pairs.pairs}
    others = [name for name in files if name not in scenes]
    if others:
        raise UserError(
            f"{folder}: {len(others):,} images of no scene that the protocol takes from {pairs.folder}, split "
            f"{pairs.split}: {first_names(others)}."
        )
    prompts = {name: str(row["prompt"]) for name, row in zip(files, rows, strict=False) if "prompt" in row}
    return MapImages(folder, {name: file for name, file in files.items() if file.is_file()}, common(rows), prompts)


def generate_map_images(
    protocol: MapProtocol,
    run: str | Path | SavedRun,
    pairs: Pairs,
    output: str | Path,
    *,
    batch_size: int = 1,
    device: str | None = None,
) -> MapImages:
    """Generate the protocol's images of a controllable run in a folder; complete ones are kept.

    Args:
        run: What `read_run` returned, or a path for it.

    Raises:
        UserError: no controllable run; a base that the scorers cannot score; or the folder holds images of other
            settings.
    """
    if not isinstance(run, SavedRun):
        run = read_run(run)
    if run.condition_encoder is None:
        raise UserError(f"{run.path}: no condition encoder in it; expected a run of controllable training.")
    protocol.check_base(run.path, run.base_model)
    pipeline, _ = load_pipeline(run, device=device, resolution=protocol.resolution)
    assert isinstance(pipeline, ConditionedPipeline)
    generate_conditioned(
        pipeline,
        pair_sources(pairs, protocol.resolution),
        output,
        seed=protocol.seed,
        sampling=protocol.sampling,
        batch_size=batch_size,
        record=run_facts(run, pipeline),
    )
    return find_map_images(protocol, output, pairs)
