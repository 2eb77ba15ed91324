"""A run folder has one training at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.claim import LOCK, claimed


def write_lock(folder: Path, **changed: Any) -> None:
    folder.mkdir(exist_ok=True)
    own = {"host": socket.gethostname(), "process": os.getpid(), "started": psutil.Process().create_time()}
    (folder / LOCK).write_text(json.dumps({**own, **changed}))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_folder_that_is_claimed_is_refused_and_is_free_afterwards(tmp_path: Path) -> None:
    run = tmp_path / "runs/a"
    with claimed(run):
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on {re.escape(socket.gethostname())}"):
            claimed(run).__enter__()
        assert (run / LOCK).is_file()
    assert not run.parent.exists()  # as empty as it was found


def test_a_live_process_keeps_its_run_even_from_a_resumed_one(
    make_config: Callable[..., Any], finished_run: Path, tmp_path: Path
) -> None:
    """From the first check on: nothing is loaded, nothing is written."""
    write_lock(tmp_path / "run")
    for resume in ("true", "false"):
        with pytest.raises(UserError, match="is in use by process"):
            dreambooth.run(make_config(tmp_path / "run", f"training.resume={resume}"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


@pytest.mark.parametrize("number", [dead_process, os.getpid], ids=["dead", "a number used again"])
def test_a_dead_processs_lock_on_this_host_is_taken_over(tmp_path: Path, number: Callable[[], int]) -> None:
    write_lock(tmp_path, process=number(), started=psutil.boot_time() + 7)
    with claimed(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lock", ["elsewhere", "", "[]", "{}"])
def test_a_lock_that_nobody_here_can_check_is_refused_with_how_to_clear_it(tmp_path: Path, lock: str) -> None:
    write_lock(tmp_path, host="elsewhere")
    if lock != "elsewhere":
        (tmp_path / LOCK).write_text(lock)
    with pytest.raises(UserError, match=rf"delete (that file|{re.escape(str(tmp_path / LOCK))})"):
        claimed(tmp_path).__enter__()


def claim_once(folder: Path, barrier: Any, words: Any) -> None:
    barrier.wait()
    try:
        with claimed(folder):
            words.put("in")
            barrier.wait()
    except UserError:
        words.put("refused")
        barrier.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forked, so that all are at the lock at once")
def test_of_many_processes_that_find_a_dead_ones_lock_one_gets_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        write_lock(tmp_path, process=dead_process())
        barrier, words = context.Barrier(4), context.Queue()
        processes = [context.Process(target=claim_once, args=(tmp_path, barrier, words)) for _ in range(4)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert sorted(words.get(timeout=10) for _ in processes) == ["in", "refused", "refused", "refused"]
