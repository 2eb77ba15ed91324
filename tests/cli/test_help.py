"""`--help` of every command and script: answered at once, before anything heavy is imported."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ether_diffusion_cli.main import build_parser, main

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


def test_flags_without_a_config_get_the_table_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dreambooth", "--rank", "8", "--use_8bit_adam", "--nonsense", "seed=1", "--scale_lr"]) == 2
    first, *lines = capsys.readouterr().err.splitlines()
    assert first.startswith("ether-diffusion: --config FILE is missing: a YAML file, or the name of a shipped config")
    assert lines == [
        "ether-diffusion: --rank: here it is adapter.rank=8",
        "ether-diffusion: --use_8bit_adam: here it is training.optimizer",
        "ether-diffusion: --nonsense: unknown option",
        "ether-diffusion: --scale_lr: not needed: the rate is used as given, on any number of processes",
    ]


@pytest.mark.parametrize(("flag", "of"), [("--rank", "rank"), ("adapter.rank", "rank"), ("--lora_alpha", "alpha")])
def test_a_hint_names_only_what_the_config_accepts(flag: str, of: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "dreambooth", "--config", "dreambooth/ether_plus", "data.instance_dir=p", f"{flag}=8"]
    assert main(line) == 2
    shown = capsys.readouterr().err
    assert f"adapter.method=ether_plus has no {of}; it belongs to adapter.method=lora" in shown
    assert "here it is" not in shown


def test_a_missing_key_says_what_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {instance_dir: p}\ntraining: {steps: 1}\noutput_dir: o\n")
    assert main(["train", "dreambooth", "--config", str(tmp_path / "c.yaml")]) == 2
    shown = capsys.readouterr().err
    assert "data.class_name: missing: expected text that is not empty, the subject's category, such as dog" in shown


@pytest.mark.skipif(os.name == "nt", reason="there is no /dev/full")
@pytest.mark.parametrize("shown", ["| head -1 > /dev/null", "> /dev/full", "2> /dev/full", ">&-"])
def test_output_that_nobody_can_read_ends_nothing(shown: str, tmp_path: Path) -> None:
    """The work is done to its end: here a file that is written after the lines."""
    code = (
        "import sys; from pathlib import Path; from output import quiet_output\n"
        "with quiet_output():\n"
        "    for n in range(50000): print('line', n, '\\udce9')\n"
        "    print('a note', file=sys.stderr)\n"
        f"    Path({str(tmp_path / 'done')!r}).touch()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ether_diffusion_cli"), "PYTHONIOENCODING": "ascii"}
    line = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {shown}"
    done = subprocess.run(["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=60)
    assert (tmp_path / "done").exists()
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 0


def test_what_a_terminal_cannot_encode_is_escaped(tmp_path: Path) -> None:
    code = "from output import quiet_output\nwith quiet_output(): print('caf\\u00e9 \\udce9')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "ether_diffusion_cli"), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "caf\\xe9 \\udce9\n"


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
