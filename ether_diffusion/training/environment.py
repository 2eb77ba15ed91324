"""The process that trains: its threads, its memory, the signals sent to it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

import psutil
import torch


def set_threads() -> int:
    """Share the usable cores among this machine's processes, unless the user set OMP_NUM_THREADS. Returns the number.

    `accelerate launch` sets OMP_NUM_THREADS=1 in the processes it starts, so the user's own wish is looked for in the
    environment that the launcher was started with.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not _user_set_threads():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // processes))
    return torch.get_num_threads()


def _launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ


def _user_set_threads() -> bool:
    if not _launched():
        return "OMP_NUM_THREADS" in os.environ
    try:
        parent = psutil.Process().parent()
        return parent is not None and "OMP_NUM_THREADS" in parent.environ()
    except psutil.Error:
        return False


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on an accelerator, or that this process took of the machine's memory.

    MPS keeps no maximum: what its driver holds, which shrinks only when asked to.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


class StopRequest:
    """Remembers that Ctrl-C or SIGTERM came, so that the step in hand is finished. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.parent = os.getppid() if _launched() else None

    def requested(self) -> int:
        """The signal to stop at, or 0. A launcher that is gone asks to stop, as SIGTERM does: nobody watches."""
        if not self.signum and self.parent is not None and os.getppid() != self.parent:
            self.signum = signal.SIGTERM
        return self.signum

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals inside the block; the handlers before are put back after it."""
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
