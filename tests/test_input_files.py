"""What is read: ordinary files alone, nothing else is opened; texts in UTF-8; a fault is one line."""

from __future__ import annotations

import os
import signal
import socket
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import (
    check_file,
    check_folder,
    check_tree,
    find_same,
    list_folder,
    read_object,
    read_text,
    same_name,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes, sockets and devices in folders")


@pytest.fixture(autouse=True)
def no_hangs() -> Iterator[None]:
    """Opening a pipe waits for its writer: such a test would never end."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the names of sockets are short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


MAKE: dict[str, Callable[[Path], object]] = {
    "a named pipe": os.mkfifo,
    "a socket": unix_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link to a file that is not there": lambda path: path.symlink_to("nowhere"),
    "no such file": lambda path: None,
    "Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
}


def fault(function: Callable[[Path], object], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        function(path)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("read", [check_file, read_text, read_object])
def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path, kind: str, read: Callable[[Path], object]) -> None:
    path = tmp_path / "input.json"
    MAKE[kind](path)
    line = fault(read, path)
    assert line.startswith(f"{path}: ")
    assert kind in line


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    assert fault(check_file, tmp_path / name).startswith(f"{tmp_path}/{name}: cannot be read: ")


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device"])
def test_a_folder_with_anything_but_files_and_folders_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "inner").mkdir()
    MAKE[kind](tmp_path / "inner/odd.png")
    assert list_folder(tmp_path) == [tmp_path / "inner"]
    for check, folder in ((list_folder, tmp_path / "inner"), (check_tree, tmp_path)):
        assert fault(check, folder).startswith(f"{tmp_path}/inner/odd.png: {kind}; expected files and folders alone")


def test_a_folder_is_listed_by_name_without_hidden_entries(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden", "c"):
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / ".pipe")
    assert [path.name for path in list_folder(tmp_path)] == ["a", "b", "c"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(b"")
    assert "a name that is not UTF-8; rename it" in fault(list_folder, tmp_path)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    assert fault(check_folder, tmp_path / "phtos").endswith("no such folder. Did you mean 'photos'? Expected a folder")
    os.mkfifo(tmp_path / "pipe")
    assert fault(check_folder, tmp_path / "pipe") == f"{tmp_path}/pipe: a named pipe, not a folder. Expected a folder"


def test_a_file_that_may_not_be_read_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a dog")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert fault(read_text, path) == f"{path}: cannot be read: Permission denied. Check the permissions of that path."


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"a dog\n", "a dog\n"),
        (b"\xef\xbb\xbfa dog\n", "a dog\n"),
        (b"a\r\nb\rc\n", "a\nb\nc\n"),
        ("ein Häuschen 犬 🙂".encode(), "ein Häuschen 犬 🙂"),
        (b"\xef\xbb\xbf", ""),
        (b"", ""),
    ],
)
def test_text_is_the_same_however_it_was_saved(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert read_text(tmp_path / "prompts.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\ncaf\xe9\n", "not UTF-8 text (line 3)"),
        ("a dog".encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a dog".encode("utf-16-le"), "not a text file (it holds NUL bytes)"),
        (bytes(100), "not a text file (it holds NUL bytes)"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert fault(read_text, tmp_path / "prompts.txt") == f"{tmp_path}/prompts.txt: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object, got [1]"),
        ("null", "expected a JSON object, got None"),
        ("{", "not JSON: "),
        ("", "not JSON: "),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_is_no_object(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert message in fault(read_object, tmp_path / "a.json")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")), st.booleans())
def test_any_text_is_read_as_it_was_written(tmp_path: Path, text: str, marked: bool) -> None:
    """Of all planes, with and without a byte order mark."""
    path = tmp_path / "text"
    path.write_bytes((b"\xef\xbb\xbf" if marked else b"") + text.encode())
    assert read_text(path) == text


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_names_are_found_in_either_form_of_their_letters(tmp_path: Path, stored: Any, asked: Any) -> None:
    name = "Häuschen é.png"
    (tmp_path / unicodedata.normalize(stored, name)).write_text("here")
    assert find_same(tmp_path / unicodedata.normalize(asked, name)).read_text() == "here"
    assert same_name(unicodedata.normalize(stored, name)) == unicodedata.normalize("NFC", name)
    assert find_same(tmp_path / "other.png") == tmp_path / "other.png"
