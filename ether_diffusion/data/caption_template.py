"""A caption template: the same words for every image, with its name or its scene filled in."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.data.pair_files import first_names
from ether_diffusion.errors import UserError, did_you_mean

SCENES = "sceneCategories.txt"
"""ADE20K's list of images and their scenes, for `{scene}` in a template."""


def from_template(names: Sequence[str], folder: Path, template: str) -> dict[str, str]:
    """The template, filled in for each name.

    Raises:
        UserError: An unknown placeholder, or a scene that the data set does not state.
    """
    known = ("name", "scene")
    try:
        wanted = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise UserError(f"data.caption_template: {template!r}: {error}") from None
    for field in wanted - set(known):
        raise UserError(
            f"data.caption_template: {template!r}: unknown {{{field}}}; known: {{name}}, {{scene}}."
            f"{did_you_mean(field, known)}"
        )
    if not template.strip():
        raise UserError("data.caption_template: empty; expected words")
    scenes = _scenes(folder) if "scene" in wanted else {}
    if "scene" in wanted and (without := [name for name in names if name not in scenes]):
        raise UserError(f"{folder / SCENES}: no scene for {len(without):,} images: {first_names(without)}")
    return {name: template.format(name=name, scene=scenes.get(name, "")) for name in names}


def _scenes(folder: Path) -> dict[str, str]:
    file = folder / SCENES
    if not file.is_file():
        raise UserError(f"{file}: no such file; {{scene}} in data.caption_template needs it")
    rows = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {row[0]: row[1].replace("_", " ") for row in rows if len(row) == 2}
