"""Data sets from a server that breaks off, sends other content or is down; and archives with harmful names."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ether_diffusion.data import public_sets
from ether_diffusion.data.archives import unpack
from ether_diffusion.data.download import download
from ether_diffusion.data.public_sets import PUBLIC_SETS, PublicSet, fetch_set
from ether_diffusion.errors import UserError
from ether_diffusion_cli import main
from ether_diffusion_cli.data import DATA_SETS

FILES = {f"root-main/photos/{k}.jpg": bytes([k]) * 70_000 for k in range(3)} | {"root-main/about.txt": b"about"}
NOISE = {"other/else.txt": b"left out", "loose.txt": b"left out"}


def zipped(files: dict[str, bytes]) -> bytes:
    """Stored, not deflated: so that the archive is as large as its files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


@dataclass
class Server:
    """One file behind a real HTTP server, with the faults that are asked for."""

    content: bytes
    etag: str = '"1"'
    cut_after: list[int] = field(default_factory=list)
    """For each request to come, after how many bytes its connection breaks; then none breaks."""
    ranges: bool = True
    asked: list[str | None] = field(default_factory=list)
    """The Range of each request."""
    url: str = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        start = 0
        if self.ranges and wanted and request.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.content):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(self.content)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
        rest = self.content[start:]
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        request.send_header("Content-Length", str(len(rest)))
        request.send_header("ETag", self.etag)
        request.end_headers()
        request.wfile.write(rest[: self.cut_after.pop(0)] if self.cut_after else rest)
        request.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[[bytes], Server]]:
    """`serve(content)` starts a server for a file."""
    running: list[ThreadingHTTPServer] = []

    def start(content: bytes) -> Server:
        server = Server(content)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        running.append(http)
        server.url = f"http://127.0.0.1:{http.server_port}/set.zip"
        return server

    yield start
    for http in running:
        http.shutdown()
        http.server_close()


@pytest.fixture
def small(serve: Callable[[bytes], Server]) -> tuple[PublicSet, Server]:
    """A data set of four small files, and its server."""
    server = serve(zipped(FILES | NOISE))
    which = PublicSet(
        url=server.url,
        archive="set.zip",
        size="0.2 MB",
        root="root-*",
        folder="set",
        counts={"photos/*.jpg": 3, "about.txt": 1},
        licence="none",
        use="data.instance_dir={folder}/photos",
        sha1=hashlib.sha1(server.content).hexdigest(),
    )
    return which, server


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_set_is_fetched_unpacked_and_then_kept(small: tuple[PublicSet, Server], tmp_path: Path) -> None:
    which, server = small
    assert fetch_set(which, tmp_path) == (tmp_path / "set", 4)
    wanted = {name.removeprefix("root-main/"): content for name, content in FILES.items()}
    assert tree(tmp_path / "set") == wanted
    assert {path.name for path in tmp_path.iterdir()} == {"set", "set.zip"}
    (tmp_path / "set.zip").unlink()
    assert fetch_set(which, tmp_path) == (tmp_path / "set", 0)
    assert len(server.asked) == 1  # what is whole needs no network


def test_a_broken_connection_is_resumed(serve: Callable[[bytes], Server], tmp_path: Path) -> None:
    server = serve(zipped(FILES))
    server.cut_after = [60_000, 50_000]
    path = download(server.url, tmp_path / "file", sha1=hashlib.sha1(server.content).hexdigest())
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=60000-", "bytes=110000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_the_next_call_resumes_the_last_one(serve: Callable[[bytes], Server], tmp_path: Path) -> None:
    server = serve(zipped(FILES))
    server.cut_after = [100_000, 0]
    with pytest.raises(UserError, match=r" cannot be fetched: the connection broke; 100,000 bytes are kept$"):
        download(server.url, tmp_path / "file")
    assert not (tmp_path / "file").exists()
    assert download(server.url, tmp_path / "file").read_bytes() == server.content
    assert server.asked[-1] == "bytes=100000-"


@pytest.mark.parametrize("fault", ["another file by then", "no ranges"])
def test_without_resuming_all_is_fetched_again(serve: Callable[[bytes], Server], tmp_path: Path, fault: str) -> None:
    server = serve(zipped(FILES))
    server.cut_after = [100_000, 0]
    with pytest.raises(UserError):
        download(server.url, tmp_path / "file")
    if fault == "no ranges":
        server.ranges = False
    else:
        server.content, server.etag = zipped(FILES | NOISE), '"2"'
    assert download(server.url, tmp_path / "file").read_bytes() == server.content


def test_a_whole_file_that_was_not_yet_checked_is_not_fetched_again(
    serve: Callable[[bytes], Server], tmp_path: Path
) -> None:
    server = serve(zipped(FILES))
    (tmp_path / ".file.partial").write_bytes(server.content)
    (tmp_path / ".file.partial.version").write_text(server.etag)
    assert download(server.url, tmp_path / "file").read_bytes() == server.content
    assert server.asked == [f"bytes={len(server.content)}-"]


def test_content_with_another_digest_is_refused(small: tuple[PublicSet, Server], tmp_path: Path) -> None:
    which, server = small
    server.content = server.content[:-1] + b"x"
    with pytest.raises(UserError, match=r"its content has SHA-1 [0-9a-f]{40}, expected") as refused:
        fetch_set(which, tmp_path)
    assert "\n" not in str(refused.value)
    assert f"put it at {tmp_path / 'set.zip'}, and run the command again" in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "set.zip").write_bytes(server.content)  # a user's own file is refused, and not deleted
    with pytest.raises(UserError, match="move it away"):
        fetch_set(which, tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.zip"]


def test_an_archive_put_there_by_hand_needs_no_network(small: tuple[PublicSet, Server], tmp_path: Path) -> None:
    which, server = small
    (tmp_path / "set.zip").write_bytes(server.content)
    assert fetch_set(replace(which, url="http://127.0.0.1:9/set.zip"), tmp_path)[1] == 4


def test_existing_files_are_kept_and_missing_ones_added(small: tuple[PublicSet, Server], tmp_path: Path) -> None:
    which, _ = small
    fetch_set(which, tmp_path)
    kept, gone = tmp_path / "set/photos/0.jpg", tmp_path / "set/photos/1.jpg"
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert fetch_set(which, tmp_path)[1] == 1
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(b"mine")
    gone.unlink()
    with pytest.raises(UserError, match=r"0\.jpg: it is there already and differs from the archive's file"):
        fetch_set(which, tmp_path)
    assert kept.read_bytes() == b"mine"
    assert not gone.exists()


def test_an_archive_that_lacks_files_is_refused(small: tuple[PublicSet, Server], tmp_path: Path) -> None:
    which, _ = small
    with pytest.raises(UserError, match=r"not the complete data set: it has 3 of 9 photos/\*\.jpg"):
        fetch_set(replace(which, counts={"photos/*.jpg": 9}), tmp_path)


@pytest.mark.parametrize("cut", [0, 20, 100_000])
def test_an_incomplete_archive_is_refused(small: tuple[PublicSet, Server], tmp_path: Path, cut: int) -> None:
    which, server = small
    (tmp_path / "set.zip").write_bytes(server.content[:cut])
    with pytest.raises(UserError, match="not a complete zip archive"):
        fetch_set(replace(which, sha1=None), tmp_path)


def test_a_damaged_member_leaves_no_file(tmp_path: Path) -> None:
    content = zipped(FILES).replace(b"\x01" * 70_000, b"\x01" * 69_999 + b"\x02")
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"not a complete zip archive \(Bad CRC-32 for file 'root-main/photos/1.jpg'\)"):
        unpack(tmp_path / "set.zip", tmp_path / "to", lambda name: name)
    assert not (tmp_path / "to/root-main/photos/1.jpg").exists()


@pytest.mark.parametrize(
    "name", ["../out.txt", "a/../../out.txt", "/out.txt", "C:/out.txt", "..\\out.txt", "\\out.txt", "a\\b.txt"]
)
def test_names_that_lead_out_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "set.zip"
    archive.write_bytes(zipped({"good.txt": b"good", name: b"bad"}))
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(archive, tmp_path / "to", lambda name: name)
    assert tree(tmp_path).keys() == {"set.zip"}


def test_links_are_refused_in_the_archive_and_on_the_way(tmp_path: Path) -> None:
    archive, outside = tmp_path / "set.zip", tmp_path / "outside"
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr(link, str(outside))
    with pytest.raises(UserError, match="'link' is a link or a device; nothing was unpacked"):
        unpack(archive, tmp_path / "to", lambda name: name)
    outside.mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to/photos").symlink_to(outside)
    archive.write_bytes(zipped({"photos/0.jpg": b"0"}))
    with pytest.raises(UserError, match="a link leads out of"):
        unpack(archive, tmp_path / "to", lambda name: name)
    assert list(outside.iterdir()) == []


def test_the_command_says_in_one_line_what_to_fetch_by_hand(
    small: tuple[PublicSet, Server],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    which, _ = small
    assert DATA_SETS.keys() == PUBLIC_SETS.keys()
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "ade20k", replace(which, url="http://127.0.0.1:9/set.zip"))
    assert main(["data", "ade20k", "--to", str(tmp_path / "data")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert (
        "http://127.0.0.1:9/set.zip cannot be fetched: Connection refused. Fetch it by hand (0.2 MB), put it" in printed
    )
    assert f" at {tmp_path / 'data/set.zip'}, and run the command again." in printed
    assert not (tmp_path / "data").exists()
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "ade20k", which)
    assert main(["data", "ade20k", "--to", str(tmp_path / "data")]) == 0
    assert f"Train with data.instance_dir={tmp_path / 'data/set'}/photos" in capsys.readouterr().out


def test_captions_for_ade20k_are_mentioned_before_the_settings(
    small: tuple[PublicSet, Server],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    which, _ = small
    before = PUBLIC_SETS["ade20k"].before
    monkeypatch.setitem(public_sets.PUBLIC_SETS, "ade20k", replace(which, before=before))
    assert main(["data", "ade20k", "--to", str(tmp_path / "data")]) == 0
    printed = capsys.readouterr().out
    captions = f"ether-diffusion data caption {tmp_path / 'data/set'}, and again with --split validation"
    assert printed.index(captions) < printed.index("Train with")


def test_the_real_photos_match_the_table(shared: Path) -> None:
    """A developer's checkout has half of the subjects: every pattern finds files, and the others are missed."""
    lacking = PUBLIC_SETS["dreambooth"].lacking(shared / "data/dreambooth")
    found = len(list((shared / "data/dreambooth/dataset").glob("*/*.jpg")))
    assert lacking == f"{found} of 158 dataset/*/*.jpg"
