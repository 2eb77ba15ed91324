"""Images to score, subject by subject: which were drawn from which prompt, and which are missing, black or twice there.

Subjects are folders, matched by their whole names. What a protocol does not ask for is an error, not passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ether_diffusion.data.pair_files import listed
from ether_diffusion.data.photos import Photo, find_photos
from ether_diffusion.errors import UserError

from .image_lists import LIST, check_sampling, common, read_list
from .protocols import SubjectProtocol

BUILTIN = "builtin:"
LAYOUT = (
    f"expected a folder for each subject, and in it {LIST} (as `ether-diffusion generate` writes it), or a folder for "
    "each prompt, named as the prompt or by its number in the protocol (00, 01, …)"
)


@dataclass(frozen=True)
class SubjectImages:
    """What there is of one subject.

    Attributes:
        drawn: Files of each template of the protocol, in the order of their names; fewer than it asks for, or none,
            where images are missing.
        identifier: The word in the prompts that they were drawn from.
        facts: What the images themselves say of how they were made, the same for all.
        folder: Of the subject; the files lie in it.
    """

    name: str
    photos: tuple[Photo, ...]
    drawn: Mapping[str, tuple[Path, ...]]
    identifier: str
    facts: Mapping[str, Any]
    folder: Path = Path()


def find_images(
    protocol: SubjectProtocol, images: str | Path, real: str | Path, identifier: str | None = None
) -> list[SubjectImages]:
    """The subjects that `images` has folders of, in the order of their names.

    Args:
        images: Holds SUBJECT/images.jsonl with the files that it lists, or SUBJECT/PROMPT/ with files.
        real: Holds SUBJECT/ with photos; `builtin:` for the miniature's own.
        identifier: The word in the images' prompts, if it is not the protocol's.

    Raises:
        UserError: another layout; subjects or prompts that the protocol does not have; more images of a prompt than it
            takes; images that were drawn with other settings than it states; no photos.
    """
    images = Path(images)
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder; {LAYOUT}.")
    folders = [entry for entry in sorted(images.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise UserError(f"--images {images}: no folders in it; {LAYOUT}.")
    for folder in folders:
        protocol.entry(folder.name, str(folder))
    return [read_subject(protocol, folder, photos_of(folder.name, real), identifier) for folder in folders]


def photos_of(subject: str, real: str | Path) -> tuple[Photo, ...]:
    """A subject's photos in the order of their names. Raises UserError as `find_photos`."""
    return find_photos(f"{BUILTIN}{subject}" if str(real) == BUILTIN else Path(real) / subject).photos


def read_subject(
    protocol: SubjectProtocol, folder: Path, photos: Sequence[Photo], identifier: str | None = None
) -> SubjectImages:
    """The images in one subject's folder. Raises UserError as `find_images`."""
    subject, word = folder.name, protocol.identifier if identifier is None else identifier
    templates = protocol.templates(subject)
    by_prompt = {protocol.prompt(subject, template, word): template for template in templates}
    listed_there = (folder / LIST).is_file()
    rows = read_list(folder, ("file", "prompt")) if listed_there else _folder_rows(folder, list(by_prompt))
    check_sampling(protocol, folder, rows)
    drawn: dict[str, list[Path]] = {template: [] for template in templates}
    for row in rows:
        if row["prompt"] not in by_prompt:
            raise UserError(
                f"{folder}: {row['file']}: prompt {row['prompt']!r} is none of {protocol.name}'s for {subject} with "
                f"identifier {word!r}; expected one like {next(iter(by_prompt))!r}."
            )
        drawn[by_prompt[row["prompt"]]].append(folder / row["file"])
    for template, files in drawn.items():
        if len(files) > protocol.images_per_prompt or len(set(files)) < len(files):
            raise UserError(
                f"{folder}: {len(files)} images of {protocol.prompt(subject, template, word)!r}; {protocol.name} takes "
                f"{protocol.images_per_prompt}, each once."
            )
    there = {template: tuple(sorted(file for file in files if file.is_file())) for template, files in drawn.items()}
    return SubjectImages(subject, tuple(photos), there, word, common(rows), folder)


def pixel_digest(image: Image.Image) -> str:
    """Of what can be seen: the same for two files with the same pixels."""
    return hashlib.sha256(f"{image.size} ".encode() + image.convert("RGB").tobytes()).hexdigest()


def is_black(image: Image.Image) -> bool:
    """Black all over: what NaN or a safety checker leaves."""
    return image.convert("RGB").getbbox() is None


def duplicates(digests: Iterable[str]) -> int:
    """How many images repeat an earlier one."""
    digests = list(digests)
    return len(digests) - len(set(digests))


def _folder_rows(folder: Path, prompts: list[str]) -> list[dict[str, Any]]:
    """Of folders by prompt or number. Images beside them belong to no prompt."""
    stray, inner = listed(folder), [entry for entry in sorted(folder.iterdir()) if entry.is_dir()]
    if stray or not inner:
        found = f"{len(stray)} images without prompts" if stray else "nothing"
        raise UserError(f"{folder}: holds {found}; {LAYOUT}.")
    numbers = {f"{k:02d}": prompt for k, prompt in enumerate(prompts)}
    return [
        {"file": f"{entry.name}/{file.name}", "prompt": numbers.get(entry.name, entry.name)}
        for entry in inner
        if not entry.name.startswith(".")
        for file in listed(entry).values()
    ]
