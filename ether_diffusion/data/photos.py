"""Photos: files decoded to 8-bit RGB with their EXIF orientation applied, resized, and made into pixels in ±1."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from ether_diffusion.data.frames import Size
from ether_diffusion.errors import UserError, did_you_mean, first_line
from ether_diffusion.files import os_error_reason, short_digest
from ether_diffusion.input_files import check_file, check_folder, list_folder, read_bytes

PHOTOS = "a folder with 3 to 6 photos"
PHOTO_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Photo:
    """One photo: a file, or an image in memory."""

    name: str
    source: Path | Image.Image

    def open(self) -> Image.Image:
        """8-bit RGB, EXIF orientation applied. Raises UserError for a file that cannot be decoded to its end."""
        return open_photo(self.source) if isinstance(self.source, Path) else self.source.copy()

    @cached_property
    def size(self) -> Size:
        """Width and height of the opened photo. Decodes a file, once: only decoders know where orientation is kept."""
        return self.open().size if isinstance(self.source, Path) else self.source.size

    @cached_property
    def digest(self) -> str:
        """Digest of the file's bytes, or of the image's pixels; computed once."""
        if isinstance(self.source, Path):
            return short_digest(read_bytes(self.source))
        return short_digest(f"{self.source.mode} {self.source.size} ", self.source.tobytes())


@dataclass(frozen=True)
class PhotoFolder:
    """The photos of a folder in the order of their names, and (name, reason) of everything else in it."""

    folder: str
    photos: tuple[Photo, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def find_photos(folder: str | Path) -> PhotoFolder:
    """The photos of a folder, recognised by content; `builtin:robot` names photos that the package renders.

    Every photo is decoded once, so that a damaged one stops a run before it starts.

    Raises:
        UserError: No such folder, no photos in it, or files that should be photos and cannot be read (all are named).
    """
    if str(folder).startswith("builtin:"):
        return _builtin(str(folder))
    files, skipped = photo_files(Path(folder).expanduser())
    photos, damaged = [], []
    for file in files:
        try:
            open_photo(file)
            photos.append(Photo(file.name, file))
        except UserError as error:
            damaged.append(str(error))
    if damaged:
        raise UserError("\n".join(damaged))
    if not photos:
        found = ", ".join(f"{name} ({reason})" for name, reason in skipped[:8]) + (", ..." if len(skipped) > 8 else "")
        raise UserError(f"{folder}: no photos in this folder; expected {PHOTOS}. It holds: {found or 'nothing'}")
    return PhotoFolder(str(folder), tuple(photos), tuple(skipped))


def photo_files(folder: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files of a folder that are photos, or should be, by suffix or content; and (name, reason) of all others.

    Raises:
        UserError: No such folder, or one with anything but files and folders in it.
    """
    check_folder(folder, PHOTOS)
    files, entries = [], list_folder(folder)
    skipped = [(entry.name, "hidden") for entry in sorted(folder.iterdir()) if entry.name.startswith(".")]
    for entry in entries:
        if entry.is_dir() and entry.suffix.lower() not in PHOTO_SUFFIXES:
            skipped.append((entry.name, "a folder"))
        elif entry.suffix.lower() not in PHOTO_SUFFIXES | OTHER_SUFFIXES and not _is_image(entry):
            skipped.append((entry.name, "not an image"))
        else:
            files.append(entry)
    return files, skipped


def open_photo(path: Path, *, apply_exif: bool = True) -> Image.Image:
    """Decode a photo to 8-bit RGB.

    The EXIF orientation is applied; colours are converted to sRGB by the profile of an RGB or CMYK photo; transparency
    is laid on white; 16-bit and floating-point greys are scaled, not clipped; of several frames (MPO, animations) the
    first is taken.

    Args:
        apply_exif: False: the EXIF orientation is ignored, for masks and maps that were made from the stored pixels.

    Raises:
        UserError: The file and the reason.
    """
    return decode(path, lambda image: _rgb(_srgb(upright(image) if apply_exif else image)), _FORMATS)


def decode(
    path: Path, convert: Callable[[Image.Image], Image.Image], formats: tuple[str, ...] | None = None
) -> Image.Image:
    """Decode an image to its end and convert it; None: every format that Pillow reads.

    Raises:
        UserError: The file and the reason.
    """
    check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns from 89 megapixels, which phones reach, and refuses from 179.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", module="PIL")
            try:
                return _decoded(path, convert, formats)
            except (ValueError, SyntaxError, OSError):
                if (plain := _without_texts(path)) is None:
                    raise
                return _decoded(io.BytesIO(plain), convert, formats)
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller") from None
    except Exception as error:  # damaged files make decoders raise almost anything
        raise UserError(f"{path}: {_reason(path, error)}") from None


def upright(image: Image.Image) -> Image.Image:
    """The image with its EXIF orientation applied. EXIF data that cannot be read states none."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF is a TIFF of its own, and fails in as many ways
        return image


def is_opaque(image: Image.Image) -> bool:
    """Whether no pixel of an image is transparent."""
    return not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255


def resize(image: Image.Image, size: Size) -> Image.Image:
    """Resize to exactly this (width, height): bilinear, with antialiasing."""
    return image if image.size == size else image.resize(size, Image.Resampling.BILINEAR)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous().float() / 127.5 - 1


_PNG = b"\x89PNG\r\n\x1a\n"
# MPO counts as JPEG here: Pillow tells the two apart after opening.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# Photos that Pillow cannot read: skipping one silently would train on fewer photos than the user gave.
OTHER_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".psd"}


def _builtin(folder: str) -> PhotoFolder:
    from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos

    name = folder.removeprefix("builtin:")
    if name not in SUBJECTS:
        known = ", ".join(f"builtin:{known}" for known in SUBJECTS)
        raise UserError(f"no built-in subject {folder!r}.{did_you_mean(name, SUBJECTS)} Built in: {known}")
    return PhotoFolder(folder, tuple(Photo(f"{name}-{i}", image) for i, image in enumerate(render_photos(name), 1)))


def _decoded(
    source: Path | io.BytesIO, convert: Callable[[Image.Image], Image.Image], formats: tuple[str, ...] | None
) -> Image.Image:
    with Image.open(source, formats=formats) as image:
        image.load()
        return convert(image)


def _without_texts(path: Path) -> bytes | None:
    """A PNG without its chunks of text, which Pillow refuses where they are large or damaged; None: it has none."""
    content = path.read_bytes()
    if not content.startswith(_PNG):
        return None
    parts, start = [_PNG], len(_PNG)
    while start + 12 <= len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        kind = content[start + 4 : start + 8]
        if kind[:1].isupper() or kind in (b"tRNS", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"eXIf"):
            parts.append(content[start:end])
        start = end
    plain = b"".join(parts)
    return plain if len(plain) < len(content) else None


def _is_image(path: Path) -> bool:
    """By content, for files without a known suffix."""
    try:
        with Image.open(path, formats=_FORMATS):
            return True
    except Exception:  # whatever stops Pillow here: it has not recognised an image
        return False


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read: {os_error_reason(error)}"
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "the file is empty"
    if start[4:8] == b"ftyp" or path.suffix.lower() in OTHER_SUFFIXES:
        kind = path.suffix.removeprefix(".").upper() if path.suffix.lower() in OTHER_SUFFIXES else "HEIC or AVIF"
        return f"a photo in {kind} format, which cannot be read; export it as JPEG or PNG"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "not an image but a web page; download the photo again"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image in JPEG, PNG, WebP, MPO, BMP, TIFF or GIF format, or damaged"
    return f"a damaged image: {first_line(error)}"


def _srgb(image: Image.Image) -> Image.Image:
    """Convert by the embedded profile, so that a phone's wide-gamut photo keeps the colours that its owner sees."""
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
    """White is 65535 for 16 bits, for 32 the smallest 2^k - 1 that fits, from 255 on; for floats 1, 255 or 65535."""
    levels = np.asarray(image)
    if levels.dtype == np.int32 and levels.min() < 0:  # Pillow reads unsigned numbers as signed ones
        levels = levels.view(np.uint32)
    levels = np.nan_to_num(levels.astype(np.float64))
    largest = float(levels.max())
    if image.mode == "F":
        white = 1 if largest <= 1 else 255 if largest <= 255 else 65535
    else:
        white = 2 ** max(8 if image.mode == "I" else 16, int(largest).bit_length()) - 1
    if largest > white:
        raise ValueError(f"floating-point values up to {largest:g}, expected at most 1, 255 or 65535")
    return (levels.clip(0) / white * 255).round().astype(np.uint8)
