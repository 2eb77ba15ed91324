"""DreamBooth's data: a few photos of one subject with its prompt and, for prior preservation, images of its class."""

from __future__ import annotations

from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from ether_diffusion import randomness
from ether_diffusion.data.photos import Photo, PhotoFolder, crop, resize_short_side, to_pixels


def dreambooth_prompts(identifier: str, class_name: str) -> tuple[str, str]:
    """The instance prompt and the class prompt: `a photo of qwe dog`, `a photo of dog`."""
    return f"a photo of {identifier} {class_name}", f"a photo of {class_name}"


class DreamBoothDataset(Dataset[dict[str, Any]]):
    """Samples by their global index: sample i of a run is the same whoever asks for it, and whenever.

    `dataset[i]` takes any i >= 0; epoch i // len(dataset) shows every photo once, in an order of its own. A sample
    holds `index`, `pixel_values` (3, H, W) in [-1, 1] and `prompt`; with class images also `class_pixel_values` and
    `class_prompt`, from class images that take turns in the same way.
    """

    def __init__(
        self,
        instance: PhotoFolder,
        instance_prompt: str,
        *,
        resolution: int,
        crop: Literal["random", "center"] = "random",
        horizontal_flip: bool = False,
        seed: int = 0,
        class_folder: PhotoFolder | None = None,
        class_prompt: str = "",
    ):
        if class_folder is not None and not class_prompt:
            raise ValueError("class images need a class_prompt")
        self.instance_prompt = instance_prompt
        self.class_prompt = class_prompt
        self.resolution = resolution
        self.crop = crop
        self.horizontal_flip = horizontal_flip
        self.seed = seed
        self.class_photos: tuple[Photo, ...] = class_folder.photos if class_folder else ()
        # Decoded once: a photo of 12 megapixels takes longer to decode than a small model takes for a step.
        # Class images are many and small, and are opened when their turn comes.
        self.instance_images = [resize_short_side(photo.open(), resolution) for photo in instance.photos]

    def __len__(self) -> int:
        return len(self.instance_images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < 0:
            raise IndexError(f"samples are numbered from 0, got {index}")
        image = self.instance_images[self._turn("instance", index, len(self.instance_images))]
        sample = {
            "index": index,
            "pixel_values": self._pixels(image, "instance", index),
            "prompt": self.instance_prompt,
        }
        if self.class_photos:
            photo = self.class_photos[self._turn("class", index, len(self.class_photos))]
            image = resize_short_side(photo.open(), self.resolution)
            sample |= {"class_pixel_values": self._pixels(image, "class", index), "class_prompt": self.class_prompt}
        return sample

    def _turn(self, stream: str, index: int, size: int) -> int:
        epoch, place = divmod(index, size)
        return randomness.permutation(self.seed, stream, epoch, size)[place]

    def _pixels(self, image: Image.Image, stream: str, index: int) -> torch.Tensor:
        x, y, coin = torch.rand(3, generator=randomness.generator(self.seed, f"{stream}/crop", index)).tolist()
        image = crop(image, self.resolution, (x, y) if self.crop == "random" else (0.5, 0.5))
        if self.horizontal_flip and coin < 0.5:
            image = ImageOps.mirror(image)
        return to_pixels(image)
