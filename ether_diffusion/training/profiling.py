"""`training.profile`: a trace of some steps, with the parts of a step by name."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ether_diffusion.files import make_folder, whole_file

PARTS = DATA, INPUTS, MODULE, UPDATE = ("data", "latents and texts", "UNet, forward and backward", "update")
"""Of a step, as a trace names them: samples are loaded; frozen encoders and noise; the trained module and the loss;
clipping, optimiser and average."""
SKIPPED = 2
"""Steps before the trace, in which torch allocates and compiles."""


@contextlib.contextmanager
def profiling(
    steps: int | None, folder: Path | None, first: int, say: Callable[[str], None]
) -> Iterator[Callable[[], object]]:
    """Within the block some steps are recorded, and written to a Chrome trace in `folder`. Yields what ends a step.

    Args:
        steps: How many, after the first two; a run that ends before records fewer. None: none.
        folder: None: nothing is recorded.
        first: The step that the block begins with.
        say: Called with a line that names the file, and on the CPU the parts' shares of the time.
    """
    if steps is None or folder is None:
        yield lambda: None
        return
    file = folder / f"profile-{first + SKIPPED:06d}.json"

    def write(profile: torch.profiler.profile) -> None:
        make_folder(folder)
        with whole_file(file) as partial:
            profile.export_chrome_trace(str(partial))
        say(f"Profile: {file}{_shares(profile)}")

    schedule = torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step


def _shares(profile: torch.profiler.profile) -> str:
    """The parts' shares of the host's time, where the host computes."""
    averages = profile.key_averages()
    if any(event.device_time_total for event in averages):
        return ""
    times = {event.key: event.cpu_time_total for event in averages if event.key in PARTS}
    total = sum(times.values())
    shares = [f"{name} {times[name] / total:.1%}" for name in PARTS if name in times]
    return f" ({'; '.join(shares)})" if shares else ""
