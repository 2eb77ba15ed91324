"""Downloads: one file from the web, resumed after an interruption and checked before it gets its name."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.files import BLOCK, finish, make_folder, sha1_of_file, unfinished_of
from ether_diffusion.progress import progress_bar
from ether_diffusion.version import __version__

ATTEMPTS, TIMEOUT = 5, 30


def download(url: str, path: Path, *, sha1: str | None = None) -> Path:
    """Fetch a file. A hidden file next to `path` collects its content, and a later call resumes an interrupted one.

    If the server cannot resume, or its file has changed, the whole file is fetched again.

    Args:
        path: The finished file; only a complete and correct download replaces it.
        sha1: The SHA-1 of its content, in hexadecimal; None: not known.

    Raises:
        UserError: The server cannot be reached or refuses, the connection breaks again and again, or the content does
            not have the given SHA-1. One line.
        OSError: The file cannot be written.
    """
    partial = unfinished_of(path)
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(partial)
        reason = _fetch(url, partial)
        if reason is None:
            break
        # After an attempt without progress, the next one would make none either.
        if attempt == ATTEMPTS or _size(partial) == before:
            kept = f"; {_size(partial):,} bytes are kept" if _size(partial) else ""
            raise UserError(f"{url} cannot be fetched: {reason}{kept}")
    _version_file(partial).unlink(missing_ok=True)
    if sha1 is not None and (found := sha1_of_file(partial)) != sha1:
        partial.unlink()  # resuming it would end the same way
        raise UserError(f"{url}: its content has SHA-1 {found}, expected {sha1}; the download was deleted")
    finish(path)
    return path


def _fetch(url: str, partial: Path) -> str | None:
    """Fetch the missing rest; returns the reason if some of it is still missing."""
    start, version = _size(partial), _version_file(partial)
    headers = {"User-Agent": f"ether-diffusion/{__version__}"}
    if start and version.is_file():
        # If-Range: the rest if the file is still the same, else all of it.
        headers |= {"Range": f"bytes={start}-", "If-Range": version.read_text(encoding="utf-8")}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no bytes follow those that were fetched
            total = error.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(start):
                return None
            partial.unlink()
            return _fetch(url, partial)
        return f"the server answers {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return str(getattr(error.reason, "strerror", None) or error.reason)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    with answer:
        if answer.status != 206:
            start = 0
        total = _total(answer.headers, start)
        make_folder(partial.parent)
        _save_version(answer.headers, version)
        with (
            partial.open("ab" if start else "wb") as file,
            progress_bar(total, url.rsplit("/", 1)[-1], "B", initial=start, scaled=True) as bar,
        ):
            while True:
                try:
                    chunk = answer.read(BLOCK)
                except http.client.IncompleteRead as error:
                    file.write(error.partial)
                    return "the connection broke"
                except (OSError, http.client.HTTPException):
                    return "the connection broke"
                if not chunk:
                    break
                file.write(chunk)
                bar.update(len(chunk))
    return "the connection broke" if total is not None and _size(partial) < total else None


def _total(headers: Mapping[str, str], start: int) -> int | None:
    length = headers.get("Content-Length")
    return start + int(length) if length and length.isdigit() else None


def _save_version(headers: Mapping[str, str], version: Path) -> None:
    """Save the header by which the server identifies this version of the file; without one no download resumes."""
    etag = headers.get("ETag") or ""
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if validator:
        version.write_text(validator, encoding="utf-8")
    else:
        version.unlink(missing_ok=True)


def _version_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
