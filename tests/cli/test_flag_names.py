"""A fault of what a flag gave names the flag, in every command that has flags; a config's faults keep their keys."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion_cli import main
from ether_diffusion_cli.flag_names import COUNTERPARTS, DIGEST, with_flags
from ether_diffusion_cli.main import build_parser, parse
from support.adapted_unets import moved_unet


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the commands that have flags alone, without settings."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups and not any(action.dest == "overrides" for action in parser._actions):
        yield parser
    for group in groups:
        for command in group.choices.values():
            yield from commands(command)


def given(parser: argparse.ArgumentParser, **values: Any) -> argparse.Namespace:
    """Arguments as the parser leaves them where these options were given."""
    defaults = {action.dest: action.default for action in parser._actions}
    return argparse.Namespace(**{**defaults, **values}, parser=parser)


OPTIONS = [
    pytest.param(command, action, id=f"{command.prog.partition(' ')[2]} {action.option_strings[0]}")
    for command in commands(build_parser())
    for action in command._actions
    if action.option_strings and action.dest != "help"
]


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_every_option_is_named_as_a_flag(command: argparse.ArgumentParser, action: argparse.Action) -> None:
    key, flag = action.dest, action.option_strings[0]
    arguments = given(command, **{key: "x"})
    value = "true" if action.nargs == 0 else "3"
    set_to = flag if action.nargs == 0 else f"{flag} 3"
    assert with_flags(f"{key}: 3 is wrong", arguments) == f"{flag}: 3 is wrong"
    if key not in (DIGEST, "requests"):  # with requests, a value is a row's
        assert with_flags(f"generate: give {key} = {value}; or not", arguments) == f"generate: give {set_to}; or not"
    if f"data.{key}" not in COUNTERPARTS:
        assert with_flags(f"give data.{key}={value} or data.{key}", arguments) == f"give {set_to} or {flag}"
    # A config's own value, and words and paths that are spelled alike.
    is_required = command.get_default(key) == argparse.SUPPRESS  # RUN, or --adapter RUN
    assert is_required or with_flags(f"{key}: 3 is wrong", given(command)) == f"{key}: 3 is wrong"
    other = f"runs/{key}=3/x: the {key} of a '{key}=3'"
    assert with_flags(other, arguments) == other


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("generate --prompt a --base-model nowhere/x/y", "--base-model: 'nowhere/x/y' does not exist."),
        ("generate --prompt a --base-model tiny --vae nowhere", "--vae: 'nowhere' does not exist."),
        ("generate --prompt a --base-model tiny --steps 2000", "--steps 2000; dpm++ takes 1 to 1000 with this base."),
        ("export run --base nowhere --output o.safetensors", "--base: 'nowhere' does not exist."),
        ("inspect run --base nowhere", "--base: 'nowhere' does not exist."),
        ("analyze perturbation --target nowhere", "--target: 'nowhere' matches no linear"),
        ("analyze perturbation --base-model nowhere --prompts prompts.txt", "--base-model: 'nowhere' does not exist."),
        ("data check grey", "Give --condition labels (painted with"),
        ("data check ADEChallengeData2016 --condition image", "--condition image, but ADEChallengeData2016 is"),
    ],
)  # fmt: skip
def test_commands_name_the_flag_that_was_given(
    command: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(moved_unet("ether"), "run", base_model="tiny")
    Path("prompts.txt").write_text("a red ball\n")
    for name in ("grey/images", "ADEChallengeData2016/images/training"):
        Path(name).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(f"{name}/a.png")
    for name in ("grey/conditions", "ADEChallengeData2016/annotations/training"):
        Path(name).mkdir(parents=True)
        Image.new("L", (64, 64), 3).save(f"{name}/a.png")
    assert main(shlex.split(command)) == 2
    assert says in capsys.readouterr().err


def test_conditions_of_a_run_are_named_as_generate_spells_them() -> None:
    """`--condition` of `generate` is a file; the kind of conditions is its `--preprocessor`."""
    arguments = parse(["generate", "--adapter", "run", "--prompt", "a"])
    assert with_flags("give data.condition=canny for data.dataset_dir", arguments) == (
        "give --preprocessor canny for --dataset"
    )


def test_commands_that_take_settings_keep_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dreambooth", "--config", "quickstart/dreambooth", "base_model=nowhere/x/y"]) == 2
    assert "base_model: 'nowhere/x/y' does not exist." in capsys.readouterr().err
