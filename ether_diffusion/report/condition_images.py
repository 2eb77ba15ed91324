"""The conditions that images were generated under, read from the data set of their run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.errors import UserError
from ether_diffusion.generation.sources import Opened, pair_sources


def conditions_of(config: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Opened]:
    """Conditions and real images by name; without those that are missing or have changed since.

    Args:
        config: Of a controllable run.
        rows: Of the `images.jsonl` of square images generated under a data set's conditions.
    """
    data, validation = config.get("data") or {}, config.get("validation") or {}
    digests = {row["name"]: row["condition"] for row in rows if "name" in row and "condition" in row}
    if not digests or not data.get("dataset_dir"):
        return {}
    for split in dict.fromkeys([validation.get("split") or "validation", data.get("split") or "training"]):
        try:
            pairs = find_pairs(
                data["dataset_dir"],
                split=split,
                condition=data.get("condition", "auto"),
                caption_template="{name}",  # the rows hold the captions; a missing one must be no error here
                cache_dir=data.get("cache_dir"),
            )
            pairs = replace(pairs, pairs=tuple(pair for pair in pairs.pairs if pair.name in digests))
            sources = pair_sources(pairs, rows[0]["height"])
            found = {one.name: one.open() for one in sources if one.digest == digests[one.name]}
        except UserError:
            continue
        if found:
            return found
    return {}
