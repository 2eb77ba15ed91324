"""A process that has imported the package and read the miniature, and forks a child that does neither for each command.

It computes nothing before it forks: OpenMP's threads do not survive a fork, and a child that waits for them hangs.
All workers of a test session have it in common: they connect to a socket, and send and get lines of JSON. It ends when
the last of them is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import shutil
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Interruption:
    """A signal for a command, sent once.

    Attributes:
        group: To its whole process group, as a terminal or a batch scheduler does.
        files: When so many files lie in its folders.
        lines: When this file, by its path in those folders, has this many lines.
    """

    signal: int
    group: bool = False
    files: int | None = None
    lines: tuple[str, int] | None = None

    def is_due(self, folder: Path) -> bool:
        """Whether the moment has come."""
        if self.lines is not None:
            name, number = self.lines
            return (folder / name).is_file() and (folder / name).read_bytes().count(b"\n") >= number
        return self.files is not None and sum(len(files) for _, _, files in os.walk(folder)) >= self.files


def serve(address: str) -> None:
    """Answer requests at this socket, each client's in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import ether_diffusion

    levels = {name: logging.getLogger(name).level for name in ("bitsandbytes", "torchao")}
    ready = {"version": ether_diffusion.__version__, "printed": os.fstat(2).st_size, "levels": levels}
    import torch

    torch.set_num_threads(1)
    _import_everything()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    listener.settimeout(0.5)
    clients: set[int] = set()
    last = time.monotonic() + 60  # by then the first one is there
    while clients or time.monotonic() < last:
        with contextlib.suppress(TimeoutError):
            client, _ = listener.accept()
            last = 0.0
            pid = os.fork()
            if pid == 0:
                listener.close()
                _serve_client(client, ready)
            clients.add(pid)
            client.close()
        clients -= {pid for pid in clients if os.waitpid(pid, os.WNOHANG)[0]}
    shutil.rmtree(Path(address).parent)


def _serve_client(client: socket.socket, ready: dict[str, Any]) -> NoReturn:
    client.settimeout(None)
    with client, client.makefile("rw", encoding="utf-8") as lines:
        print(json.dumps(ready), file=lines, flush=True)
        for line in lines:
            print(json.dumps(_answer(json.loads(line))), file=lines, flush=True)
    os._exit(0)


def _import_everything() -> None:
    import ether_diffusion
    import ether_diffusion_cli

    for package in (ether_diffusion, ether_diffusion_cli):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__") and ".pretrain" not in module.name:
                importlib.import_module(module.name)
    # What they import where they use it.
    for name in ("diffusers.pipelines.stable_diffusion", "accelerate", "transformers.models.clip", "tensorboard"):
        importlib.import_module(name)
    from ether_diffusion.models.bases import load_base
    from support.read_once import read_tiny_once

    read_tiny_once()
    load_base("tiny")
    gc.freeze()


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a command in a child: its exit code (None: it was killed after `seconds`), and what it printed."""
    pipes = [os.pipe() for _ in ("stdout", "stderr")]
    pid = os.fork()
    if pid == 0:
        _become_command(request, [write for _, write in pipes])
    for read, write in pipes:
        os.close(write)
        os.set_blocking(read, False)
    printed = [b"", b""]
    deadline = time.monotonic() + request["seconds"]
    interruption = Interruption(**request["interrupt"]) if request.get("interrupt") else None
    while True:
        if interruption is not None and interruption.is_due(Path(request["folder"]).parent):
            (os.killpg if interruption.group else os.kill)(pid, interruption.signal)
            interruption = None
        done, status = os.waitpid(pid, os.WNOHANG)
        late = not done and time.monotonic() > deadline
        if late:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for place, (read, _) in enumerate(pipes):
            with contextlib.suppress(BlockingIOError):
                while block := os.read(read, 1 << 16):
                    printed[place] += block
        if done or late:
            break
        time.sleep(0.005)
    for read, _ in pipes:
        os.close(read)
    out, errors = (text.decode(errors="replace") for text in printed)
    return {"code": os.waitstatus_to_exitcode(status) if done else None, "stdout": out, "stderr": errors}


def _become_command(request: dict[str, Any], streams: list[int]) -> NoReturn:
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
            os.dup2(stream, number)
        os.chdir(request["folder"])
        os.environ.clear()
        os.environ.update(request["environment"])
        code = run(request["arguments"], request["limits"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(arguments: list[str], limits: dict[str, int]) -> int:
    """Run a command under limits.

    Args:
        limits: Of resources, as `{"FSIZE": 1000}`. `MEMORY`: bytes of address space beyond what this process has;
            `PRIVILEGES`: the modes of files hold for root, too.
    """
    import resource

    from ether_diffusion_cli import main

    for name, value in limits.items():
        if name == "PRIVILEGES":
            _drop_privileges()
        elif name == "MEMORY":
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + value, held + value))
        else:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    sys.argv = ["ether-diffusion", *arguments]
    return main(arguments)


def _drop_privileges() -> None:
    """Give up root's right to pass over the modes of files (CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; capset(2))."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for effective_permitted_inheritable in range(3):
        sets[effective_permitted_inheritable] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        serve(sys.argv[2])
    else:  # one command as a whole process: LIMITS as JSON, then its words
        sys.exit(run(sys.argv[2:], json.loads(sys.argv[1])))
