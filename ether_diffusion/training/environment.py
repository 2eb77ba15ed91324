"""The process that trains: its device, precision and threads, its memory, the signals it gets."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator

from ether_diffusion.errors import TrainingFailed, UserError

from .config import TrainingSettings
from .sharding import PRECISIONS, check_launch_config


def start_accelerator(settings: TrainingSettings, logs: Path, dry_run: bool) -> Accelerator:
    """The processes with their devices, threads and precision, and the tracker, which a dry run does without.

    Args:
        logs: The tracker's folder.

    Raises:
        UserError: the tracker is not installed; or as `check_launch_config`.
    """
    tracker = settings.tracker if not dry_run and settings.tracker != "none" else None
    if tracker == "wandb":
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("training.tracker: wandb is not installed: pip install wandb.") from None
    check_launch_config()
    set_threads()
    return Accelerator(mixed_precision=settings.mixed_precision, log_with=tracker, project_dir=str(logs))


def precision(accelerator: Accelerator) -> torch.dtype:
    """The dtype of the frozen UNet, its inputs and its prompts' features."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)


def set_threads() -> int:
    """Share the usable cores among this machine's processes, unless the user set OMP_NUM_THREADS. Returns the number.

    `accelerate launch` sets OMP_NUM_THREADS=1 in the processes it starts, so the user's own setting is looked up in the
    environment of the launcher.
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

    MPS keeps no maximum: there it is the memory of its driver, which shrinks only on request.
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


@contextlib.contextmanager
def out_of_memory_hint(settings: TrainingSettings, precision: str) -> Iterator[None]:
    """Within the block, running out of an accelerator's memory becomes an error that names settings to save some.

    Args:
        precision: As accelerate names it.

    Raises:
        TrainingFailed: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "MPS backend out of memory" not in str(error):
            raise
        ways = []
        if not settings.gradient_checkpointing:
            ways.append("training.gradient_checkpointing=true")
        if precision == "no":
            ways.append("training.mixed_precision=bf16")
        if settings.batch_size > 1:
            ways.append("training.batch_size=1 with training.gradient_accumulation")
        ways.append("a smaller data.resolution")
        raise TrainingFailed(f"Out of memory ({str(error).splitlines()[0]}). Try {', '.join(ways)}.") from error


HANGUP = getattr(signal, "SIGHUP", None)  # there is none on Windows
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]
"""What stops a run after the step in hand: Ctrl-C, a scheduler, a closed terminal."""


def ignore_signals(worker: int) -> None:
    """For processes that load data: a signal to the whole group is for the main process, which ends them afterwards."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Records a signal, so that the current step is finished. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.parent = os.getppid() if _launched() else None

    def requested(self) -> int:
        """The signal to stop at, or 0. A launcher that is gone counts as SIGTERM: nobody watches the run any more."""
        if not self.signum and self.parent is not None and os.getppid() != self.parent:
            self.signum = signal.SIGTERM
        return self.signum

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the signals within the block; afterwards the previous handlers are back.

        Signals belong to the main thread. In any other one, such as a server's, the process's own handlers stay.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        # A shell's `nohup` ignores the hang-up, and so does the run.
        numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN or number != HANGUP]
        previous = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
