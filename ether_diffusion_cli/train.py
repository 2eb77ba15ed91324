"""`ether-diffusion train TASK`: a config -> a trained adapter."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path
from typing import Any

from .arguments import Commands, add_config, config_file, positive
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
        parser.add_argument(
            "--many",
            metavar="FILE",
            help="train several runs at once: a YAML list of the settings that each has of its own, as output_dir",
        )
        parser.add_argument(
            "--max-together",
            type=positive,
            metavar="N",
            help="with --many: train at most N runs at once (default: all; --dry-run says how many fit)",
        )


def run(arguments: Namespace) -> None:
    """Train as the config says, or print it. Raises UserError, TrainingFailed, Interrupted as the task's `run`."""
    from ether_diffusion.config import load_config, to_yaml
    from ether_diffusion.errors import UserError

    task = importlib.import_module(TASKS[arguments.task].module).TASK
    source, overrides = config_file(arguments, task.hints), arguments.overrides
    if arguments.many is not None:
        _run_many(task, source, arguments)
        return
    if arguments.max_together is not None:
        raise UserError("--max-together is an option of --many FILE, which was not given.")
    config = load_config(task.config, source, overrides, renamed=task.hints)
    if arguments.print_config:
        print(to_yaml(task.resolve(config)), end="")
    else:
        task.run(config, dry_run=arguments.dry_run)


def _run_many(task: Any, source: str, arguments: Namespace) -> None:
    from ether_diffusion.config import load_config, to_yaml
    from ether_diffusion.errors import UserError
    from ether_diffusion.training.many_runs import as_overrides, read_overrides

    if task.run_many is None:
        raise UserError(f"--many: {task.why_alone}")
    configs = []
    for number, run in enumerate(read_overrides(Path(arguments.many)), 1):
        own = {f"{arguments.many}, run {number}": as_overrides(run)}
        configs.append(load_config(task.config, source, arguments.overrides, more=own, renamed=task.hints))
    if arguments.print_config:
        print("---\n".join(to_yaml(task.resolve(config)) for config in configs), end="")
    else:
        task.run_many(configs, dry_run=arguments.dry_run, max_together=arguments.max_together)
