"""What commands share: how a command is declared, how numbers are read, and options that several commands have."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Commands:
    """Where commands are declared: all of the program's, or those of one group, such as `data`.

    Args:
        parsers: What `ArgumentParser.add_subparsers` returns; argparse has no public name for it.
        prog: The name in a command's usage, where a script stands for the command.
    """

    parsers: Any
    prog: str | None = None

    def add(
        self, name: str, action: Callable[[argparse.Namespace], None], summary: str, description: str
    ) -> argparse.ArgumentParser:
        """A command's parser. Parsed arguments hold it as `parser`, and what the command does as `action`.

        Args:
            action: Gets the parsed arguments. Imports what it needs, so that `--help` imports nothing heavy.
            summary: One line for the list of commands.
        """
        kind = argparse.RawDescriptionHelpFormatter if "\n" in description else argparse.HelpFormatter
        parser = self.parsers.add_parser(
            name, prog=self.prog, help=summary, description=description, formatter_class=kind
        )
        parser.set_defaults(action=action, parser=parser)
        return parser

    def group(self, name: str, word: str, summary: str, description: str) -> Commands:
        """A command that has commands of its own, one of which must be given. `word`: what the usage calls them."""
        parser = self.parsers.add_parser(name, help=summary, description=description)
        return Commands(parser.add_subparsers(dest=word.lower(), metavar=word, required=True), self.prog)


def add_config(parser: argparse.ArgumentParser, example: str, setting: str) -> None:
    """`--config FILE` and the settings that replace the file's: `arguments.config` and `arguments.overrides`.

    Settings may stand between options; `main` adds those, and flags that no option matches, to `overrides`.

    Args:
        example: The name of a shipped config.
        setting: A setting of it with a value.
    """
    parser.add_argument(
        "--config", metavar="FILE", help=f"a YAML file, or the name of a shipped config, as {example} (required)"
    )
    parser.set_defaults(example=example)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"settings that replace the file's, as {setting}",
    )


def config_file(arguments: argparse.Namespace, hints: Mapping[str, str] = {}) -> str:
    """What `--config` names.

    Args:
        hints: For flags of other programs the key of the same meaning here, or why there is none.

    Raises:
        UserError: it was not given; with the counterparts of such flags that were.
    """
    from ether_diffusion.errors import UserError

    if arguments.config is not None:
        return arguments.config
    lines = [f"--config FILE is missing: a YAML file, or the name of a shipped config, as {arguments.example}"]
    for text in arguments.overrides:
        flag, equals, value = text.partition("=")
        if text.startswith("-"):
            ours = hints.get(flag.lstrip("-").replace("-", "_"), "")
            hint = ours if " " in ours else f"here it is {ours}{equals}{value}" if ours else "unknown option"
            lines.append(f"{flag}: {hint}")
    raise UserError("\n".join(lines))


def add_run(parser: argparse.ArgumentParser, what: str) -> None:
    """One run, as `RUN` or as `--adapter RUN`: `arguments.adapter`."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("adapter", nargs="?", metavar="RUN", default=argparse.SUPPRESS, help=what)
    group.add_argument("--adapter", metavar="RUN", help="the same as RUN")


def add_parts(parser: argparse.ArgumentParser, adapter_help: str) -> None:
    """Any number of `--adapter RUN[:S]` and `--lora FILE[:S]`: lists of (path, strength)."""
    add = parser.add_argument
    add("--adapter", type=with_strength, action="append", default=[], metavar="RUN[:S]", help=adapter_help)
    add(
        "--lora",
        type=with_strength,
        action="append",
        default=[],
        metavar="FILE[:S]",
        help="a LoRA file of any program, with its strength (default: 1); may be repeated",
    )


def with_strength(text: str) -> tuple[str, float]:
    """`PATH` or `PATH:STRENGTH`, for argparse. Paths may contain colons: one that exists as a whole is a path."""
    path, _, number = text.rpartition(":")
    try:
        float(number)
    except ValueError:
        return text, 1.0
    with contextlib.suppress(OSError):  # too long for a name
        if not path or Path(text).exists():
            return text, 1.0
    return path, strength(number)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device NAME`."""
    parser.add_argument("--device", metavar="NAME", help="default: cuda, else mps, else cpu")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`."""
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on cuda, else fp32")


def add_batch_size(parser: argparse.ArgumentParser, default: int) -> None:
    """`--batch-size N`."""
    parser.add_argument(
        "--batch-size", type=positive, default=default, metavar="N", help=f"images at a time (default: {default})"
    )


def _number(kind: type[float], low: float, high: float, text: str) -> Any:
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:  # nan is not
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected {what} from {low:,} to {high:,}")
    return number


positive: Callable[[str], int] = partial(_number, int, 1, 1_000_000)
count: Callable[[str], int] = partial(_number, int, 1, 10_000)
seed: Callable[[str], int] = partial(_number, int, -(2**63), 2**63 - 1)
port: Callable[[str], int] = partial(_number, int, 0, 65_535)
share: Callable[[str], float] = partial(_number, float, 0, 1)
amount: Callable[[str], float] = partial(_number, float, 0, 1000)
strength: Callable[[str], float] = partial(_number, float, -1000, 1000)
"""The numbers that options take, for argparse; each has limits. Also negative: `strength`."""


def shard(text: str) -> tuple[int, int]:
    """`I/N`, for argparse."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and len(text) < 20 and 1 <= int(number) <= int(count) <= 10**6):
        raise argparse.ArgumentTypeError(f"{text[:40]}: expected I/N with I from 1 to N, such as 3/30")
    return int(number), int(count)
