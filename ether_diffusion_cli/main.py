"""The console entry `ether-diffusion`: parses arguments, and only then imports what the command needs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

from . import (
    analyze,
    benchmark,
    compare,
    data,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    push,
    report,
    score,
    serve,
    shelf,
    train,
)
from .arguments import Commands
from .flag_names import naming_flags
from .output import quiet_output

COMMANDS = (
    train,
    generate,
    evaluate,
    score,
    compare,
    export,
    push,
    report,
    benchmark,
    analyze,
    data,
    shelf,
    serve,
    inspect,
    doctor,
)
"""Each module declares its command in `add_parser`, with its options beside what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 bad input, 1 failed, 130 / 143 interrupted after a checkpoint."""
    return _run(sys.argv[1:] if argv is None else list(argv))


def run_script(script: str, *command: str) -> int:
    """Run a command for a script of the checkout, whose name then stands in usage, errors and recorded commands.

    Args:
        command: The words that the script stands for, as `analyze geometry`.
    """
    return _run([*command, *sys.argv[1:]], script, shlex.join(["python", script, *sys.argv[1:]]))


def build_parser(script: str | None = None) -> argparse.ArgumentParser:
    """All commands and their options. Cheap: no import beyond the standard library.

    Args:
        script: The name to show in the usage of a command that a script stands for.
    """
    parser = argparse.ArgumentParser(
        prog="ether-diffusion", description="Fine-tune Stable Diffusion with ETHER and ETHER+ adapters."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = Commands(parser.add_subparsers(dest="command", metavar="COMMAND"), script)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def parse(argv: Sequence[str], script: str | None = None) -> argparse.Namespace:
    """Parse a command line. Settings (`section.key=value`) may stand between options.

    What no option matches is an error of the command, or, where it takes settings, one of them: the config's own checks
    answer flags of other programs.
    """
    parser = build_parser(script)
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        arguments.overrides += [_with_value(flag, argv, arguments.overrides) for flag in rest]
    elif rest:
        getattr(arguments, "parser", parser).error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _with_value(flag: str, argv: Sequence[str], overrides: list[str]) -> str:
    """A flag of another program with the value after it, `--rank 8` as `--rank=8`, which goes from the settings."""
    value = next(iter(argv[argv.index(flag) + 1 :]), "=") if flag in argv and "=" not in flag else "="
    if "=" in value or value not in overrides:
        return flag
    overrides.remove(value)
    return f"{flag}={value}"


def _run(argv: Sequence[str], script: str | None = None, typed: str | None = None) -> int:
    with quiet_output():
        return _answer(argv, script, typed)


def _answer(argv: Sequence[str], script: str | None, typed: str | None) -> int:
    arguments = parse(argv, script)
    if arguments.version:
        from importlib.metadata import version

        print(f"ether-diffusion {version('ether-diffusion')}")
        return 0
    if arguments.command is None:
        build_parser().print_help()
        return 0
    arguments.program = ["python", script] if script else arguments.parser.prog.split()
    arguments.typed = typed or shlex.join(["ether-diffusion", *argv])
    return run_quietly(script or "ether-diffusion", lambda: _act(arguments))


def _act(arguments: argparse.Namespace) -> None:
    with naming_flags(arguments):
        arguments.action(arguments)


def run_quietly(name: str, work: Callable[[], object]) -> int:
    """Do a command's work without its dependencies' warnings, and turn errors into lines and an exit code.

    Args:
        name: What each line of an error begins with.
    """
    try:
        from ether_diffusion.exit_codes import exit_code
        from ether_diffusion.quiet import quiet_dependencies

        quiet_dependencies()  # before the imports of the work, some of which warn
    except OSError as error:  # torch needs a place for temporary files, which a full disk has not
        print(f"{name}: cannot load the package: {error.strerror}", file=sys.stderr)
        return 2
    with quiet_output():
        return exit_code(name, work)
