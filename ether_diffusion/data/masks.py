"""Masks: a second folder with a grey image of the same stem for every photo; white counts in the loss, black does not.

A folder of its own, as files beside the photos would be taken for photos.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ether_diffusion.data.frames import Size
from ether_diffusion.data.photos import Photo, PhotoFolder, find_photos
from ether_diffusion.errors import UserError


@dataclass(frozen=True)
class Masks:
    """8-bit grey masks, upright, by the names of their photos; and images in the folder that are no photo's mask."""

    by_photo: dict[str, Image.Image]
    unused: tuple[str, ...]

    def notes(self) -> list[str]:
        """What the user should hear, one line each."""
        return [f"Masks: {name} belongs to no photo" for name in self.unused]


def read_masks(folder: str | Path, photos: PhotoFolder) -> Masks:
    """The masks of these photos: any image format, any size in the photo's proportions, read as upright grey.

    Raises:
        UserError: masks that are missing, ambiguous, transparent, black all over or of other proportions than their
            photos; all are named.
    """
    if Path(folder).expanduser().resolve() == Path(photos.folder).expanduser().resolve():
        raise UserError(f"masks: {folder} holds the photos; expected another folder, with masks of the same names")
    files = find_photos(folder).photos
    by_photo, faults, used = {}, [], set()
    missing = []
    for photo in photos.photos:
        matches = [file for file in files if Path(file.name).stem == Path(photo.name).stem]
        used |= {file.name for file in matches}
        if not matches:
            missing.append(photo.name)
        elif len(matches) > 1:
            faults.append(f"{folder}: two masks for {photo.name}: {', '.join(file.name for file in matches)}")
        else:
            mask = matches[0].open().convert("L")
            fault = _fault(matches[0], mask, photo.size)
            if fault:
                faults.append(f"{matches[0].source}: {fault} ({photo.name})")
            by_photo[photo.name] = mask
    if missing:
        wanted = Path(missing[0]).with_suffix(".png").name
        faults.insert(0, f"{folder}: no mask for {', '.join(missing)}; expected files such as {wanted}")
    if faults:
        raise UserError("\n".join(faults))
    return Masks(by_photo, tuple(file.name for file in files if file.name not in used))


def to_weights(mask: Image.Image) -> torch.Tensor:
    """(1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(mask)).unsqueeze(0).float() / 255


def _fault(file: Photo, mask: Image.Image, photo: Size) -> str | None:
    if not _is_opaque(file):
        return "a mask with transparency; expected grey: white counts, black does not"
    if not mask.getbbox():
        return "the mask is black all over, so that nothing of its photo would count"
    (width, height), (photo_width, photo_height) = mask.size, photo
    # Rounding may cost one pixel of either side.
    off = min(abs(width * photo_height / photo_width - height), abs(height * photo_width / photo_height - width))
    if off > 1:
        return f"the mask is {width} x {height}, its photo {photo_width} x {photo_height}: not the same proportions"
    return None


def _is_opaque(file: Photo) -> bool:
    assert isinstance(file.source, Path)
    with Image.open(file.source) as image:
        if not image.has_transparency_data:
            return True
        return image.convert("RGBA").getchannel("A").getextrema()[0] == 255
