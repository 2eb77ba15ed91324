"""`ether-diffusion shelf`: thousands of ETHER and ETHER+ adapters in one file, of which a bank reads those in use."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands

if TYPE_CHECKING:
    from ether_diffusion.adapters.shelf import Contents


def add_parser(commands: Commands) -> None:
    actions = commands.group(
        "shelf",
        "ACTION",
        "keep thousands of ETHER and ETHER+ adapters in one file",
        "Keep adapters of the same variant, layers, sides and blocks in one safetensors file, which AdapterBank.open "
        "and `generate --requests --shelf` map into memory.",
    )
    build = actions.add("build", run_build, "write a new shelf", "Write a new shelf, whole or not at all.")
    _add_file(build)
    _add_runs(build)
    build.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 takes half the disk, and rounds (default: fp32)"
    )
    listed = actions.add("list", run_list, "list a shelf's adapters", "List a shelf's adapters, each with its digest.")
    _add_file(listed)
    add = actions.add(
        "add",
        run_add,
        "add adapters to a shelf",
        "Add adapters to a shelf. It is written again, whole or not at all: that takes its size of free disk, and "
        "little memory.",
    )
    _add_file(add)
    _add_runs(add)
    add.add_argument("--replace", action="store_true", help="replace adapters of the same names")
    remove = actions.add(
        "remove", run_remove, "remove adapters from a shelf", "Remove adapters from a shelf; it is written again."
    )
    _add_file(remove)
    remove.add_argument("names", nargs="+", metavar="NAME", help="adapters on it")


def _add_file(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the shelf, such as adapters.safetensors")


def _add_runs(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="a run folder, RUN/checkpoints/step-…, or a PEFT folder; NAME: default: the folder's own",
    )


def run_build(arguments: Namespace) -> None:
    """Write a shelf. Raises UserError, as `build_shelf`; or two runs have one name."""
    import torch

    from ether_diffusion.adapters.shelf import build_shelf
    from ether_diffusion.progress import progress_bar

    runs = _named(arguments.runs)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    with progress_bar(len(runs), "adapters", "adapter") as bar:
        contents = build_shelf(arguments.file, runs, dtype, bar.update)
    _print_size(arguments.file, contents)


def run_list(arguments: Namespace) -> None:
    """Print a line an adapter, and the settings that they share. Raises UserError: no shelf."""
    from ether_diffusion.adapters.shelf import Shelf

    contents = Shelf(arguments.file).contents
    for name, digest in contents.digests.items():
        print(f"{name}\t{digest}")
    _print_size(arguments.file, contents)


def run_add(arguments: Namespace) -> None:
    """Write a shelf again with further adapters. Raises UserError, as `add_to_shelf`; or two runs have one name."""
    from ether_diffusion.adapters.shelf import add_to_shelf
    from ether_diffusion.progress import progress_bar

    runs = _named(arguments.runs)
    with progress_bar(len(runs), "adapters", "adapter") as bar:
        contents = add_to_shelf(arguments.file, runs, replace=arguments.replace, progress=bar.update)
    _print_size(arguments.file, contents)


def run_remove(arguments: Namespace) -> None:
    """Write a shelf again without some adapters. Raises UserError, as `remove_from_shelf`."""
    from ether_diffusion.adapters.shelf import remove_from_shelf

    _print_size(arguments.file, remove_from_shelf(arguments.file, arguments.names))


def _named(runs: Sequence[str]) -> dict[str, str]:
    """The folders of runs by name. Raises UserError: two have the same."""
    from ether_diffusion.errors import UserError
    from ether_diffusion.files import CHECKPOINTS, step_of

    named: dict[str, str] = {}
    for text in runs:
        name, equals, folder = text.partition("=")
        if not equals or Path(text).exists():
            path = Path(text).resolve()
            path = path.parent if path.name == "adapter" else path
            in_run = step_of(path) is not None and path.parent.name == CHECKPOINTS
            name, folder = f"{path.parent.parent.name}-{path.name}" if in_run else path.name, text
        if name in named:
            raise UserError(f"shelf: {named[name]} and {folder} are both named {name!r}; write NAME=RUN.")
        named[name] = folder
    return named


def _print_size(file: str, contents: Contents) -> None:
    count = len(contents.digests)
    print(
        f"{file}: {count:,} adapter{'s' * (count != 1)} of {contents.row_bytes / 1e6:.2f} MB for {contents.base_model}"
    )
