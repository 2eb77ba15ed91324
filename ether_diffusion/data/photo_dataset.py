"""DreamBooth samples: a few photos of a subject with its prompt and, for prior preservation, images of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ether_diffusion.data.frames import Frame, Size, buckets, nearest_bucket, scaled_size
from ether_diffusion.data.masks import to_weights
from ether_diffusion.data.photos import Photo, resize, to_pixels
from ether_diffusion.data.sample_order import SampleOrder, dropped, in_epochs
from ether_diffusion.data.subjects import Subject
from ether_diffusion.errors import UserError
from ether_diffusion.randomness import generator

Part = Literal["instance", "class"]
_PIXELS: dict[Part, str] = {"instance": "pixel_values", "class": "class_pixel_values"}


def dreambooth_prompts(identifier: str, class_name: str) -> tuple[str, str]:
    """The instance prompt and the class prompt: `a photo of qwe dog`, `a photo of dog`."""
    return f"a photo of {identifier} {class_name}", f"a photo of {class_name}"


class PixelsKey(NamedTuple):
    """What a sample's exact pixels depend on. Hashable; JSON makes it a list, and `PixelsKey(*list)` the key again."""

    photo: str
    digest: str
    scaled_width: int
    scaled_height: int
    left: int
    top: int
    width: int
    height: int
    flipped: bool


class DreamBoothDataset(Dataset[dict[str, Any]]):
    """Samples by their global index: sample i of a run depends on the seed and i alone.

    `dataset[i]` takes any i >= 0; with one subject, epoch i // len(dataset) shows every photo once, in an order of its
    own. A sample holds `index`, `pixel_values` (3, H, W) in [-1, 1] and `prompt`; with masks also `loss_weights`
    (1, H, W) in [0, 1]; with class images also `class_pixel_values` and `class_prompt`, for which epochs over the class
    images hold in the same way. Instance and class image of a sample have one shape, a square of `resolution` unless
    `crop` is `bucket`.

    Several subjects alternate in seeded rounds; each sample's class image is of its subject's class. Where one subject
    has masks, the samples of the others have weights of 1.

    Args:
        subjects: At least one. A crop may miss the white of a mask; its weights are then all 0.
        crop: `random` and `center` crop squares. `bucket` crops as little as possible: each photo gets the shape
            nearest in aspect ratio, in multiples of `bucket_factor` with at most resolution² pixels, and is cropped in
            its centre. `group` consecutive samples, from a multiple of `group` on, then share subject and shape, and
            every `group` epochs show each photo equally often (`sample_order.py`). A batch of consecutive indices
            within such a group has one shape. With group = samples per step over all processes, the order does not
            depend on how a step is divided.
        crops_per_photo: Random crops at that many fixed places of a photo, of which each sample picks one; None: each
            sample has a random place of its own.
        caption_dropout: Probability that the prompt of a sample is "".
        frames: Add to samples where their images come from: `frame` and `class_frame`, as `Frame.of_original`.

    Raises:
        UserError: Options that exclude each other or are out of range.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        *,
        resolution: int,
        crop: Literal["random", "center", "bucket"] = "random",
        horizontal_flip: bool = False,
        seed: int = 0,
        crops_per_photo: int | None = None,
        bucket_factor: int = 64,
        group: int = 1,
        caption_dropout: float = 0.0,
        frames: bool = False,
    ):
        self.subjects = tuple(subjects)
        self.resolution = resolution
        self.crop = crop
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.crops_per_photo = crops_per_photo
        self.caption_dropout = caption_dropout
        self.frames = frames
        self._check(group)
        self.has_class_images = self.subjects[0].class_folder is not None
        self.has_masks = any(subject.masks is not None for subject in self.subjects)
        sizes = buckets(resolution, bucket_factor) if crop == "bucket" else [(resolution, resolution)]
        # Decoded once: a photo of 12 megapixels takes longer to decode than a small model takes for a step.
        # Class images are many and small, and are opened when a sample shows them.
        self._scaled = [[_scaled(each, photo, sizes) for photo in each.photos.photos] for each in self.subjects]
        shapes = [[photo.size for photo in photos] for photos in self._scaled]
        self._order = SampleOrder(shapes, seed, group if crop == "bucket" else 1)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = {_PIXELS[part]: self.pixels(index, part) for part in self.parts}
        return self.without_pixels(index) | pixels

    @property
    def parts(self) -> tuple[Part, ...]:
        """The kinds of images of a sample."""
        return ("instance", "class") if self.has_class_images else ("instance",)

    @property
    def sizes(self) -> dict[Size, int]:
        """(width, height) of the samples, with the number of photos of each."""
        return dict(Counter(photo.size for photos in self._scaled for photo in photos))

    def without_pixels(self, index: int) -> dict[str, Any]:
        """The sample without its images, for training on cached latents: `index`, prompts and `loss_weights`."""
        subject, scaled, frame = self._instance(index)
        prompt = subject.captions.get(scaled.photo.name, subject.instance_prompt)
        labels: dict[str, Any] = {"index": index, "prompt": dropped(prompt, self.caption_dropout, self.seed, index)}
        if self.has_masks:
            width, height = frame.size
            labels["loss_weights"] = to_weights(frame.cut(scaled.mask)) if scaled.mask else torch.ones(1, height, width)
        if self.has_class_images:
            labels["class_prompt"] = subject.class_prompt
        if self.frames:
            labels["frame"] = frame.of_original(scaled.original)
            if self.has_class_images:
                photo = self._class_photo(index)
                labels["class_frame"] = self._class_frame(index, photo, photo.size).of_original(photo.size)
        return labels

    def pixels(self, index: int, part: Part = "instance") -> torch.Tensor:
        """(3, H, W) in [-1, 1]."""
        if part == "instance":
            _, scaled, frame = self._instance(index)
            return to_pixels(frame.cut(scaled.image))
        photo = self._class_photo(index)
        image = photo.open()
        frame = self._class_frame(index, photo, image.size)
        return to_pixels(frame.cut(resize(image, frame.scaled)))

    def keys(self, index: int) -> dict[Part, PixelsKey]:
        """The keys of a sample's images."""
        return {part: self.key(index, part) for part in self.parts}

    def key(self, index: int, part: Part = "instance") -> PixelsKey:
        """The key of `pixels(index, part)`, computed without them: equal keys, equal pixels.

        With fixed places (`center`, `bucket`, `crops_per_photo`) a photo has at most one key per place and flip.
        """
        if part == "instance":
            _, scaled, frame = self._instance(index)
            photo = scaled.photo
        else:
            photo = self._class_photo(index)
            frame = self._class_frame(index, photo, photo.size)
        return PixelsKey(
            photo.name, photo.digest, *frame.scaled, frame.left, frame.top, *frame.size, flipped=frame.flipped
        )

    def _instance(self, index: int) -> tuple[Subject, _Scaled, Frame]:
        subject, photo, _ = self._order[index]
        scaled = self._scaled[subject][photo]
        frame = self._frame(scaled.photo, scaled.image.size, scaled.size, "instance", index)
        return self.subjects[subject], scaled, frame

    def _class_photo(self, index: int) -> Photo:
        subject, _, number = self._order[index]
        folder = self.subjects[subject].class_folder
        if folder is None:
            raise ValueError("there are no class images")
        stream = "class" if subject == 0 else f"class/{subject}"
        return folder.photos[in_epochs(number, len(folder.photos), self.seed, stream)]

    def _class_frame(self, index: int, photo: Photo, opened: Size) -> Frame:
        """A frame of the instance's shape, so that both go through the model together."""
        shown = self._order[index]
        size = self._scaled[shown.subject][shown.photo].size
        return self._frame(photo, scaled_size(opened, size), size, "class", index)

    def _frame(self, photo: Photo, scaled: Size, size: Size, part: Part, index: int) -> Frame:
        x, y, coin = torch.rand(3, generator=generator(self.seed, f"{part}/crop", index)).tolist()
        if self.crop != "random":
            x, y = 0.5, 0.5
        elif self.crops_per_photo:
            choice = generator(self.seed, f"{part}/fixed_crop", index)
            k = int(torch.randint(self.crops_per_photo, (), generator=choice))
            x, y = torch.rand(2, generator=generator(self.seed, f"{part}/crop_of/{photo.name}", k)).tolist()
        return Frame.at(scaled, size, (x, y), flipped=self.horizontal_flip and coin < 0.5)

    def _check(self, group: int) -> None:
        if not self.subjects:
            raise UserError("subjects: expected at least one, got none")
        if self.crop not in ("random", "center", "bucket"):
            raise UserError(f"crop: {self.crop!r}, expected random, center or bucket")
        if self.crops_per_photo is not None and self.crop != "random":
            raise UserError(f"crops_per_photo: {self.crops_per_photo} needs crop=random, got crop={self.crop}")
        if self.crops_per_photo is not None and self.crops_per_photo < 1:
            raise UserError(f"crops_per_photo: {self.crops_per_photo}, expected at least 1, or null")
        if not 0 <= self.caption_dropout <= 1:
            raise UserError(f"caption_dropout: {self.caption_dropout}, expected a probability, 0 to 1")
        if group < 1:
            raise UserError(f"group: {group}, expected at least 1")
        without = [s.photos.folder for s in self.subjects if s.class_folder is None]
        if 0 < len(without) < len(self.subjects):
            raise UserError(f"subjects: either all have class images or none; without: {', '.join(without)}")


@dataclass(frozen=True)
class _Scaled:
    """A photo with its mask, scaled to cover `size`, that of its samples."""

    photo: Photo
    image: Image.Image
    mask: Image.Image | None
    size: Size
    original: Size


def _scaled(subject: Subject, photo: Photo, sizes: list[Size]) -> _Scaled:
    image = photo.open()
    original = image.size
    size = nearest_bucket(image.size, sizes)
    scaled = scaled_size(image.size, size)
    mask = None if subject.masks is None else resize(subject.masks[photo.name], scaled)
    return _Scaled(photo, resize(image, scaled), mask, size, original)
