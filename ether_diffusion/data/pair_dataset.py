"""Controllable samples: image, hint and prompt, cropped alike, as functions of the sample's global index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ether_diffusion.data.conditions import AS_IT_IS, Condition, read_condition, to_hint
from ether_diffusion.data.frames import Frame, Origin, scaled_size
from ether_diffusion.data.pairs import Pair, Pairs
from ether_diffusion.data.photos import Photo, open_photo, to_pixels
from ether_diffusion.data.preprocessors import Preprocessor, is_preprocessor
from ether_diffusion.data.sample_order import check_index, dropped, in_epochs
from ether_diffusion.errors import UserError
from ether_diffusion.randomness import generator


class ImageKey(NamedTuple):
    """What the exact pixels of a sample's image depend on, where it is cropped in the centre."""

    file: str
    digest: str
    resolution: int
    flipped: bool
    ignore_exif: bool


class ControllableDataset(Dataset[dict[str, Any]]):
    """Samples by their global index: sample i of a run depends on the seed and i alone.

    `dataset[i]` takes any i >= 0; epoch i // len(dataset) shows every pair once, in an order of its own. A sample holds
    `index`, `name`, `prompt`, `pixel_values` (3, H, W) in [-1, 1] and `hint` (3, H, W) in [0, 1]. Image and condition
    are scaled to cover the square (image bicubic with antialiasing; label maps and painted maps nearest neighbour, so
    that each pixel of a hint keeps a colour of the palette), cropped and mirrored alike.

    Args:
        crop: Where the square lies on the long side.
        caption_dropout: Probability that the prompt of a sample is "". Its hint stays.
        frames: Add to samples where their images come from: `frame`, as `Frame.of_original`.

    Raises:
        UserError: Options out of range. Samples raise it for files that cannot be read or do not fit each other.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        resolution: int,
        crop: Literal["center", "random"] = "center",
        horizontal_flip: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 0,
        frames: bool = False,
    ):
        if crop not in ("center", "random"):
            raise UserError(f"crop: {crop!r}, expected center or random")
        if not 0 <= caption_dropout <= 1:
            raise UserError(f"caption_dropout: {caption_dropout}, expected a probability, 0 to 1")
        self.pairs = pairs
        self.resolution = resolution
        self.crop = crop
        self.horizontal_flip = horizontal_flip
        self.caption_dropout = caption_dropout
        self.seed = seed
        self.frames = frames
        computed = is_preprocessor(pairs.kind)
        self._preprocessor = Preprocessor(pairs.kind, cache_dir=pairs.cache_dir) if computed else None
        self._photos: dict[Path, Photo] = {}  # their digests and sizes, each computed once

    def __len__(self) -> int:
        return len(self.pairs.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, position, flipped = self._place(index)
        image, condition, frame = self._cut(pair, position, flipped=flipped)
        if image is None:
            raise UserError(f"{pair.condition}: a condition without an image, which cannot be trained on")
        return {**self._entries(index, pair, condition, frame), "pixel_values": to_pixels(image)}

    def without_pixels(self, index: int) -> dict[str, Any]:
        """A sample without `pixel_values`, for training on cached latents; its image has been checked to fit.

        The image of a computed condition is opened once, for its size.
        """
        pair, position, flipped = self._place(index)
        _, condition, frame = self._cut(pair, position, flipped=flipped, with_image=False)
        return self._entries(index, pair, condition, frame)

    def pixels(self, index: int, part: str = "instance") -> torch.Tensor:
        """A sample's `pixel_values`."""
        return self[index]["pixel_values"]

    def keys(self, index: int) -> dict[str, ImageKey]:
        """The key of a sample's image: equal keys, equal pixels. Random crops have none."""
        assert self.crop == "center", "random crops never repeat"
        pair, _, flipped = self._place(index)
        assert pair.image is not None
        photo = self._photo(pair.image)
        return {"instance": ImageKey(photo.name, photo.digest, self.resolution, flipped, self.pairs.ignore_exif)}

    def example(self, k: int) -> dict[str, Any]:
        """The k-th pair in the order of names: cropped in the centre, not mirrored, with its own caption.

        A sample's entries, and as PIL images `condition`, which the hint shows, and `image`. Where the pair has no
        image, `image` and `pixel_values` are absent.
        """
        pair = self.pairs.pairs[k]
        image, condition, _ = self._cut(pair, (0.5, 0.5), flipped=False)
        example = {"index": k, "name": pair.name, "prompt": pair.caption, "hint": to_hint(condition)}
        if image is not None:
            example |= {"pixel_values": to_pixels(image), "image": image}
        return {**example, "condition": condition}

    def prepare(self, *, device: str = "cpu", shown: bool = True) -> int:
        """Compute the conditions that the cache lacks, so that no sample waits for one; returns their number.

        Conditions that are files need nothing. Without this call each is computed at its first sample, on the CPU.

        Args:
            device: Where a detector with weights runs; it is freed afterwards.
        """
        if self._preprocessor is None:
            return 0
        preprocessor = Preprocessor(self.pairs.kind, cache_dir=self.pairs.cache_dir, device=device)
        return preprocessor.prepare((pair.image for pair in self.pairs.pairs if pair.image), shown=shown)

    def _entries(self, index: int, pair: Pair, condition: Image.Image, frame: Origin) -> dict[str, Any]:
        prompt = dropped(pair.caption, self.caption_dropout, self.seed, index)
        entries = {"index": index, "name": pair.name, "prompt": prompt, "hint": to_hint(condition)}
        return {**entries, "frame": frame} if self.frames else entries

    def _cut(
        self, pair: Pair, position: tuple[float, float], *, flipped: bool, with_image: bool = True
    ) -> tuple[Image.Image | None, Image.Image, Origin]:
        """The square of image and condition, and where it comes from."""
        image, condition = self._open(pair, with_image)
        size = condition.image.size if image is None else image.size
        if image is None and self._preprocessor is not None and pair.image is not None:
            size = self._photo(pair.image).size  # detectors round the sides, so that the condition's frame would differ
        scaled = scaled_size(size, (self.resolution, self.resolution))
        frame = Frame.at(scaled, (self.resolution, self.resolution), position, flipped)
        if image is not None:
            image = frame.cut(image.resize(scaled, Image.Resampling.BICUBIC))
        return image, frame.cut(condition.resized(scaled)), frame.of_original(size)

    def _photo(self, path: Path) -> Photo:
        return self._photos.setdefault(path, Photo(path.name, path))

    def _open(self, pair: Pair, with_image: bool) -> tuple[Image.Image | None, Condition]:
        """Image and condition, which show the same field of view."""
        image = open_photo(pair.image, apply_exif=not self.pairs.ignore_exif) if pair.image and with_image else None
        if self._preprocessor is not None:
            assert pair.image is not None
            computed = self._preprocessor.of(pair.image)
            return image, Condition(computed, f"a photo, through {self._preprocessor.name}", discrete=False)
        assert pair.condition is not None
        preprocessor = None if self.pairs.kind == "labels" else AS_IT_IS
        condition = read_condition(pair.condition, palette=self.pairs.palette, preprocessor=preprocessor)
        if image is not None and image.size != condition.image.size:
            sizes = [f"{width} x {height}" for width, height in (condition.image.size, image.size)]
            turned = " with its EXIF orientation applied" if image.size == condition.image.size[::-1] else ""
            raise UserError(f"{pair.condition}: {sizes[0]}, but its image {pair.image} is {sizes[1]}{turned}")
        return image, condition

    def _place(self, index: int) -> tuple[Pair, tuple[float, float], bool]:
        """A sample's pair, the position of its crop, and whether it is mirrored."""
        check_index(index)
        pair = self.pairs.pairs[in_epochs(index, len(self), self.seed, "pairs")]
        x, y, coin = torch.rand(3, generator=generator(self.seed, "pairs/crop", index)).tolist()
        position = (x, y) if self.crop == "random" else (0.5, 0.5)
        return pair, position, self.horizontal_flip and coin < 0.5
