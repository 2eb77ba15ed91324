"""DreamBooth's data: a few photos of a subject with its prompt and, for prior preservation, images of its class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from ether_diffusion import randomness
from ether_diffusion.data.frames import Frame, Size, buckets, nearest_bucket, scaled_size
from ether_diffusion.data.masks import to_weights
from ether_diffusion.data.photos import Photo, PhotoFolder, resize, to_pixels
from ether_diffusion.data.subjects import Subject
from ether_diffusion.data.turns import Turn, Turns
from ether_diffusion.errors import UserError

Part = Literal["instance", "class"]


def dreambooth_prompts(identifier: str, class_name: str) -> tuple[str, str]:
    """The instance prompt and the class prompt: `a photo of qwe dog`, `a photo of dog`."""
    return f"a photo of {identifier} {class_name}", f"a photo of {class_name}"


class PixelsKey(NamedTuple):
    """The exact pixels of a sample. Hashable; as JSON a list, of which `PixelsKey(*entries)` is the key again."""

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
    """Samples by their global index: sample i of a run is the same whoever asks for it, and whenever.

    `dataset[i]` takes any i >= 0; with one subject, epoch i // len(dataset) shows every photo once, in an order of its
    own. A sample holds `index`, `pixel_values` (3, H, W) in [-1, 1] and `prompt`; with masks also `loss_weights`
    (1, H, W) in [0, 1]; with class images also `class_pixel_values` and `class_prompt`, from class images that take
    turns in the same way. Instance and class image of a sample have one shape, which is a square of `resolution`
    unless `crop` is `bucket`.

    Several subjects take turns in seeded rounds; each sample's class image is of its subject's class. Where one has
    masks, the samples of the others have weights of 1.

    Args:
        instance: The photos of one subject, or several subjects with all that belongs to them. A crop may miss the
            white of a mask; its weights are then all 0.
        crop: `random` and `center` crop squares. `bucket` crops as little as possible: each photo goes to the shape
            nearest in aspect, in multiples of `bucket_factor` with at most resolution² pixels, and is cut in its
            centre. `group` consecutive samples, from a multiple of `group` on, then share subject and shape, and every
            `group` epochs show each photo equally often (`turns.py`). A batch that is a run of consecutive indices
            within such a group has one shape. With group = samples of a step over all processes, the order depends on
            no division into processes and parts.
        crops_per_photo: Random crops at that many fixed places of a photo, of which each sample picks one; None: each
            sample draws its own.
        caption_dropout: Probability that the prompt of a sample is "".

    Raises:
        UserError: options that exclude each other or are out of range.
    """

    def __init__(
        self,
        instance: PhotoFolder | Sequence[Subject],
        instance_prompt: str = "",
        *,
        resolution: int,
        crop: Literal["random", "center", "bucket"] = "random",
        horizontal_flip: bool = False,
        seed: int = 0,
        class_folder: PhotoFolder | None = None,
        class_prompt: str = "",
        crops_per_photo: int | None = None,
        bucket_factor: int = 64,
        group: int = 1,
        caption_dropout: float = 0.0,
    ):
        if isinstance(instance, PhotoFolder):
            instance = [Subject(instance, instance_prompt, class_folder, class_prompt)]
        elif instance_prompt or class_folder or class_prompt:
            raise ValueError("subjects bring their own prompts and class images")
        self.subjects = tuple(instance)
        self.resolution = resolution
        self.crop = crop
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.crops_per_photo = crops_per_photo
        self.caption_dropout = caption_dropout
        self._check(group)
        self.has_class_images = self.subjects[0].class_folder is not None
        self.has_masks = any(subject.masks is not None for subject in self.subjects)
        sizes = buckets(resolution, bucket_factor) if crop == "bucket" else [(resolution, resolution)]
        # Decoded once: a photo of 12 megapixels takes longer to decode than a small model takes for a step.
        # Class images are many and small, and are opened when their turn comes.
        self._shots = [[_shot(subject, photo, sizes) for photo in subject.photos.photos] for subject in self.subjects]
        shapes = [[shot.size for shot in shots] for shots in self._shots]
        self._turns = Turns(shapes, seed, group if crop == "bucket" else 1)

    def __len__(self) -> int:
        return len(self._turns)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = {**self.labels(index), "pixel_values": self.pixels(index)}
        if self.has_class_images:
            sample["class_pixel_values"] = self.pixels(index, "class")
        return sample

    @property
    def instance_images(self) -> list[Image.Image]:
        """All photos, scaled, subject by subject."""
        return [shot.image for shots in self._shots for shot in shots]

    @property
    def sizes(self) -> dict[Size, int]:
        """(width, height) of the samples, with the number of photos of each."""
        return dict(Counter(shot.size for shots in self._shots for shot in shots))

    def labels(self, index: int) -> dict[str, Any]:
        """The sample without its images, for those that keep latents: `index`, prompts and `loss_weights`."""
        subject, shot, frame = self._instance(index)
        prompt = subject.captions.get(shot.photo.name, subject.instance_prompt)
        if self.caption_dropout:
            coin = torch.rand((), generator=randomness.generator(self.seed, "caption_dropout", index)).item()
            prompt = "" if coin < self.caption_dropout else prompt
        labels: dict[str, Any] = {"index": index, "prompt": prompt}
        if self.has_masks:
            width, height = frame.size
            labels["loss_weights"] = to_weights(frame.cut(shot.mask)) if shot.mask else torch.ones(1, height, width)
        if self.has_class_images:
            labels["class_prompt"] = subject.class_prompt
        return labels

    def pixels(self, index: int, part: Part = "instance") -> torch.Tensor:
        """(3, H, W) in [-1, 1]."""
        if part == "instance":
            _, shot, frame = self._instance(index)
            return to_pixels(frame.cut(shot.image))
        photo = self._class_photo(index)
        image = photo.open()
        frame = self._class_frame(index, photo, image.size)
        return to_pixels(frame.cut(resize(image, frame.scaled)))

    def key(self, index: int, part: Part = "instance") -> PixelsKey:
        """What `pixels(index, part)` are: equal keys, equal pixels. Computed without them.

        With fixed places (`center`, `bucket`, `crops_per_photo`) a photo has at most one key a place and flip.
        """
        if part == "instance":
            _, shot, frame = self._instance(index)
            photo = shot.photo
        else:
            photo = self._class_photo(index)
            frame = self._class_frame(index, photo, photo.size)
        return PixelsKey(
            photo.name, photo.digest, *frame.scaled, frame.left, frame.top, *frame.size, flipped=frame.flipped
        )

    def _instance(self, index: int) -> tuple[Subject, _Shot, Frame]:
        turn = self._turn(index)
        shot = self._shots[turn.subject][turn.photo]
        return self.subjects[turn.subject], shot, self._frame(shot.photo, shot.image.size, shot.size, "instance", index)

    def _class_photo(self, index: int) -> Photo:
        turn = self._turn(index)
        subject = self.subjects[turn.subject]
        if subject.class_folder is None:
            raise ValueError("there are no class images")
        photos = subject.class_folder.photos
        stream = "class" if turn.subject == 0 else f"class/{turn.subject}"
        epoch, place = divmod(turn.number, len(photos))
        return photos[randomness.permutation(self.seed, stream, epoch, len(photos))[place]]

    def _class_frame(self, index: int, photo: Photo, opened: Size) -> Frame:
        """Of the instance's shape, so that both go through the model together."""
        turn = self._turn(index)
        size = self._shots[turn.subject][turn.photo].size
        return self._frame(photo, scaled_size(opened, size), size, "class", index)

    def _turn(self, index: int) -> Turn:
        if index < 0:
            raise IndexError(f"samples are numbered from 0, got {index}")
        return self._turns[index]

    def _frame(self, photo: Photo, scaled: Size, size: Size, part: Part, index: int) -> Frame:
        x, y, coin = torch.rand(3, generator=randomness.generator(self.seed, f"{part}/crop", index)).tolist()
        if self.crop != "random":
            x, y = 0.5, 0.5
        elif self.crops_per_photo:
            choice = randomness.generator(self.seed, f"{part}/fixed_crop", index)
            k = int(torch.randint(self.crops_per_photo, (), generator=choice))
            x, y = torch.rand(2, generator=randomness.generator(self.seed, f"{part}/crop_of/{photo.name}", k)).tolist()
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
class _Shot:
    """A photo with its mask, scaled to cover the size of its samples."""

    photo: Photo
    image: Image.Image
    mask: Image.Image | None
    size: Size


def _shot(subject: Subject, photo: Photo, sizes: list[Size]) -> _Shot:
    image = photo.open()
    size = nearest_bucket(image.size, sizes)
    scaled = scaled_size(image.size, size)
    mask = None if subject.masks is None else resize(subject.masks[photo.name], scaled)
    return _Shot(photo, resize(image, scaled), mask, size)
