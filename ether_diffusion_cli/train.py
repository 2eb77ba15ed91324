"""`ether-diffusion train TASK`: a config -> a trained adapter."""

from __future__ import annotations

import importlib
from argparse import Namespace

from .arguments import Commands, add_config, config_file
from .tasks import TASKS


def add_parser(commands: Commands) -> None:
    tasks = commands.group("train", "TASK", "train an adapter", "Train an adapter.")
    for entry in TASKS.values():
        parser = tasks.add(entry.name, run, entry.summary, f"{entry.name}: {entry.summary}.")
        add_config(parser, entry.example, "training.steps=800")
        parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check config and data, train one step, report memory and time, save nothing",
        )


def run(arguments: Namespace) -> None:
    """Train as the config says, or print it. Raises UserError, TrainingFailed, Interrupted as the task's `run`."""
    from ether_diffusion.config import load_config, to_yaml

    task = importlib.import_module(TASKS[arguments.task].module).TASK
    config = load_config(task.config, config_file(arguments, task.hints), arguments.overrides, renamed=task.hints)
    if arguments.print_config:
        print(to_yaml(task.resolve(config)), end="")
    else:
        task.run(config, dry_run=arguments.dry_run)
