"""Masks: a second folder with a grey image of the same stem for every photo weights the loss: white counts, black not.

A folder of its own, because files next to the photos would be read as photos.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ether_diffusion.data.frames import Size
from ether_diffusion.data.photos import Photo, PhotoFolder, find_photos, is_opaque
from ether_diffusion.errors import UserError
from ether_diffusion.input_files import same_name


def read_masks(folder: str | Path, photos: PhotoFolder) -> tuple[dict[str, Image.Image], list[str]]:
    """The masks of these photos: any image format, any size in the photo's proportions.

    Returns:
        8-bit grey masks by the names of their photos, EXIF orientation applied; and notes for the user, one line each.

    Raises:
        UserError: Masks that are missing, ambiguous, transparent, completely black or of other proportions than their
            photos; all are named.
    """
    if Path(folder).expanduser().resolve() == Path(photos.folder).expanduser().resolve():
        raise UserError(f"masks: {folder} holds the photos; expected another folder, with masks of the same names")
    files = find_photos(folder).photos
    by_photo, faults, missing, used = {}, [], [], set()
    for photo in photos.photos:
        stem = same_name(Path(photo.name).stem)
        matches = [file for file in files if same_name(Path(file.name).stem) == stem]
        used |= {file.name for file in matches}
        if not matches:
            missing.append(photo.name)
        elif len(matches) > 1:
            faults.append(f"{folder}: two masks for {photo.name}: {', '.join(file.name for file in matches)}")
        else:
            by_photo[photo.name] = matches[0].open().convert("L")
            if fault := _fault(matches[0], by_photo[photo.name], photo.size):
                faults.append(f"{matches[0].source}: {fault} ({photo.name})")
    if missing:
        wanted = Path(missing[0]).with_suffix(".png").name
        faults.insert(0, f"{folder}: no mask for {', '.join(missing)}; expected files such as {wanted}")
    if faults:
        raise UserError("\n".join(faults))
    return by_photo, [f"Masks: no photo matches {file.name}" for file in files if file.name not in used]


def to_weights(mask: Image.Image) -> torch.Tensor:
    """(1, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.array(mask)).unsqueeze(0).float() / 255


def _fault(file: Photo, mask: Image.Image, photo: Size) -> str | None:
    assert isinstance(file.source, Path)
    with Image.open(file.source) as image:
        if not is_opaque(image):
            return "a mask with transparency; expected grey: white counts, black does not"
    if not mask.getbbox():
        return "the mask is completely black, so that its photo would not count at all"
    (width, height), (photo_width, photo_height) = mask.size, photo
    # Rounding may cost one pixel of either side.
    off = min(abs(width * photo_height / photo_width - height), abs(height * photo_width / photo_height - width))
    if off > 1:
        return f"the mask is {width} x {height}, its photo {photo_width} x {photo_height}: not the same proportions"
    return None
