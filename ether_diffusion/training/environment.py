"""The process that trains: its device, precision and threads, its memory, the signals it gets."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from ether_diffusion.errors import Interrupted, TrainingFailed, UserError, first_line
from ether_diffusion.generation.jobs import is_out_of_memory

from .config import TrainingSettings
from .sharding import PRECISIONS, check_launch_config

USE_CPU = "ACCELERATE_USE_CPU"
DEVICES = ("cuda", "xpu", "npu", "hpu", "mlu", "musa", "sdaa")
"""The modules of torch for the devices that accelerate knows, next to MPS."""


def start_accelerator(settings: TrainingSettings, logs: Path, dry_run: bool) -> Accelerator:
    """The processes with their devices, threads and precision, and the tracker, which a dry run does without.

    Args:
        logs: The tracker's folder.

    Raises:
        UserError: the tracker is not installed; a GPU that the launch asks for is missing; or as `check_launch_config`.
    """
    if settings.tracker == "wandb" and not dry_run:
        try:
            import wandb  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("training.tracker: wandb is not installed: pip install wandb.") from None
    check_launch_config()
    note = _check_devices(settings)
    set_threads()
    accelerator = make_accelerator(settings, logs, dry_run)
    if note:
        accelerator.print(f"Note:    {note}")
    return accelerator


def make_accelerator(settings: TrainingSettings, logs: Path, dry_run: bool) -> Accelerator:
    """As `start_accelerator`, for a further run of this process."""
    tracker = settings.tracker if not dry_run and settings.tracker != "none" else None
    return Accelerator(mixed_precision=settings.mixed_precision, log_with=tracker, project_dir=str(logs))


def _check_devices(settings: TrainingSettings) -> str | None:
    """A note if a launch for GPUs trains on the CPU, as `training.allow_cpu` allows.

    Raises:
        UserError: there is no GPU; or there are fewer than processes.
    """
    cpu = os.environ.get(USE_CPU, "").lower()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # accelerate states it for one process alone; several without a GPU would each train for themselves.
    asks_for_gpu = cpu in ("false", "0") or (not cpu and processes > 1)
    if not asks_for_gpu or not _launched():
        return None
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise UserError(
            f"The launch config starts {processes} processes, one a GPU, but only {torch.cuda.device_count()} can be "
            "used: set its num_processes, or `accelerate launch --num_processes N`."
        )
    kinds = [torch.backends.mps, *(getattr(torch, name) for name in DEVICES if hasattr(torch, name))]
    if any(kind.is_available() for kind in kinds):
        return None
    problem = f"no GPU can be used: {gpu_problem()}"
    if not settings.allow_cpu:
        raise UserError(
            f"The launch config asks for a GPU, but {problem}. To train on the CPU, which takes far longer, take "
            "configs/accelerate/cpu.yaml or `accelerate launch --cpu`, or set training.allow_cpu=true."
        )
    os.environ[USE_CPU] = "true"
    return f"training on the CPU (training.allow_cpu): {problem}"


def is_first_process() -> bool:
    """Whether this is the process that writes files; known before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


def gpu_problem() -> str:
    """Why no GPU can be used here, where none can: the build of torch, a variable, or the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return f"this torch ({torch.__version__}) is a build for CPUs"
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides all"
    with warnings.catch_warnings(record=True) as caught:  # in which torch states what is wrong with the driver
        warnings.simplefilter("always")
        torch.cuda.is_available()
    reason = " ".join(str(caught[0].message).split()) if caught else "the driver (nvidia-smi) shows none"
    hidden = f"; CUDA_VISIBLE_DEVICES={visible!r}" if visible is not None else ""
    return reason.rstrip(".") + hidden


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device. A GPU copies it from pinned memory, for which the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


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


class OutOfMemory(TrainingFailed):
    """Memory ran out; the message names settings that save some."""


@contextlib.contextmanager
def out_of_memory_hint(settings: TrainingSettings, precision: str) -> Iterator[None]:
    """Within the block, running out of memory becomes an error that names settings to save some.

    Args:
        precision: As accelerate names it.

    Raises:
        OutOfMemory: in place of torch's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, TrainingFailed):
            raise
        ways = []
        if not settings.gradient_checkpointing:
            ways.append("training.gradient_checkpointing=true")
        if precision == "no":
            ways.append("training.mixed_precision=bf16")
        if settings.batch_size > 1:
            ways.append("training.batch_size=1 with training.gradient_accumulation")
        ways.append("a smaller data.resolution")
        raise OutOfMemory(f"Out of memory ({first_line(error)}). Try {', '.join(ways)}.") from error


HANGUP = getattr(signal, "SIGHUP", None)  # there is none on Windows
SIGNALS = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]
"""What stops a run after the step in hand: Ctrl-C, a scheduler, a closed terminal."""


def ignore_signals(worker: int) -> None:
    """For processes that load data: a signal to the whole group is for the main process, which ends them afterwards."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopNow(BaseException):
    """A signal, where the work in hand can be done again. No `except Exception` may swallow it."""


class StopRequest:
    """Records a signal, so that the current step is finished. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.at_once = False
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

    @contextlib.contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """Within the block, whose work can be done again, a signal raises StopNow: it may take hours."""
        self.at_once = True
        try:
            yield
        finally:
            self.at_once = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = self.signum or signum
        if self.at_once:
            raise StopNow


@contextlib.contextmanager
def preparing() -> Iterator[None]:
    """Within the block, in which caches are filled before the first step, a signal stops the run at once.

    Raises:
        Interrupted: in the place of the signal's default, so that the run folder is left in order.
    """
    stop = StopRequest()
    try:
        with stop.listening(), stop.stopping_at_once():
            yield
    except StopNow:
        message = "Stopped before the first step; complete files in the caches are kept. The same command continues."
        raise Interrupted(stop.signum, message) from None
