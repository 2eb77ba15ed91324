"""A subject: its photos with prompt, captions and masks, and images of its class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from ether_diffusion.data.captions import list_texts, photo_captions
from ether_diffusion.data.masks import read_masks
from ether_diffusion.data.photos import PhotoFolder, find_photos


@dataclass(frozen=True)
class Subject:
    """One subject of a run. Class images that are generated later come in by `dataclasses.replace(subject, ...)`."""

    photos: PhotoFolder
    instance_prompt: str
    class_folder: PhotoFolder | None = None
    class_prompt: str = ""
    captions: Mapping[str, str] = field(default_factory=dict)
    """By photo name; they replace the instance prompt."""
    masks: Mapping[str, Image.Image] | None = None
    """By photo name, 8-bit grey; None: every pixel counts."""
    notes: tuple[str, ...] = ()
    """Notes for the user on captions and masks, one line each."""

    def __post_init__(self) -> None:
        if self.class_folder is not None and not self.class_prompt:
            raise ValueError("class images need a class_prompt")


def find_subject(
    folder: str | Path,
    instance_prompt: str,
    *,
    class_prompt: str = "",
    captions: bool = False,
    masks: str | Path | None = None,
) -> Subject:
    """The photos of a folder with their captions, if asked for, and with the masks of another folder, if given.

    Raises:
        UserError: Faults of photos, captions or masks, one line per file.
    """
    photos, by_photo, grey, notes = find_photos(folder), {}, None, []
    if captions:
        found = photo_captions(photos)
        by_photo, notes = found.by_name, found.notes
        texts = {file.name for file in list_texts(Path(photos.folder).expanduser())}
        photos = replace(photos, skipped=tuple(entry for entry in photos.skipped if entry[0] not in texts))
    if masks is not None:
        grey, more = read_masks(masks, photos)
        notes += more
    return Subject(photos, instance_prompt, None, class_prompt, by_photo, grey, tuple(notes))
