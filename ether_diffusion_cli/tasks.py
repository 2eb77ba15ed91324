"""The table of tasks that `train` knows. A task is one entry in it."""

from __future__ import annotations

from typing import NamedTuple


class TaskEntry(NamedTuple):
    """A task by name, as `--help` shows it without importing it."""

    name: str
    summary: str
    module: str
    """The module that trains it, imported when it is asked for."""
    example: str
    """The name of a shipped config."""


TASKS: dict[str, TaskEntry] = {}


def register_task(name: str, summary: str, module: str, example: str = "my.yaml") -> None:
    """Make `ether-diffusion train NAME` train a task.

    Args:
        module: The name of a module with an object `TASK`, a `TrainingTask`.

    Raises:
        ValueError: another module has a task of this name.
    """
    known = TASKS.get(name)
    if known is not None and known.module != module:
        raise ValueError(f"task {name!r}: {known.module} has this name; give {module} another one.")
    TASKS[name] = TaskEntry(name, summary, module, example)


register_task(
    "dreambooth",
    "a few photos of a subject -> an adapter that generates it",
    "ether_diffusion.training.dreambooth",
    "quickstart/dreambooth",
)
register_task(
    "controllable",
    "pairs of image and condition -> an encoder and an adapter that follow the condition",
    "ether_diffusion.training.controllable",
    "quickstart/controllable",
)
