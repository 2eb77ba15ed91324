"""`--help` of every command and script: answered at once, before anything heavy is imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ether_diffusion_cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.relative_to(ROOT) for path in (*ROOT.glob("train_*.py"), *(ROOT / "eval").glob("*.py")))


def commands(parser: argparse.ArgumentParser, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command and of its subcommands."""
    yield words
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands(inner, (*words, name))


COMMANDS = list(commands(build_parser()))


def help_of(*command: str | Path) -> str:
    """What `--help` prints, without any import beyond the standard library and the command line's own."""
    line = [sys.executable, "-X", "importtime", *map(str, command), "--help"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    heavy = {name for name in imported if name.partition(".")[0] in HEAVY}
    assert not heavy
    return done.stdout


HEAVY = {"ether_diffusion", "miniature_paper", "torch", "numpy", "PIL", "pydantic", "yaml", "peft", "diffusers", "ray"}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_of_a_command_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    shown = help_of("-m", "ether_diffusion_cli", *words)
    assert shown.startswith(" ".join(["usage: ether-diffusion", *words, "[-h]"]))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_of_a_script_names_the_script_and_imports_nothing_heavy(script: Path) -> None:
    shown = help_of(script)
    assert shown.startswith((f"usage: {script} [-h]", f"usage: {script.name} [-h]"))


def test_every_command_of_the_plan_is_there() -> None:
    words = {" ".join(words) for words in COMMANDS}
    assert {"train dreambooth", "train controllable", "score", "compare", "inspect", "data check"} <= words
    assert {f"analyze {name}" for name in ("geometry", "energy", "perturbation", "cost")} <= words


def test_every_option_has_a_help_text() -> None:
    def check(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (parser.prog, action.dest)
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help for choice in action._choices_actions)
                for inner in action.choices.values():
                    assert inner.description
                    check(inner)

    check(build_parser())
