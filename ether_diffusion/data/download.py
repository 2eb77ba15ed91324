"""One file from the web: resumed where it stopped, checked before it counts, and one line where there is no way."""

from __future__ import annotations

import hashlib
import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ether_diffusion.errors import UserError
from ether_diffusion.progress import progress_bar
from ether_diffusion.version import __version__

ATTEMPTS, TIMEOUT, CHUNK = 5, 30, 1 << 20


def download(url: str, path: Path, *, sha1: str | None = None) -> Path:
    """Fetch a file. What an interrupted call has fetched lies beside `path`, and the next call goes on from there.

    A server that cannot resume, or whose file has changed, is asked for the whole again.

    Args:
        path: Of the finished file, which is replaced only by a whole and right one.
        sha1: Of its content, in hexadecimal; None: it is not known.

    Raises:
        UserError: the server cannot be reached or refuses, the connection breaks again and again, the disk is full, or
            the content is another than the digest says. One line.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        for attempt in range(1, ATTEMPTS + 1):
            before = _size(partial)
            reason = _fetch(url, partial)
            if reason is None:
                break
            # Where a try has brought nothing, the next would not either.
            if attempt == ATTEMPTS or _size(partial) == before:
                kept = f"; {_size(partial):,} bytes are kept" if _size(partial) else ""
                raise UserError(f"{url} cannot be fetched: {reason}{kept}")
        _tag_file(partial).unlink(missing_ok=True)
        if sha1 is not None and (found := sha1_of(partial)) != sha1:
            partial.unlink()  # to go on from it would end the same way
            raise UserError(f"{url}: what came has SHA-1 {found}, expected {sha1}; it was deleted")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror or error}") from error
    return path


def sha1_of(path: Path) -> str:
    """Of a file's content, in hexadecimal: the digest that data sets publish. It tells damage, not malice."""
    digest = hashlib.sha1(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _fetch(url: str, partial: Path) -> str | None:
    """Fetch what is missing; the reason if something still is."""
    start, tag = _size(partial), _tag_file(partial)
    headers = {"User-Agent": f"ether-diffusion/{__version__}"}
    if start and tag.is_file():
        # If-Range: the rest of the same file, else the whole of what is there instead.
        headers |= {"Range": f"bytes={start}-", "If-Range": tag.read_text(encoding="utf-8")}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing follows what is there
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
        partial.parent.mkdir(parents=True, exist_ok=True)
        _remember(answer.headers, tag)
        with (
            partial.open("ab" if start else "wb") as file,
            progress_bar(total, url.rsplit("/", 1)[-1], "B", initial=start, scaled=True) as bar,
        ):
            while True:
                try:
                    chunk = answer.read(CHUNK)
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


def _remember(headers: Mapping[str, str], tag: Path) -> None:
    """Keep by what the server tells this file from a later one; without it nothing can be resumed."""
    etag = headers.get("ETag") or ""
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified")
    if validator:
        tag.write_text(validator, encoding="utf-8")
    else:
        tag.unlink(missing_ok=True)


def _tag_file(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.version")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
