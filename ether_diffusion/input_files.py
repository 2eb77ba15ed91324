"""Files and folders that are read: looked at before they are opened, so that no pipe, socket or device is ever opened.

Every reader of the package goes through `check_file`, `check_folder` or the functions that use them.
"""

from __future__ import annotations

import json
import stat
import unicodedata
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean
from .files import os_error_reason


def check_file(path: Path) -> Path:
    """The path itself, if an ordinary file is there. Nothing is opened.

    Raises:
        UserError: Nothing is there, or a folder, a named pipe, a socket or a device.
    """
    mode = _mode(path)
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: {_kind(mode)}; expected a file")
    return path


def check_folder(path: Path, expected: str = "a folder") -> Path:
    """The path itself, if a folder is there.

    Args:
        expected: What the folder should be or hold, for the message.

    Raises:
        UserError: Nothing is there, or no folder; with the most similar name next to it.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such folder.{did_you_mean(path.name, siblings)} Expected {expected}") from None
    except (OSError, ValueError) as error:
        raise UserError(_unreadable(path, error)) from None
    if not stat.S_ISDIR(mode):
        raise UserError(f"{path}: {_kind(mode)}, not a folder. Expected {expected}")
    return path


def list_folder(folder: Path) -> list[Path]:
    """The entries of a folder in the order of their names, hidden ones left out.

    Raises:
        UserError: The folder cannot be read; a named pipe, socket or device in it; a name that is not UTF-8.
    """
    try:
        entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        raise UserError(_unreadable(folder, error)) from None
    for entry in entries:
        _check_entry(entry)
    return entries


def check_tree(folder: Path) -> Path:
    """The folder itself, if all that is in it are files and folders: for readers of other libraries.

    Raises:
        UserError: A named pipe, a socket or a device.
    """
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else [folder]:
        _check_entry(path)
    return folder


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises UserError, as `check_file` and where it cannot be read."""
    try:
        return check_file(path).read_bytes()
    except OSError as error:
        raise UserError(_unreadable(path, error)) from None


def read_text(path: Path) -> str:
    """The content of a text file: UTF-8, without a byte order mark; line breaks become line feeds.

    Raises:
        UserError: The file and the reason why it cannot be read.
    """
    content = read_bytes(path)
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: UTF-16 text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}: not UTF-8 text (line {line})") from None
    if "\0" in text:
        raise UserError(f"{path}: not a text file (it holds NUL bytes)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises UserError, as `read_text` and where it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{path}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, as `read_json` and for any other value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {value!r:.60}.")
    return value


def same_name(name: str) -> str:
    """A name in the form in which names are compared: systems write `é` as one character or as two (NFC, NFD)."""
    return unicodedata.normalize("NFC", name)


def find_same(path: Path) -> Path:
    """The path, or what is next to it under the same name in the other form of letters (NFC, NFD)."""
    if path.exists() or not path.parent.is_dir():
        return path
    name = same_name(path.name)
    return next((entry for entry in list_folder(path.parent) if same_name(entry.name) == name), path)


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        reason = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise UserError(f"{path}: {reason}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(_unreadable(path, error)) from None


def _check_entry(path: Path) -> None:
    try:
        path.name.encode("utf-8")
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!r}: a name that is not UTF-8; rename it") from None
    except OSError:
        return  # a link to nowhere: nothing there can be opened
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: {_kind(mode)}; expected files and folders alone. Move it away")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    return f"{path}: cannot be read: {os_error_reason(error) if isinstance(error, OSError) else error}"
