"""The public data sets of the paper: their addresses, their contents, and how to fetch them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.files import sha1_of_file

from .archives import unpack
from .download import download


@dataclass(frozen=True)
class PublicSet:
    """A data set in one zip archive."""

    url: str
    archive: str
    """The archive's file name, as a browser would save it."""
    size: str
    root: str
    """Pattern of the one folder in the archive that holds everything."""
    folder: str
    """The name of that folder after unpacking."""
    counts: Mapping[str, int]
    """The number of files of each pattern."""
    licence: str
    use: str
    """Settings of a run that trains on it; `{folder}` stands for its folder."""
    before: str | None = None
    """One line on what to do before a training; `{folder}` as in `use`."""
    sha1: str | None = None

    def lacking(self, folder: Path) -> str | None:
        """What a folder lacks of the complete data set; None: it is complete."""
        for pattern, wanted in self.counts.items():
            found = sum(1 for path in folder.glob(pattern) if not path.name.startswith("."))
            if found < wanted:
                return f"{found:,} of {wanted:,} {pattern}"
        return None


PUBLIC_SETS = {
    "dreambooth": PublicSet(
        url="https://github.com/google/dreambooth/archive/refs/heads/main.zip",
        archive="dreambooth-main.zip",
        size="112 MB",
        root="dreambooth-*",
        folder="dreambooth",
        # GitHub makes a new archive for each request, so that it has no fixed digest: zip's own checksums check it.
        counts={"dataset/prompts_and_classes.txt": 1, "dataset/*/*.jpg": 158},
        licence="CC BY 4.0; credits in dataset/references_and_licenses.txt",
        use="data.instance_dir={folder}/dataset/dog data.class_name=dog",
    ),
    "ade20k": PublicSet(
        url="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
        archive="ADEChallengeData2016.zip",
        size="1 GB",
        root="ADEChallengeData2016",
        folder="ADEChallengeData2016",
        counts={
            "images/training/*.jpg": 20210,
            "images/validation/*.jpg": 2000,
            "annotations/training/*.png": 20210,
            "annotations/validation/*.png": 2000,
        },
        licence="BSD 3-Clause; for the images, ADE20K's terms of use",
        use="data.dataset_dir={folder}",
        before="It has no captions. BLIP writes them: ether-diffusion data caption {folder}, and again with "
        "--split validation",
        sha1="219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",  # as GluonCV's prepare_ade20k.py states it
    ),
}


def fetch_set(which: PublicSet, to: str | Path) -> tuple[Path, int]:
    """Complete a data set in `to` from files and an archive that are there, or else from the web.

    Returns its folder and the number of files written. Raises UserError with what to fetch by hand, and where to put
    it.
    """
    to = Path(to).expanduser()
    folder, archive = to / which.folder, to / which.archive
    if which.lacking(folder) is None:
        return folder, 0
    try:
        if not archive.is_file():
            download(which.url, archive, sha1=which.sha1)
        elif which.sha1 is not None and (found := sha1_of_file(archive)) != which.sha1:
            raise UserError(f"{archive}: its SHA-1 is {found}, expected {which.sha1}; move it away")
        written = unpack(archive, to, lambda name: _placed(name, which))
    except UserError as error:
        what = "it" if which.url in str(error) else which.url
        by_hand = f"Fetch {what} by hand ({which.size}), put it at {archive}, and run the command again."
        raise UserError(f"{error}. {by_hand}") from error
    lacking = which.lacking(folder)
    if lacking:
        raise UserError(f"{archive}: not the complete data set: it has {lacking}. Fetch {which.url} again.")
    return folder, written


def _placed(name: str, which: PublicSet) -> str | None:
    root, _, rest = name.partition("/")
    return f"{which.folder}/{rest}" if rest and fnmatchcase(root, which.root) else None
