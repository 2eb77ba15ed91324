"""Photos: a folder as people have it, opened as upright 8-bit RGB, resized, cropped and made into pixels in ±1."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from ether_diffusion.data.frames import Frame, Size, scaled_size
from ether_diffusion.errors import UserError, did_you_mean

EXPECTED = "expected a folder with 3 to 6 photos"
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Photo:
    """One photo: a file, or an image already drawn."""

    name: str
    source: Path | Image.Image

    def open(self) -> Image.Image:
        """Upright, 8-bit RGB. Raises UserError for a file that cannot be decoded to its end."""
        return open_photo(self.source) if isinstance(self.source, Path) else self.source.copy()

    @cached_property
    def size(self) -> Size:
        """Width and height, upright. Decodes the photo, once: only decoders know where orientation is kept."""
        return self.open().size if isinstance(self.source, Path) else self.source.size

    @cached_property
    def digest(self) -> str:
        """Of the file's bytes, or of a drawn image's pixels; taken once."""
        if isinstance(self.source, Path):
            content = self.source.read_bytes()
        else:
            content = f"{self.source.mode} {self.source.size} ".encode() + self.source.tobytes()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder in the order of their names, and the (name, reason) of each other thing in it."""

    folder: str
    photos: tuple[Photo, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def find_photos(folder: str | Path) -> PhotoFolder:
    """The photos of a folder, told from other files by content; `builtin:robot` names photos that the package draws.

    Every photo is decoded once, so that a damaged one stops a run before it starts.

    Raises:
        UserError: no such folder, no photos in it, or files that should be photos and cannot be read (all are named).
    """
    if str(folder).startswith("builtin:"):
        return _builtin(str(folder))
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(_no_folder(path))
    photos, skipped, damaged = [], [], []
    for entry in sorted(path.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            skipped.append((entry.name, "hidden"))
        elif entry.is_dir():
            skipped.append((entry.name, "a folder"))
        elif entry.suffix.lower() not in PHOTO_SUFFIXES | _OTHER_SUFFIXES and not _is_image(entry):
            skipped.append((entry.name, "not an image"))
        else:
            try:
                open_photo(entry)
                photos.append(Photo(entry.name, entry))
            except UserError as error:
                damaged.append(str(error))
    if damaged:
        raise UserError("\n".join(damaged))
    if not photos:
        found = ", ".join(f"{name} ({reason})" for name, reason in skipped[:8]) + (", ..." if len(skipped) > 8 else "")
        raise UserError(f"{folder}: no photos in this folder; {EXPECTED}. It holds: {found or 'nothing'}")
    return PhotoFolder(str(folder), tuple(photos), tuple(skipped))


def open_photo(path: Path, *, upright: bool = True) -> Image.Image:
    """Decodes a photo to upright, 8-bit RGB.

    EXIF orientation is applied; colours are converted to sRGB where an RGB or CMYK profile says that they are not;
    transparency is laid on white; 16-bit and floating-point greys are scaled, not clipped; of several frames (MPO,
    animations) the first is taken.

    Args:
        upright: False: EXIF orientation is passed over, for what was made on the pixels as they are stored.

    Raises:
        UserError: the file and the reason.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels, which phones reach, and refuses from 179.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL")
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return _rgb(_srgb(ImageOps.exif_transpose(image) if upright else image))
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise UserError(f"{path}: {_reason(path, error)}") from None


def resize_short_side(image: Image.Image, resolution: int) -> Image.Image:
    """Scales so that the short side is `resolution`: bilinear, with antialiasing."""
    return resize(image, scaled_size(image.size, (resolution, resolution)))


def resize(image: Image.Image, size: Size) -> Image.Image:
    """To exactly this size: bilinear, with antialiasing."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def crop(image: Image.Image, resolution: int, position: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """A square of `resolution`. `position` is (x, y) in [0, 1]: 0 at the left or top edge, 0.5 in the centre."""
    return Frame.at(image.size, (resolution, resolution), position).cut(image)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def to_image(pixels: torch.Tensor) -> Image.Image:
    """The image of (3, H, W) in [-1, 1]; values outside are clipped. The inverse of `to_pixels`."""
    levels = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())


# MPO counts as JPEG here: Pillow tells the two apart after opening.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Photos all the same: to skip one silently would train on fewer than the user gave.
_OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".psd"}


def _builtin(folder: str) -> PhotoFolder:
    from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos

    name = folder.removeprefix("builtin:")
    if name not in SUBJECTS:
        known = ", ".join(f"builtin:{known}" for known in SUBJECTS)
        raise UserError(f"no built-in subject {folder!r}.{did_you_mean(name, SUBJECTS)} Built in: {known}")
    return PhotoFolder(folder, tuple(Photo(f"{name}-{i}", image) for i, image in enumerate(render_photos(name), 1)))


def _no_folder(path: Path) -> str:
    if path.exists():
        return f"{path}: {EXPECTED}, got a file"
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    return f"{path}: no such folder; {EXPECTED}.{did_you_mean(path.name, siblings)}"


def _is_image(path: Path) -> bool:
    """By content, for files whose names do not tell."""
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except Exception:  # whatever stops Pillow here, it has not recognised an image
        return False


def _reason(path: Path, error: Exception) -> str:
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as denied:
        return f"cannot be read: {denied.strerror}"
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" or path.suffix.lower() in _OTHER_SUFFIXES:
        kind = path.suffix.removeprefix(".").upper() if path.suffix.lower() in _OTHER_SUFFIXES else "HEIC or AVIF"
        return f"a photo in {kind} format, which cannot be read; export it as JPEG or PNG"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "not an image but a web page; download the photo again"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in JPEG, PNG, WebP, MPO, BMP, TIFF or GIF format, or damaged"
    return f"a damaged image: {(str(error).strip() or type(error).__name__).splitlines()[0]}"


def _srgb(image: Image.Image) -> Image.Image:
    """Converted by the embedded profile, so that a phone's wide-gamut photo keeps the colours that its owner sees."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return image
        mode = "RGB" if image.mode == "CMYK" else image.mode
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # a broken profile does not make a photo unusable
        return image
    return converted or image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_eight_bit(image)).convert("RGB")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> np.ndarray:
    """Integers are of 16 bits, or of 32 where a value needs them; floats reach 1, else 255, else 65535."""
    levels = np.nan_to_num(np.asarray(image).astype(np.float64))
    largest = float(levels.max())
    if image.mode == "F":
        white = 1 if largest <= 1 else 255 if largest <= 255 else 65535
    else:
        white = 65535 if largest <= 65535 else 2**31 - 1
    if largest > white:
        raise ValueError(f"floating-point values up to {largest:g}, expected at most 1, 255 or 65535")
    return (levels.clip(0) / white * 255).round().astype(np.uint8)
