"""Files and folders: written whole or not at all, digested; checkpoints by step; an OSError as one line.

No other module makes partial files, computes digests or spells the name of a checkpoint's folder.

Several processes may write the same file or folder, on one machine or over a shared folder: each writes to a hidden
folder that carries its host, process and thread, and a rename puts the result in place, so that a reader finds one
writer's content and never a mixture. What killed processes of this machine left in a folder goes when another process
first writes there. All that is written has the permissions that the process's umask states.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from .errors import UserError

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""

BLOCK = 1 << 20
"""Bytes that are read or written at a time where files may be larger than the memory."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, and its folder if it is missing; a crash leaves what was there before."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_file(path: Path, *, sync: bool = True, unless: Callable[[Path, Path], bool] | None = None) -> Iterator[Path]:
    """Yield a name next to `path` to write to; the file takes `path` when the block ends, and goes if it fails.

    A link keeps its place, and what it points to is replaced. A device or a pipe, such as /dev/stdout, is written to
    directly.

    Args:
        sync: Have the content on the disk before the rename, so that a power failure leaves no empty file. False saves
            milliseconds a file, for caches whose files are checked when they are read.
        unless: Gets `path` and the complete new file. If it returns True, `path` stays as it is.

    Raises:
        OSError: The file cannot be written; also in the place of safetensors' own error.
    """
    path = _resolved(path) if path.is_symlink() else path
    if _is_device(path):
        yield path
        return
    hidden = partial_of(path)
    try:
        make_folder(path.parent)
        _sweep_once(path.parent)
        hidden.mkdir(exist_ok=True)
        # Within a folder of its own: libraries make further temporary files next to the one that they write.
        partial = hidden / CONTENT
        yield partial
        if unless is not None and unless(path, partial):
            return
        partial.chmod(stat.S_IMODE(hidden.stat().st_mode) & 0o666)
        if sync:
            _sync_file(partial)
        partial.replace(path)
    except Exception as error:
        _raise_system_error(error, path)
    finally:
        _remove(hidden)


@contextlib.contextmanager
def whole_folder(path: Path, *, replace: bool = True, sync: bool = True) -> Iterator[Path]:
    """Yield an empty folder next to `path` to fill; it takes the place of `path` when the block ends.

    If the block fails, the folder goes, and an older one at `path` stays as it was. What killed processes of this
    machine left of earlier attempts is removed.

    Args:
        replace: Of several writers the last one wins. False: the first one wins, and an older folder stays too.
        sync: As for `whole_file`; False for thousands of files that can be made again.

    Raises:
        OSError: The folder cannot be written, or `path` is a file; also in the place of safetensors' own error.
    """
    path = _resolved(path) if path.is_symlink() else path
    if path.is_file():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial, previous = partial_of(path), _hidden(path, "previous")
    try:
        make_folder(path.parent)
        _sweep(path.parent)
        _remove(partial, previous)
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file() and not file.is_symlink():
                file.chmod(stat.S_IMODE(partial.stat().st_mode) & 0o666)
                if sync:
                    _sync_file(file)
        _put_in_place(partial, path, previous, replace=replace)
    except Exception as error:
        _raise_system_error(error, path)
    finally:
        _remove(partial, previous)


def partial_of(path: Path) -> Path:
    """The hidden name next to `path` that this thread of this process writes to before the rename."""
    return _hidden(path, "partial")


def unfinished_of(path: Path) -> Path:
    """The hidden name next to `path` where its content is collected over several calls, until `finish`."""
    return path.with_name(f".{path.name}.partial")


def finish(path: Path) -> None:
    """Give the complete file at `unfinished_of(path)` its name."""
    _sync_file(unfinished_of(path))
    unfinished_of(path).replace(path)


def digest_of(*contents: bytes | str) -> str:
    """SHA-256 of the contents one after the other, as hexadecimal digits."""
    return Digest().update(*contents).hex()


def short_digest(*contents: bytes | str, size: int = 16) -> str:
    """BLAKE2b of the contents one after the other in `size` bytes, as hexadecimal digits: for names and cache keys."""
    return Digest(size).update(*contents).hex()


def digest_of_json(value: Any, **options: Any) -> str:
    """SHA-256 of a value as JSON. `options` are `json.dumps`'s."""
    return digest_of(json.dumps(value, **options))


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha1_of_file(path: Path) -> str:
    """SHA-1 of a file's content, which some data sets publish. It finds damage, not malice."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()


class Digest:
    """A digest that grows part by part; text counts as UTF-8. SHA-256, or BLAKE2b where a `size` in bytes is given."""

    def __init__(self, size: int | None = None) -> None:
        self._hash = hashlib.sha256() if size is None else hashlib.blake2b(digest_size=size)

    def update(self, *contents: bytes | str) -> Digest:
        """Add contents; returns the digest itself."""
        for content in contents:
            self._hash.update(content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content)
        return self

    def hex(self) -> str:
        """The digest so far, as hexadecimal digits."""
        return self._hash.hexdigest()

    def bytes(self) -> bytes:
        """The digest so far."""
        return self._hash.digest()


def checkpoint_name(step: int) -> str:
    """`step-000200`: the name of the folder, or the stem of the picture, that belongs to a step."""
    return f"step-{step:06d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if it is not one."""
    name = re.fullmatch(r"step-(\d+)", path.name)
    return int(name[1]) if name else None


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders in `root`, a run's `checkpoints/`, the lowest step first: by number, not by text."""
    found = [path for path in root.iterdir() if step_of(path) is not None] if root.is_dir() else []
    return sorted(found, key=lambda path: (step_of(path) or 0, path.name))


def cache_folder(name: str) -> Path:
    """The folder of files that can be computed again: `~/.cache/ether_diffusion/NAME`, or under XDG_CACHE_HOME."""
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise UserError("no home directory for caches: set HOME or XDG_CACHE_HOME") from None
    return Path(root) / "ether_diffusion" / name


def make_folder(path: Path) -> Path:
    """Make a folder, and those above it; a link to a folder that is not there stays, and its target is made."""
    _resolved(path).mkdir(parents=True, exist_ok=True)
    return path


def check_can_write(folder: Path) -> None:
    """Try to make a folder and a file in it, and remove what was made: a fault shows before long work.

    Raises:
        OSError: that is impossible.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        make_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="."):
            pass
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def check_free(folder: Path, setting: str, remedy: str) -> None:
    """Refuse an output folder that is a file or holds something besides what killed processes left.

    Args:
        setting: The setting or option that named it, for the message.
        remedy: What to do about a folder that is not empty, as a sentence.

    Raises:
        UserError: it is not free. Nothing is written.
    """
    if folder.exists() and not folder.is_dir():
        kind = "a file" if folder.is_file() else "a device or a pipe"
        raise UserError(f"{setting}: {folder} is {kind}; expected a folder, new or empty.")
    if folder.is_dir():
        _sweep(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{setting}: {folder} is not empty. {remedy}")


def os_error_line(error: OSError) -> str:
    """One line for an `OSError`: what failed, the file, the reason, what to do where that is known, what remains."""
    files = dict.fromkeys(_target(str(file)) for file in (error.filename, error.filename2) if file)
    failed, *remains = [*getattr(error, "__notes__", ()), ""][:2]
    if failed and any(failed.endswith(file) for file in files):
        files = {}
    return " ".join(
        [": ".join([*filter(None, (failed, " -> ".join(files))), os_error_reason(error)]), *filter(None, remains)]
    )


def os_error_reason(error: OSError) -> str:
    """Why an `OSError` occurred, and what to do where that is known: sentences without the file."""
    reason = " ".join((error.strerror or str(error) or type(error).__name__).split()).rstrip(".")
    remedy = {
        errno.ENOSPC: " Free some space on that disk and run the command again.",
        errno.EDQUOT: " Free some space in your quota and run the command again.",
        errno.EROFS: " Choose an output folder that can be written to.",
        errno.EACCES: " Check the permissions of that path.",
        errno.EPERM: " Check the permissions of that path.",
        errno.EMFILE: " Raise the limit of open files (ulimit -n).",
        errno.ENAMETOOLONG: " Choose a shorter name.",
        errno.ENOTDIR: " A part of that path is a file.",
        errno.EEXIST: " Choose another name, or move away what is there.",
        errno.EFBIG: " Raise the limit of a file's size (ulimit -f).",
        errno.ELOOP: " A link leads back to itself.",
        errno.EIO: " The disk or its connection may be failing.",
    }.get(error.errno or 0, "")
    return f"{reason}.{remedy}"


CONTENT = "content"
"""The name of a file in the hidden folder that it is written in."""

_HIDDEN = r"\.(?P<target>[^/\\]+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-\d+\.(?P<kind>partial|previous)"
_CUT = "~"


def _hidden(path: Path, kind: str) -> Path:
    """A name that no other thread, process or host uses."""
    target, name = path.name, os.fsencode(path.name)
    if len(name) > 200:  # most systems take 255 bytes
        target = name[:180].decode("utf-8", "ignore") + _CUT + short_digest(repr(name), size=4)
    return path.with_name(f".{target}.{_host()}-{os.getpid()}-{threading.get_native_id()}.{kind}")


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except RuntimeError:  # pathlib's own error for a loop of links
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


def _is_device(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _host() -> str:
    return short_digest(socket.gethostname(), size=3)


def _target(file: str) -> str:
    """A file's name as the user knows it, where a hidden one is what failed."""
    return re.sub(rf"(?<![^/\\]){_HIDDEN}(/{CONTENT}$)?(?![^/\\])", r"\g<target>", file)


@lru_cache(maxsize=1024)
def _sweep_once(folder: Path) -> None:
    _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left in a folder; what they had moved away last is put back."""
    for leftover in folder.iterdir():
        name = re.fullmatch(_HIDDEN, leftover.name)
        if not name or name["host"] != _host() or _is_running(int(name["pid"])):
            continue
        if name["kind"] == "previous" and _CUT in name["target"]:
            continue  # its own name is not known
        if name["kind"] == "previous" and not (folder / name["target"]).exists():
            with contextlib.suppress(OSError):  # another process has put it back, or its own in place
                leftover.replace(folder / name["target"])
        else:
            _remove(leftover)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl-C
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _put_in_place(partial: Path, path: Path, previous: Path, *, replace: bool) -> None:
    """Two renames: a folder that holds something cannot be renamed over. Another writer may come in between."""
    failure: OSError | None = None
    for _ in range(100):
        if replace:
            with contextlib.suppress(FileNotFoundError):
                path.replace(previous)
        elif path.is_dir():
            return
        try:
            partial.replace(path)
            return
        except OSError as error:
            failure = error
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                break
            _remove(previous)
    if previous.exists() and not path.exists():
        previous.replace(path)
    assert failure is not None
    raise failure


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # a file: earlier versions wrote files under such names
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    """Have a file on the disk before a rename declares it complete."""
    with path.open("r+b" if os.name == "nt" else "rb") as file:  # Windows syncs only what it may write
        os.fsync(file.fileno())


def _raise_system_error(error: Exception, path: Path) -> NoReturn:
    """Raise the error with what failed and what remains; safetensors' own error for a full disk becomes an OSError."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    if not isinstance(error, OSError) and found and os.name != "nt":
        cause, error = error, OSError(int(found[1]), os.strerror(int(found[1])), str(path))
        error.__cause__ = cause
    if isinstance(error, OSError) and not hasattr(error, "__notes__"):
        error.add_note(f"cannot write {path}")
        error.add_note("What was there before is unchanged." if os.path.lexists(path) else "Nothing was written there.")
    raise error
