"""Files and folders: a crash leaves the old one, writers do not mix, checkpoints sort by number, an error is a line."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ether_diffusion import files
from ether_diffusion.errors import UserError
from ether_diffusion.exit_codes import exit_code
from ether_diffusion.files import (
    Digest,
    check_free,
    checkpoint_name,
    digest_of,
    digest_of_file,
    digest_of_json,
    finish,
    list_checkpoints,
    os_error_line,
    partial_of,
    sha1_of_file,
    short_digest,
    step_of,
    unfinished_of,
    whole_file,
    whole_folder,
    write_whole,
)

posix = pytest.mark.skipif(
    os.name == "nt", reason="modes, links, locks and names are as on Linux and macOS; Windows is not supported"
)


class Crash(Exception):
    pass


def write_and_crash(path: Path) -> None:
    path.write_text("half")
    raise Crash


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renames alone, which are quick: for tests of many writes."""
    monkeypatch.setattr(files.os, "fsync", lambda _: None)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folder_and_nothing_else(tmp_path: Path) -> None:
    write_whole(tmp_path / "a/b.txt", "é")
    write_whole(tmp_path / "a/b.bin", b"\xff")
    assert (tmp_path / "a/b.txt").read_bytes() == "é".encode()
    assert (tmp_path / "a/b.bin").read_bytes() == b"\xff"
    assert names(tmp_path / "a") == ["b.bin", "b.txt"]


def test_a_crash_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text("old")
    with pytest.raises(Crash), whole_file(path) as partial:
        write_and_crash(partial)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["scores.json"]


@pytest.mark.parametrize("before", [True, False])
def test_a_crash_leaves_the_old_folder_or_none(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "adapter"
    if before:
        path.mkdir()
        (path / "weights").write_text("old")
    with pytest.raises(Crash), whole_folder(path) as partial:
        write_and_crash(partial / "weights")
    assert names(tmp_path) == (["adapter"] if before else [])
    assert not before or (path / "weights").read_text() == "old"


def test_a_folder_takes_the_place_of_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep/adapter"
    for part in ("a", "b"):
        with whole_folder(path) as partial:
            (partial / part).write_text(part)
        assert names(path) == [part]
    assert names(path.parent) == ["adapter"]


def test_the_first_folder_stays_where_it_is_not_to_be_replaced(tmp_path: Path) -> None:
    for part in ("a", "b"):
        with whole_folder(tmp_path / "cache", replace=False) as partial:
            (partial / part).write_text(part)
    assert names(tmp_path) == ["cache"]
    assert names(tmp_path / "cache") == ["a"]


def test_a_folder_does_not_take_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("old")
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "adapter"):
        pass
    assert names(tmp_path) == ["adapter"]


@pytest.mark.usefixtures("unsynced")
def test_two_writers_of_a_file_do_not_mix(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([k]) * 200_000 for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda content: write_whole(path, content), contents))
            assert path.read_bytes() in contents
    assert names(tmp_path) == ["file"]


@pytest.mark.usefixtures("unsynced")
@pytest.mark.parametrize("replace", [True, False])
def test_two_writers_of_a_folder_do_not_mix(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "folder"

    def write(writer: int) -> None:
        for _ in range(20):
            with whole_folder(path, replace=replace) as partial:
                (partial / "a").write_text(str(writer))
                (partial / "b").write_text(str(writer))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (path / "a").read_text() == (path / "b").read_text()
    assert names(path) == ["a", "b"]
    assert names(tmp_path) == ["folder"]


def test_hidden_names_differ_by_host_process_and_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {partial_of(tmp_path / "file").name}
    thread = threading.Thread(target=lambda: found.add(partial_of(tmp_path / "file").name))
    thread.start()
    thread.join()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(files.os, "getpid", lambda: 1)
        found.add(partial_of(tmp_path / "file").name)
    monkeypatch.setattr(files.socket, "gethostname", lambda: "another-machine")
    found.add(partial_of(tmp_path / "file").name)
    assert len(found) == 4
    assert all(name.startswith(".file.") and name.endswith(".partial") for name in found)


# Without the package's __init__, which takes seconds to import.
KILLED = """
import os, signal, sys, types
from pathlib import Path
package = types.ModuleType("ether_diffusion")
package.__path__ = [sys.argv[2]]
sys.modules["ether_diffusion"] = package
from ether_diffusion.files import whole_folder
with whole_folder(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_what_a_killed_process_left_goes_with_the_next_folder(tmp_path: Path) -> None:
    path = tmp_path / "step-000200"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path), str(Path(files.__file__).parent)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    assert not path.exists()
    running = tmp_path / f".step-000200.{files._host()}-{os.getppid()}-1.partial"
    elsewhere = tmp_path / ".step-000200.000000-999999999-1.partial"  # on another machine it may still be running
    for folder in (running, elsewhere):
        folder.mkdir()
    with whole_folder(path) as partial:
        (partial / "whole").write_text("whole")
    assert names(tmp_path) == sorted([running.name, elsewhere.name, path.name])
    assert names(path) == ["whole"]


@posix
def test_a_folder_that_a_killed_process_had_moved_away_comes_back(tmp_path: Path) -> None:
    previous = tmp_path / f".adapter.{files._host()}-999999999-1.previous"
    previous.mkdir()
    (previous / "weights").write_text("old")
    with pytest.raises(Crash), whole_folder(tmp_path / "adapter"):
        raise Crash
    assert names(tmp_path) == ["adapter"]
    assert (tmp_path / "adapter/weights").read_text() == "old"


@posix
def test_a_link_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/file").write_text("old")
    (tmp_path / "disk/folder").mkdir()
    for name in ("file", "folder"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    write_whole(tmp_path / "file", "new")
    with whole_folder(tmp_path / "folder") as partial:
        (partial / "inside").write_text("new")
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder"))
    assert (tmp_path / "disk/file").read_text() == "new"
    assert names(tmp_path / "disk/folder") == ["inside"]


@posix
def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "scores")
    reader.join(10)
    assert found == ["scores"]
    assert pipe.is_fifo()


def test_content_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder, synced = tmp_path / "file", tmp_path / "folder", []
    monkeypatch.setattr(files.os, "fsync", lambda _: synced.append((path.exists(), folder.exists())))
    write_whole(path, "content")
    with whole_folder(folder) as partial:
        (partial / "a").write_text("a")
    assert synced == [(False, False), (True, False)]
    with whole_file(path, sync=False) as partial:
        partial.write_text("cached")
    assert len(synced) == 2


def test_a_file_is_finished_over_several_calls(tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    for part in ("one ", "two"):
        with unfinished_of(path).open("a") as file:
            file.write(part)
        assert not path.exists()
    finish(path)
    assert path.read_text() == "one two"
    assert names(tmp_path) == ["archive.zip"]


def test_digests_are_hashlibs(tmp_path: Path) -> None:
    content = os.urandom(2_500_000)  # several blocks
    (tmp_path / "file").write_bytes(content)
    assert digest_of_file(tmp_path / "file") == digest_of(content) == hashlib.sha256(content).hexdigest()
    assert sha1_of_file(tmp_path / "file") == hashlib.sha1(content).hexdigest()
    assert digest_of("é", b"\x00") == hashlib.sha256("é".encode() + b"\x00").hexdigest()
    value = {"b": [1, "é"], "a": None}
    assert digest_of_json(value) == hashlib.sha256(json.dumps(value).encode()).hexdigest()
    assert digest_of_json(value, sort_keys=True) == digest_of(json.dumps(value, sort_keys=True))
    for size in (3, 16):
        assert short_digest("a", b"b", size=size) == hashlib.blake2b(b"ab", digest_size=size).hexdigest()
    assert Digest().update("a").update("b").bytes() == hashlib.sha256(b"ab").digest()
    assert Digest(8).update("ab").bytes() == hashlib.blake2b(b"ab", digest_size=8).digest()


def test_checkpoints_are_listed_by_number(tmp_path: Path) -> None:
    steps = [1_000_000, 999_999, 200, 10_000_000, 0]
    for step in steps:
        (tmp_path / checkpoint_name(step)).mkdir()
    for other in ("step-", "step-12.png", "last", ".step-000300.partial", "my-step-1"):
        (tmp_path / other).mkdir()
    found = list_checkpoints(tmp_path)
    assert [step_of(path) for path in found] == sorted(steps)
    assert [path.name for path in found][:2] == ["step-000000", "step-000200"]
    assert list_checkpoints(tmp_path / "absent") == []


def test_an_output_folder_must_be_new_or_empty(tmp_path: Path) -> None:
    check_free(tmp_path / "new", "output_dir", "")
    check_free(tmp_path, "output_dir", "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        check_free(tmp_path, "output_dir", "Resume it with training.resume=true.")
    assert str(caught.value) == f"output_dir: {tmp_path} is not empty. Resume it with training.resume=true."
    with pytest.raises(UserError) as caught:
        check_free(tmp_path / "file", "--output", "")
    assert str(caught.value) == f"--output: {tmp_path / 'file'} is a file; expected a folder, new or empty."
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x/adapter"),
            "runs/x/adapter: No space left on device. Free some space on that disk and run the command again.",
        ),
        (
            OSError(errno.EACCES, "Permission denied", "/runs"),
            "/runs: Permission denied. Check the permissions of that path.",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "/runs"),
            "/runs: Read-only file system. Choose an output folder that can be written to.",
        ),
        (OSError(errno.ENOSPC, "Full"), "Full. Free some space on that disk and run the command again."),
        (OSError(errno.EXDEV, "Invalid link", "a", None, "b"), "a -> b: Invalid link."),
        (OSError("two\nlines."), "two lines."),
        (OSError(), "OSError."),
        (
            PermissionError(
                errno.EACCES, "Permission denied", "/runs/.a.json.0123ab-12-13.partial", None, "/runs/a.json"
            ),
            "/runs/a.json: Permission denied. Check the permissions of that path.",
        ),
    ],
)
def test_an_os_error_is_one_line(error: OSError, line: str) -> None:
    assert os_error_line(error) == line


def fill_a_disk() -> None:
    Path("/dev/full").write_text("x")


def write_below_a_file(tmp_path: Path) -> Callable[[], object]:
    (tmp_path / "file").write_text("")
    return lambda: write_whole(tmp_path / "file/scores.json", "{}")


@posix
def test_commands_end_with_code_2_where_the_system_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("score", fill_a_disk) == 2
    assert exit_code("score", write_below_a_file(tmp_path)) == 2
    full, below = capsys.readouterr().err.splitlines()
    assert full == "score: No space left on device. Free some space on that disk and run the command again."
    reason = "File exists. Choose another name, or move away what is there. Nothing was written there."
    assert below == f"score: cannot write {tmp_path}/file/scores.json: {tmp_path}/file: {reason}"


def test_a_home_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("train", lambda: Path("~nobody_of_this_name/photos").expanduser()) == 2
    assert capsys.readouterr().err.startswith("train: the home directory that ~ in a path stands for is not known")


def test_other_errors_are_raised() -> None:
    def fail() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        exit_code("score", fail)


@posix
def test_a_failed_write_states_what_failed_and_what_remains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fill(path: Path) -> None:
        with whole_folder(path) as partial:
            raise OSError(errno.ENOSPC, "No space left on device", str(partial / "weights"))

    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        assert exit_code("train", lambda name=name: fill(tmp_path / name)) == 2
    old, new = capsys.readouterr().err.splitlines()
    reason = "No space left on device. Free some space on that disk and run the command again."
    remains = "What was there before is unchanged."
    assert old == f"train: cannot write {tmp_path}/old: {tmp_path}/old/weights: {reason} {remains}"
    assert new == f"train: cannot write {tmp_path}/new: {tmp_path}/new/weights: {reason} Nothing was written there."


@posix
def test_a_file_that_cannot_be_written_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Full") as caught, whole_file(tmp_path / "a.json") as partial:
        raise OSError(errno.ENOSPC, "Full", str(partial))
    assert os_error_line(caught.value).startswith(f"cannot write {tmp_path}/a.json: Full. Free some space")


@posix
def test_files_and_folders_follow_the_umask(tmp_path: Path) -> None:
    """safetensors makes its files readable for their owner alone."""
    old = os.umask(0o027)
    try:
        with whole_file(tmp_path / "new/weights.safetensors") as partial:
            save_file({"a": torch.zeros(2)}, partial)
        with whole_folder(tmp_path / "adapter") as partial:
            (partial / "inner").mkdir()
            save_file({"a": torch.zeros(2)}, partial / "inner/weights.safetensors")
    finally:
        os.umask(old)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {
        "new": 0o750,
        "new/weights.safetensors": 0o640,
        "adapter": 0o750,
        "adapter/inner": 0o750,
        "adapter/inner/weights.safetensors": 0o640,
    }


@posix
def test_what_killed_processes_left_goes_when_another_writes_next_to_it(tmp_path: Path) -> None:
    host = files._host()
    dead, running = (tmp_path / f".a.json.{host}-{pid}-1.partial" for pid in (999999999, os.getppid()))
    for folder in (dead, running):
        folder.mkdir()
        (folder / ".tmpXyz").write_text("half")  # of the library that wrote the file
    (tmp_path / f".of-an-earlier-version.{host}-999999999-1.partial").write_text("half")
    files._sweep_once.cache_clear()
    write_whole(tmp_path / "other.json", "{}")
    assert names(tmp_path) == sorted([running.name, "other.json"])


@posix
def test_what_a_killed_process_left_makes_no_folder_full(tmp_path: Path) -> None:
    (tmp_path / f".config.yaml.{files._host()}-999999999-1.partial").mkdir()
    check_free(tmp_path, "output_dir", "")
    assert names(tmp_path) == []


@posix
@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_names_as_long_as_the_system_takes_are_written(tmp_path: Path, name: str) -> None:
    write_whole(tmp_path / name, "content")
    with whole_folder(tmp_path / name[:-1]) as partial:
        (partial / "inside").write_text("content")
    assert names(tmp_path) == sorted([name, name[:-1]])


@posix
def test_a_link_to_a_folder_that_is_not_there_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk/runs")
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    write_whole(tmp_path / "runs/scores.json", "{}")
    with whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
    assert all((tmp_path / name).is_symlink() for name in ("runs", "out"))
    assert names(tmp_path / "disk/runs") == ["scores.json"]
    assert names(tmp_path / "disk/out") == ["a"]


@posix
@pytest.mark.parametrize("path", ["loop", "loop/inner.json"])
def test_a_link_to_itself_is_an_os_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for write in (lambda: write_whole(tmp_path / path, "{}"), whole_folder(tmp_path / path).__enter__):
        with pytest.raises(OSError, match="Too many levels of symbolic links") as caught:
            write()
        assert "A link leads back to itself." in os_error_line(caught.value)


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(UserError, match="no home directory for caches: set HOME or XDG_CACHE_HOME"):
        files.cache_folder("scenes")


@posix
def test_safetensors_own_error_becomes_an_os_error(tmp_path: Path) -> None:
    """A full disk reaches it as well; here it is a folder that is missing."""
    with pytest.raises(FileNotFoundError) as caught, whole_folder(tmp_path / "adapter") as partial:
        save_file({"a": torch.zeros(2)}, partial / "missing/weights.safetensors")
    assert caught.value.filename == str(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "weights.safetensors") as partial:
        save_file({"a": torch.zeros(2)}, partial / "missing")
    assert names(tmp_path) == []
