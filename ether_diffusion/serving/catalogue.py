"""The adapters that a server offers: those that are in a folder, or on a shelf, at the moment of a request."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.adapters.bankable import CONDITION_ENCODER
from ether_diffusion.adapters.saved_adapter import BEFORE, CONFIG, TEXT_ENCODER, VAE, WEIGHTS, find_adapter
from ether_diffusion.adapters.shelf import LONGEST_NAME, Shelf
from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherConfig
from ether_diffusion.input_files import check_file, check_folder, read_object

from .serve_settings import ServeSettings

Mark = tuple[int, ...]
"""Of files: their numbers, sizes and times, which change when another adapter takes their place."""
LISTED_FOR = 1.0
"""Seconds for which a list of a folder's adapters is answered again without looking."""


class Catalogue(ABC):
    """Names of adapters, each with the mark of its present content."""

    @abstractmethod
    def mark(self, name: str) -> Mark | None:
        """The mark of an adapter; None: there is none of this name. Cheap: it looks at this one alone."""

    @abstractmethod
    def list(self) -> dict[str, int]:
        """The names of all adapters, in their order, each with the time in seconds at which it was made."""


def open_catalogue(settings: ServeSettings) -> FolderCatalogue | ShelfCatalogue:
    """The catalogue of a folder or a shelf.

    Raises:
        UserError: neither is there; or a shelf of another base.
    """
    path = settings.adapters
    if path.is_file():
        return ShelfCatalogue(path, settings)
    check_folder(path, "a folder of adapters, or a shelf (ether-diffusion shelf build)")
    return FolderCatalogue(path, settings)


@dataclass(frozen=True)
class Found:
    """An adapter of the folder as it was when it was looked at."""

    folder: Path
    mark: Mark
    fault: str | None
    """Why it is not served."""


class FolderCatalogue(Catalogue):
    """The entries of a folder that are ETHER or ETHER+ adapters of the server's base.

    What is not served, and why, is printed once to standard error; clients do not see it, because it holds paths.
    """

    def __init__(self, folder: Path, settings: ServeSettings) -> None:
        self.folder, self._settings = folder, settings
        self._seen: dict[str, Found] = {}
        self._listed: tuple[float, dict[str, int]] = (-LISTED_FOR, {})

    def mark(self, name: str) -> Mark | None:
        found = self.find(name)
        return found.mark if found is not None and found.fault is None else None

    def list(self) -> dict[str, int]:
        now = time.monotonic()
        if now - self._listed[0] >= LISTED_FOR:
            try:
                names = sorted(entry.name for entry in self.folder.iterdir())
            except OSError:  # the folder itself is gone
                names = []
            for gone in self._seen.keys() - set(names):
                self._seen.pop(gone, None)
            found = {name: self.find(name) for name in names}
            times = {name: one.mark[-1] // 10**9 for name, one in found.items() if one is not None and not one.fault}
            self._listed = now, times
        return self._listed[1]

    def find(self, name: str) -> Found | None:
        """An entry that holds an adapter, servable or not; None: there is none of this name."""
        if not _is_plain(name) or name == base_id(self._settings.base):
            return None
        try:
            folder = find_adapter(self.folder / name)
            mark = mark_of(folder / CONFIG, folder / WEIGHTS)
        except (UserError, OSError):
            return None
        seen = self._seen.get(name)
        if seen is None or (seen.folder, seen.mark) != (folder, mark):
            seen = self._seen[name] = Found(folder, mark, self._fault(folder))
            if seen.fault is not None:
                print(f"ether-diffusion: {folder} is not served: {seen.fault}", file=sys.stderr)
        return seen

    def refuse(self, name: str, reason: str) -> None:
        """Do not serve an adapter as it is: its content turned out to be faulty."""
        seen = self._seen.get(name)
        if seen is not None and seen.fault is None:
            self._seen[name] = Found(seen.folder, seen.mark, reason)
            print(f"ether-diffusion: {seen.folder} is not served: {reason}", file=sys.stderr)

    def _fault(self, folder: Path) -> str | None:
        """What speaks against serving an adapter, as far as its settings show it."""
        try:
            values = read_object(folder / CONFIG)
            vae = read_object(folder / VAE).get("vae") if (folder / VAE).is_file() else None
        except UserError as error:
            return str(error)
        if values.get("peft_type") != EtherConfig().peft_type:
            return f"its method is {values.get('peft_type')!r:.60}; a bank is for ETHER and ETHER+."
        for part in (TEXT_ENCODER, BEFORE, f"../{CONDITION_ENCODER}"):
            if (folder / part).is_dir():
                return f"it needs its {part.removeprefix('../')}/, which a bank of UNet adapters does not hold."
        return _other_base(values, vae, self._settings)


class ShelfCatalogue(Catalogue):
    """The adapters on a shelf. If another file takes its place, those of that one; a faulty one is not taken."""

    def __init__(self, path: Path, settings: ServeSettings) -> None:
        self.path, self._settings = path, settings
        self._tried = self.file_mark()
        self.shelf, self.opened = self._open(), self._tried

    def file_mark(self) -> Mark:
        return mark_of(self.path)

    def mark(self, name: str) -> Mark | None:
        self._refresh()
        return self.opened if name in self.shelf else None

    def list(self) -> dict[str, int]:
        self._refresh()
        return dict.fromkeys(self.shelf.names, self.opened[-1] // 10**9)

    def _refresh(self) -> None:
        try:
            mark = self.file_mark()
        except OSError:  # it is being replaced, or gone: what is mapped stays
            return
        if mark == self._tried:
            return
        self._tried = mark
        try:
            self.shelf, self.opened = self._open(), mark
        except UserError as error:
            print(f"ether-diffusion: the shelf before it is still served: {error}", file=sys.stderr)

    def _open(self) -> Shelf:
        shelf = Shelf(check_file(self.path))
        fault = _other_base(shelf.contents.settings, shelf.contents.vae, self._settings)
        if fault is not None:
            raise UserError(f"{self.path}: {fault}")
        return shelf


def mark_of(*files: Path) -> Mark:
    """The mark of files; its last number is the time in nanoseconds at which the last one was written.

    Raises:
        OSError: one of them is not there.
    """
    stats = [file.stat() for file in files]
    return tuple(number for stat in stats for number in (stat.st_ino, stat.st_size, stat.st_mtime_ns))


def base_id(base: str) -> str:
    """What clients call the base: its name; of a path only the last part, because the rest is the server's own."""
    return Path(base).resolve().name if Path(base).exists() else base


def _is_plain(name: str) -> bool:
    """Whether a name can be an entry of a folder, and not a path."""
    is_path = any(separator in name for separator in filter(None, ("/", "\\", os.sep, os.altsep)))
    return 0 < len(name) <= LONGEST_NAME and name.isprintable() and not is_path and not name.startswith(".")


def _other_base(values: Mapping[str, Any], vae: str | None, settings: ServeSettings) -> str | None:
    """How the base that an adapter states differs from the server's; None: it does not."""
    for what, its, own in (
        ("base", values.get("base_model_name_or_path"), settings.base),
        ("revision", values.get("revision"), settings.revision),
        ("VAE", vae, settings.vae),
    ):
        if its != own and not (what == "base" and its is None):
            return f"its {what} is {its}, the server's {own}."
    return None
