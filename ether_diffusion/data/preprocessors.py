"""Preprocessors: controlnet-aux computes conditions from photos, each once; a cache keeps them with their settings."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.photos import Photo
from ether_diffusion.errors import UserError, did_you_mean, first_line
from ether_diffusion.files import cache_folder, short_digest, write_whole
from ether_diffusion.pictures import read_cached_png, save_cached_png
from ether_diffusion.progress import progress_bar

WEIGHTS = "lllyasviel/Annotators"
"""The hub repository that has the weights of all detectors here."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Detector:
    """A class of controlnet_aux, the arguments of its calls, and whether it has weights."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: bool = True


DETECTORS: Mapping[str, Detector] = {
    "canny": Detector("CannyDetector", {"low_threshold": 100, "high_threshold": 200}, weights=False),
    "lineart_standard": Detector("LineartStandardDetector", weights=False),
    "hed": Detector("HEDdetector"),
    "scribble_hed": Detector("HEDdetector", {"scribble": True}),
    "pidinet": Detector("PidiNetDetector", {"safe": True}),
    "scribble_pidinet": Detector("PidiNetDetector", {"safe": True, "scribble": True}),
    "lineart": Detector("LineartDetector"),
    "lineart_coarse": Detector("LineartDetector", {"coarse": True}),
    "lineart_anime": Detector("LineartAnimeDetector"),
    "mlsd": Detector("MLSDdetector"),
    "midas": Detector("MidasDetector"),
    "zoe": Detector("ZoeDetector"),
    "leres": Detector("LeresDetector"),
    "normalbae": Detector("NormalBaeDetector"),
    "openpose": Detector("OpenposeDetector"),
    "openpose_full": Detector("OpenposeDetector", {"include_hand": True, "include_face": True}),
}

SIDE = 512
"""The short side, in pixels, that photos are scaled to for a detector; sides are then rounded to multiples of 64."""


def is_preprocessor(kind: str) -> bool:
    """Whether a kind of condition names a preprocessor, which computes conditions from images."""
    return kind not in ("auto", "labels", "image")


class Preprocessor:
    """Computes the condition of a photo: `preprocessor(image)` in memory, `preprocessor.of(path)` once, in a cache.

    Args:
        name: One of `DETECTORS`; `hed:FOLDER` or `hed:HUB_NAME` takes the weights from there.
        cache_dir: Conditions are in its `conditions/`; default: `~/.cache/ether_diffusion`.
        device: Where a detector with weights runs.

    Raises:
        UserError: An unknown name. Calls raise it where weights cannot be loaded or a photo cannot be read.
    """

    def __init__(self, name: str, *, cache_dir: Path | None = None, device: str = "cpu"):
        known, _, weights = name.partition(":")
        if known not in DETECTORS:
            raise UserError(
                f"preprocessor {name!r} is not known.{did_you_mean(known, DETECTORS)} Known: {', '.join(DETECTORS)}; "
                "labels or image where conditions exist"
            )
        self.name = known
        self.detector = DETECTORS[known]
        if weights and not self.detector.weights:
            raise UserError(f"preprocessor {name!r}: {known} has no weights; expected {known!r}")
        self.weights = (weights or WEIGHTS) if self.detector.weights else None
        self.device = device
        self._loaded: Any = None
        root = Path(cache_dir).expanduser() / "conditions" if cache_dir else cache_folder("conditions")
        self.folder = root / f"{known}-{short_digest(json.dumps(self.manifest, sort_keys=True))[:12]}"

    @property
    def manifest(self) -> dict[str, Any]:
        """The facts that a condition depends on besides its photo."""
        settings = {**self.detector.settings, "detect_resolution": SIDE}
        # OpenCV's resampling and Canny may change between versions.
        versions = {}
        for package in ("controlnet-aux", "opencv-python-headless", "opencv-python"):
            with suppress(PackageNotFoundError):
                versions[package] = version(package)
        return {
            "preprocessor": self.name,
            "settings": settings,
            "weights": self.weights,
            "versions": versions,
        }

    def __call__(self, image: Image.Image) -> Image.Image:
        """The condition of an image, RGB. It shows the whole image, at a size of its own."""
        if self._loaded is None:
            self._loaded = self._load()
        arguments: dict[str, Any] = {**self.detector.settings, "detect_resolution": SIDE, "output_type": "pil"}
        if self.name != "lineart_standard":
            arguments["image_resolution"] = SIDE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._loaded(image.convert("RGB"), **arguments).convert("RGB")

    def of(self, path: Path) -> Image.Image:
        """The condition of a photo, from the cache or computed and kept; a damaged one is computed again."""
        photo = Photo(path.name, path)
        file = self.folder / f"{photo.digest}.png"
        if (kept := read_cached_png(file)) is not None:
            return kept
        condition = self(photo.open())
        if not (self.folder / MANIFEST).is_file():
            write_whole(self.folder / MANIFEST, json.dumps(self.manifest, indent=2) + "\n")
        settings = {**self.manifest, "photo": photo.name, "digest": photo.digest}
        save_cached_png(condition, file, settings)
        return condition

    def prepare(self, paths: Iterable[Path], *, shown: bool = True) -> int:
        """Compute the conditions that the cache lacks; returns their number."""
        paths = list(paths)
        computed = 0
        with progress_bar(len(paths), f"{self.name} conditions", "photo", shown=shown) as bar:
            for path in paths:
                if not (self.folder / f"{Photo(path.name, path).digest}.png").is_file():
                    self.of(path)
                    computed += 1
                bar.update()
        return computed

    def _load(self) -> Any:
        try:
            # Some of controlnet-aux's modules warn, and print, when imported and loaded.
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                import controlnet_aux

                detector = getattr(controlnet_aux, self.detector.name)
                if self.weights is None:
                    return detector()
                loaded = detector.from_pretrained(str(Path(self.weights).expanduser()))
                return loaded.to(self.device) if hasattr(loaded, "to") else loaded
        except ImportError as error:
            raise UserError(f"preprocessor {self.name}: {error}; `pip install controlnet-aux`") from None
        except Exception as error:  # missing files, no network, other weights: each library has errors of its own
            raise UserError(
                f"preprocessor {self.name}: weights from {self.weights!r} cannot be loaded: {first_line(error):.200}; "
                f"name a folder that has them: {self.name}:FOLDER. canny needs none"
            ) from None
