"""Digests of what trainings learn from and what scores compare with: the content counts, not the path."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.data.data_digests import pairs_digest, photos_digest
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.photos import Photo, find_photos
from ether_diffusion.data.subjects import find_subject
from ether_diffusion.training.controllable_pairs import training_pairs

from .stages import locked


class BenchmarkData:
    """Digests of data. Each is computed once, because data does not change while a worker works.

    Args:
        output_dir: Of the benchmark; digests of pairs are kept in its `.digests/` for the other workers.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self._known: dict[str, str] = {}

    def of_subject(self, training: Any, photos: Sequence[Photo]) -> dict[str, Any]:
        """Of a DreamBooth training: its photos and, if its settings name them, captions, masks and the user's own class
        images. Raises UserError for files that cannot be read."""
        data, found = training.data, {"photos": {photo.name: photo.digest for photo in photos}}
        if data.captions or data.masks is not None:
            subject = find_subject(data.instance_dir, "", captions=data.captions, masks=data.masks)
            masks = [Photo(name, mask) for name, mask in sorted((subject.masks or {}).items())]
            found |= {"captions": dict(subject.captions), "masks": {mask.name: mask.digest for mask in masks}}
        if data.prior is not None and data.prior.class_dir is not None:
            folder = data.prior.class_dir
            digest = self._once(f"photos of {folder}", lambda: photos_digest(find_photos(folder).photos))
            found["class_images"] = {"sha256": digest}
        return found

    def of_pairs(self, training: Any) -> dict[str, Any]:
        """Of the pairs of a controllable training. Raises UserError as `find_pairs`."""
        settings = json.dumps(training.data.model_dump(mode="json"), sort_keys=True)
        return {"pairs": self._once(settings, lambda: self._pairs(training_pairs(training)))}

    def of_scenes(self, scenes: Pairs) -> dict[str, Any]:
        """Of the pairs that images are scored against."""
        return {"scenes": self._once("scenes", lambda: self._pairs(scenes))}

    def _pairs(self, pairs: Pairs) -> str:
        with locked(self.output_dir, "digests"):
            return pairs_digest(pairs, self.output_dir / ".digests")

    def _once(self, name: str, find: Callable[[], str]) -> str:
        if name not in self._known:
            self._known[name] = find()
        return self._known[name]
