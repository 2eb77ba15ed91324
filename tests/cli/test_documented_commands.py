"""Commands that README, docs, configs and scripts show: the parser accepts each, and its config each setting."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ether_diffusion.benchmark.config import BenchmarkConfig
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from ether_diffusion.training.controllable_config import ControllableConfig
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion_cli.main import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "configs").glob("*/*.yaml")),
    *sorted((ROOT / "ether_diffusion/evaluation/protocol_files").glob("*/*.yaml")),
    *sorted([*ROOT.glob("train_*.py"), *(ROOT / "eval").glob("*.py")]),
]
SCRIPTS = {
    "train_dreambooth.py": ["train", "dreambooth"],
    "train_controllable.py": ["train", "controllable"],
    "eval/dreambooth.py": ["score"],
    "eval/controllable.py": ["score"],
    **{f"eval/{name}.py": [name] for name in ("compare", "benchmark", "grid")},
    **{f"eval/{name}.py": ["analyze", name] for name in ("geometry", "energy", "perturbation", "cost")},
}
PROGRAMS = "|".join(["ether-diffusion", "-m ether_diffusion_cli", *map(re.escape, SCRIPTS)])
PROGRAM = re.compile(rf"(?:^|[\s/'])({PROGRAMS}) (?=\S)")
GAP = "…"
CONFIGS = {
    "dreambooth": DreamBoothConfig,
    "controllable": ControllableConfig,
    "benchmark": BenchmarkConfig,
    "grid": GridConfig,
}
OWN = "my.yaml"
"""Stands for a config of the reader's."""
OTHER_PROGRAMS = {
    "make": r"[a-z-]+( [A-Z]+=\S+)*",
    "pip": r"install (-e \.|-e '\.\[(?P<extra>\w+)\]'|[a-z0-9 ]+)",
    "accelerate": r"(launch .*train_\w+\.py .*|config)",
    "python": r"((?P<file>(benchmarks|eval|tests)/\w+\.py|train_\w+\.py)|-m (?P<module>ether_diffusion[\w.]*))( .*)?",
    "ether-diffusion": ".*",
    "sbatch": r"--array=\S+ .*--wrap 'ether-diffusion .*'",
}
"""The other programs of shell blocks, and what may follow."""


def lines(page: Path) -> Iterator[tuple[str, bool]]:
    """The lines of a page that may hold a command, and whether a command there is whole, to be copied as it stands."""
    text = re.sub(r"\\\n[ \t#]*", "", page.read_text(encoding="utf-8"))
    if page.suffix == ".md":
        for block in re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S):
            yield from ((re.split(r"(?:^|\s)#", line)[0], True) for line in block.splitlines())
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S)
        yield from ((code.replace("\n", " "), False) for code in re.findall(r"`([^`]+)`", prose))
    else:
        for line in text.splitlines():
            yield re.split(r"\s#", line.replace("$(BIN)/", "").lstrip("# "))[0], False


def commands(page: Path) -> Iterator[tuple[str, bool]]:
    """Command lines from the program's name on, and whether they are whole."""
    for line, is_whole in lines(page):
        for found in PROGRAM.finditer(line):
            command = re.split(r" && |; |`", line[found.start(1) :])[0].strip()
            # `--wrap 'python script …'`: the quote that opened before the program.
            command = command.removesuffix("'") if command.count("'") % 2 else command
            yield command.removeprefix("-m "), is_whole and GAP not in command


def words_of(command: str) -> list[str]:
    """What the parser gets: the script's command in its place, a value for each variable, no gaps or optional parts."""
    command = re.sub(r"\$\(\w+\)|\$\w+", "1", command)
    program, *words = shlex.split(re.sub(r" \[[^]=]*\]", "", command))
    # A gap after an option is its value; elsewhere it stands for more options.
    kept = [word for before, word in zip(["", *words], words, strict=False) if word != GAP or before.startswith("--")]
    return [*SCRIPTS.get(program, []), *kept]


def fault(command: str, is_whole: bool, capsys: pytest.CaptureFixture[str]) -> str | None:
    """The parser's complaint about a command. What is not whole may lack arguments, not have unknown ones."""
    try:
        parse(words_of(command))
    except SystemExit as ended:
        message = capsys.readouterr().err
        lacks = "are required" in message or "is required" in message
        return None if ended.code == 0 or (lacks and not is_whole) else message
    return None


def setting_faults(command: str) -> str | None:
    """What the config says of a command's settings; None: nothing, or the command has none."""
    arguments = parse(words_of(command))
    model = CONFIGS.get(getattr(arguments, "task", None) or arguments.command)
    if model is None or not hasattr(arguments, "overrides") or arguments.config == OWN:
        return None
    config = ROOT / arguments.config
    try:
        load_config(model, config if config.is_file() else arguments.config, arguments.overrides)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.name)
def test_documented_settings_are_valid(page: Path) -> None:
    found = {command: setting_faults(command) for command, is_whole in commands(page) if is_whole}
    assert {command: message for command, message in found.items() if message} == {}


@pytest.mark.parametrize("page", [page for page in PAGES if page.suffix == ".md"], ids=lambda page: page.name)
def test_every_line_of_a_shell_block_is_a_command_that_exists(page: Path) -> None:
    """Ours are parsed above. Of other programs, what they name is there: a target, an extra, a script, a module."""
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    unknown = []
    for line in (line.strip() for line, is_whole in lines(page) if is_whole and line.strip()):
        program, _, rest = line.partition(" ")
        found = re.fullmatch(OTHER_PROGRAMS.get(program, "$."), rest)
        named = found.groupdict() if found else {}
        is_there = {
            "file": lambda name: (ROOT / name).is_file(),
            "module": lambda name: importlib.util.find_spec(name) is not None,
            "extra": extras.__contains__,
        }
        target = re.search(rf"^{re.escape(rest.split(' ')[0])}:", makefile, re.M) if program == "make" else True
        if not (found and target and all(is_there[key](name) for key, name in named.items() if name)):
            unknown.append(line)
    assert unknown == []


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.name)
def test_documented_commands_are_accepted(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {command: fault(command, is_whole, capsys) for command, is_whole in commands(page)}
    assert {command: message for command, message in found.items() if message} == {}


def test_commands_are_found_and_faults_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    assert len([whole for _, whole in commands(ROOT / "README.md") if whole]) >= 5
    for command in ("ether-diffusion draw", "ether-diffusion score RUN --judges x", "eval/compare.py"):
        assert fault(command, True, capsys)
    assert fault("ether-diffusion report RUN", False, capsys) is None
    assert "--output" in (fault("ether-diffusion report RUN", True, capsys) or "")
