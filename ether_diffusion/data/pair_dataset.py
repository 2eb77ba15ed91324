"""Controllable generation's data: image, hint and prompt, cut alike, as functions of the sample's global index."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ether_diffusion import randomness
from ether_diffusion.data.conditions import AS_IT_IS, Condition, read_condition, to_hint
from ether_diffusion.data.frames import Frame, scaled_size
from ether_diffusion.data.pairs import Pair, Pairs
from ether_diffusion.data.photos import Photo, open_photo, to_pixels
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError


class ImageKey(NamedTuple):
    """The exact pixels of a sample's image, where it is cut in the centre."""

    file: str
    digest: str
    resolution: int
    flipped: bool
    as_stored: bool
    """EXIF orientation was passed over."""


class ControllableDataset(Dataset[dict[str, Any]]):
    """Samples by their global index: sample i of a run is the same whoever asks for it, and whenever.

    `dataset[i]` takes any i >= 0; epoch i // len(dataset) shows every pair once, in an order of its own. A sample holds
    `index`, `name`, `prompt`, `pixel_values` (3, H, W) in [-1, 1] and `hint` (3, H, W) in [0, 1]. Image and condition
    are scaled to cover the square (image bicubic with antialiasing, label maps and painted maps nearest neighbour, so
    that each pixel of a hint keeps a colour of the palette), cropped and mirrored alike.

    Args:
        crop: Where the square lies on the long side.
        caption_dropout: Probability that the prompt of a sample is "". Its hint stays.

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
        made = pairs.kind not in ("labels", "image")
        self._preprocessor = Preprocessor(pairs.kind, cache_dir=pairs.cache_dir) if made else None
        self._order: tuple[int, list[int]] = (-1, [])  # of one epoch
        self._photos: dict[Path, Photo] = {}  # digests and sizes, each taken once

    def __len__(self) -> int:
        return len(self.pairs.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair, position, flipped = self._place(index)
        image, condition = self._cut(pair, position, flipped=flipped)
        if image is None:
            raise UserError(f"{pair.condition}: a condition without an image, which cannot be trained on")
        return {**self.labels(index), "pixel_values": to_pixels(image), "hint": to_hint(condition)}

    def labels(self, index: int) -> dict[str, Any]:
        """A sample's `index`, `name` and `prompt`, at no cost."""
        pair, prompt = self._turn(index), self._turn(index).caption
        if self.caption_dropout:
            coin = torch.rand((), generator=randomness.generator(self.seed, "caption_dropout", index)).item()
            prompt = "" if coin < self.caption_dropout else prompt
        return {"index": index, "name": pair.name, "prompt": prompt}

    def hint(self, index: int) -> torch.Tensor:
        """A sample's hint alone: for one whose latents are known, and which was found to fit.

        Its image is opened where the condition was made of it, once, for its size.
        """
        pair, position, flipped = self._place(index)
        return to_hint(self._cut(pair, position, flipped=flipped, with_image=False)[1])

    def key(self, index: int) -> ImageKey:
        """What a sample's image was made of. Equal keys, equal pixels; where crops are random there is none."""
        assert self.crop == "center", "crops at random places have no end"
        pair, _, flipped = self._place(index)
        assert pair.image is not None
        photo = self._photo(pair.image)
        return ImageKey(photo.name, photo.digest, self.resolution, flipped, self.pairs.as_stored)

    def example(self, k: int) -> dict[str, Any]:
        """The k-th pair in the order of names: cut in the centre, not mirrored, with its own caption.

        A sample's entries, and `condition`, the painted hint, and `image`, as PIL images. Where the pair has no image,
        `image` and `pixel_values` are absent.
        """
        pair = self.pairs.pairs[k]
        image, condition = self._cut(pair, (0.5, 0.5), flipped=False)
        example = {"index": k, "name": pair.name, "prompt": pair.caption, "hint": to_hint(condition)}
        if image is not None:
            example |= {"pixel_values": to_pixels(image), "image": image}
        return {**example, "condition": condition}

    def prepare(self, *, device: str = "cpu", shown: bool = True) -> int:
        """Makes the conditions that are made of images and not kept yet, so that no sample waits for one; their number.

        Nothing to do where conditions are files. Without it each is made when its turn comes, on the CPU.

        Args:
            device: Where a detector with weights runs; it is let go of afterwards.
        """
        if self._preprocessor is None:
            return 0
        maker = Preprocessor(self.pairs.kind, cache_dir=self.pairs.cache_dir, device=device)
        return maker.prepare((pair.image for pair in self.pairs.pairs if pair.image), shown=shown)

    def _cut(
        self, pair: Pair, position: tuple[float, float], *, flipped: bool, with_image: bool = True
    ) -> tuple[Image.Image | None, Image.Image]:
        image, condition = self._open(pair, with_image)
        size = condition.image.size if image is None else image.size
        if image is None and self._preprocessor is not None and pair.image is not None:
            size = self._photo(pair.image).size  # detectors round the sides: their size would be another frame
        scaled = scaled_size(size, (self.resolution, self.resolution))
        frame = Frame.at(scaled, (self.resolution, self.resolution), position, flipped)
        if image is not None:
            image = frame.cut(image.resize(scaled, Image.Resampling.BICUBIC))
        return image, frame.cut(condition.resized(scaled))

    def _photo(self, path: Path) -> Photo:
        return self._photos.setdefault(path, Photo(path.name, path))

    def _open(self, pair: Pair, with_image: bool) -> tuple[Image.Image | None, Condition]:
        """Image and condition, which show the same field of view."""
        image = open_photo(pair.image, upright=not self.pairs.as_stored) if pair.image and with_image else None
        if self._preprocessor is not None:
            assert pair.image is not None
            made = self._preprocessor.of(pair.image)
            return image, Condition(made, f"a photo, through {self._preprocessor.name}", discrete=False)
        assert pair.condition is not None
        labels = self.pairs.kind == "labels"
        condition = (
            read_condition(pair.condition, palette=self.pairs.palette)
            if labels
            else read_condition(pair.condition, preprocessor=AS_IT_IS)
        )
        if image is not None and image.size != condition.image.size:
            sizes = [f"{width} x {height}" for width, height in (condition.image.size, image.size)]
            turned = " upright; its EXIF orientation turns it" if image.size == condition.image.size[::-1] else ""
            raise UserError(f"{pair.condition}: {sizes[0]}, but its image {pair.image} is {sizes[1]}{turned}")
        return image, condition

    def _place(self, index: int) -> tuple[Pair, tuple[float, float], bool]:
        """A sample's pair, where it is cut, and whether it is mirrored."""
        x, y, coin = torch.rand(3, generator=randomness.generator(self.seed, "pairs/crop", index)).tolist()
        position = (x, y) if self.crop == "random" else (0.5, 0.5)
        return self._turn(index), position, self.horizontal_flip and coin < 0.5

    def _turn(self, index: int) -> Pair:
        if index < 0:
            raise IndexError(f"samples are numbered from 0, got {index}")
        epoch, place = divmod(index, len(self))
        if self._order[0] != epoch:
            self._order = epoch, randomness.permutation(self.seed, "pairs", epoch, len(self))
        return self.pairs.pairs[self._order[1][place]]
