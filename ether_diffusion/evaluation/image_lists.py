"""images.jsonl: what a folder of images says of each and of how it was drawn, held against what a protocol states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.errors import UserError

from .protocols import MapProtocol, SubjectProtocol
from .results import UNRECORDED

LIST = "images.jsonl"

OWN = ("file", "name", "prompt", "k", "width", "height", "condition", "fault")
"""What a list tells of each image alone."""


def read_list(folder: Path, needed: Sequence[str] = ("file",)) -> list[dict[str, Any]]:
    """The rows of a folder's list, a line each, in their order.

    Args:
        needed: What every row has to tell, as text.

    Raises:
        UserError: a line that is no JSON object with these, or whose file lies outside the folder.
    """
    path, rows = folder / LIST, []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row = {**row, **{key: str(row[key]) for key in needed}}
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: expected a JSON object with {' and '.join(needed)}.") from None
        if Path(row["file"]).is_absolute() or ".." in Path(row["file"]).parts:
            raise UserError(f"{path}:{number}: {row['file']} lies outside the folder.")
        rows.append(row)
    return rows


def check_sampling(protocol: SubjectProtocol | MapProtocol, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """What rows tell of seed, resolution and sampling is the protocol's. The seed is that of the whole drawing, which
    is the same for all its images: each image's own noise is made of it, of the prompt or scene, and of k.

    Raises:
        UserError: the first setting that is another.
    """
    stated = {"resolution": protocol.resolution, **_drawing(protocol)}
    for number, row in enumerate(rows, 1):
        for key, wanted in stated.items():
            if row.get(key) not in (None, wanted):
                raise UserError(
                    f"{folder / LIST}:{number}: {row['file']} was drawn with {key} {row[key]!r}; {protocol.name} has "
                    f"{wanted!r}."
                )


def unrecorded(protocol: SubjectProtocol | MapProtocol, facts: Mapping[str, Any]) -> dict[str, str]:
    """The settings of the drawing that facts do not tell, in words, under NOT_TOLD; nothing if they tell all.

    The resolution is not among them: it is seen in the images.
    """
    stated = _drawing(protocol)
    missing = [key for key in stated if facts.get(key) is None]
    if not missing:
        return {}
    return {UNRECORDED: "settings" if len(missing) == len(stated) else ", ".join(missing)}


def common(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all rows say alike, beside what is each image's own."""
    first = dict(rows[0]) if rows else {}
    return {key: v for key, v in first.items() if key not in OWN and all(row.get(key) == v for row in rows)}


def _drawing(protocol: SubjectProtocol | MapProtocol) -> dict[str, Any]:
    return {"seed": protocol.seed, **protocol.sampling.model_dump(mode="json")}
