"""Zip archives: unpacked into a folder and nowhere else; files that are there already are kept."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.files import BLOCK, make_folder, whole_file
from ether_diffusion.input_files import check_file
from ether_diffusion.progress import progress_bar


def unpack(archive: Path, to: Path, place: Callable[[str], str | None]) -> int:
    """Unpack files, each whole or not at all, and return their number. Files that are there with the same content stay.

    All names are checked before anything is written. `place` maps a member's name to its path under `to`; None leaves
    it out.

    Raises:
        UserError: Not a zip archive, or a damaged one; a member that is a link, is encrypted or would lie outside of
            `to`; a file that is there with other content; too little space.
        OSError: A file cannot be written.
    """
    check_file(archive)
    try:
        with zipfile.ZipFile(archive) as opened:
            planned = _plan(opened, archive, to, place)
            needed = sum(member.file_size for member, _ in planned)
            make_folder(to)
            free = shutil.disk_usage(to).free
            if needed > free:
                raise UserError(f"{to}: {needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free")
            with progress_bar(needed, f"unpacking {archive.name}", "B", scaled=True) as bar:
                for member, path in planned:
                    with (
                        whole_file(path, sync=False) as partial,
                        opened.open(member) as source,
                        partial.open("wb") as target,
                    ):
                        shutil.copyfileobj(source, target, BLOCK)  # zipfile compares the checksum at the end
                    bar.update(member.file_size)
            return len(planned)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{archive}: not a complete zip archive ({error}); delete it") from error


def _plan(
    opened: zipfile.ZipFile, archive: Path, to: Path, place: Callable[[str], str | None]
) -> list[tuple[zipfile.ZipInfo, Path]]:
    planned: dict[Path, zipfile.ZipInfo] = {}
    for member in opened.infolist():
        fault = _fault(member)
        if fault:
            raise UserError(f"{archive}: {member.filename!r} {fault}; nothing was unpacked")
        name = None if member.is_dir() else place(member.filename)
        if name is None:
            continue
        path = to / name
        if path in planned:
            raise UserError(f"{archive}: {member.filename!r} occurs twice; nothing was unpacked")
        if not path.resolve().is_relative_to(to.resolve()):
            raise UserError(f"{path}: a link leads out of {to}; nothing was unpacked")
        planned[path] = member
    return [(member, path) for path, member in planned.items() if not _is_there(path, member)]


def _fault(member: zipfile.ZipInfo) -> str | None:
    # `orig_filename`: zipfile itself cuts names at a NUL and replaces the system's own separators.
    name = member.orig_filename
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        return "would lie outside of the folder"
    if "\\" in name or "\0" in name:
        return "has a name that other systems read differently"
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device"
    return "is encrypted" if member.flag_bits & 1 else None


def _is_there(path: Path, member: zipfile.ZipInfo) -> bool:
    if not path.exists():
        return False
    if not path.is_file():
        raise UserError(f"{path}: expected a file, found a folder or a device; move it away")
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(BLOCK):
            checksum = zlib.crc32(chunk, checksum)
    if checksum != member.CRC or path.stat().st_size != member.file_size:
        raise UserError(f"{path}: it is there already and differs from the archive's file; move it away")
    return True
