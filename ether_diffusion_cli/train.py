"""`ether-diffusion train TASK`: a config -> a trained adapter."""

from __future__ import annotations

import importlib
from argparse import Namespace

from .arguments import Commands, add_command, add_config
from .tasks import TASKS


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command, with a subcommand for each task of the table."""
    train = commands.add_parser("train", help="train an adapter", description="Train an adapter.")
    tasks = train.add_subparsers(dest="task", metavar="TASK", required=True)
    for entry in TASKS.values():
        parser = add_command(
            tasks, entry.name, run, summary=entry.summary, description=f"{entry.name}: {entry.summary}.", prog=prog
        )
        add_config(parser, entry.example, "training.steps=800")
        parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="check config and data, train one step, report memory and time, save nothing",
        )


def run(arguments: Namespace) -> None:
    """Train as the config says, or print it.

    Raises:
        UserError, TrainingFailed, Interrupted: as the task's `run`.
    """
    from ether_diffusion.config import load_config, to_yaml

    task = importlib.import_module(TASKS[arguments.task].module).TASK
    config = load_config(task.config, arguments.config, arguments.overrides, renamed=task.hints)
    if arguments.print_config:
        print(to_yaml(task.resolve(config)), end="")
    else:
        task.run(config, dry_run=arguments.dry_run)
