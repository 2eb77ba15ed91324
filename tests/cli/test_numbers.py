"""Every number that a config or an option takes has limits: what cannot be meant is refused before any work."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pydantic
import pytest

from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.benchmark.config import BenchmarkConfig
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol
from ether_diffusion.generation.requests_file import Request
from ether_diffusion.training.controllable import ControllableConfig
from ether_diffusion.training.dreambooth import DreamBoothConfig
from ether_diffusion_cli import main
from ether_diffusion_cli.arguments import shard
from ether_diffusion_cli.main import build_parser
from miniature_paper.config import PaperConfig

CONFIGS: list[type[pydantic.BaseModel]] = [
    DreamBoothConfig,
    ControllableConfig,
    BenchmarkConfig,
    GridConfig,
    SubjectProtocol,
    MapProtocol,
    PaperConfig,
    Request,
    *METHODS.values(),
]
WITHOUT_LIMITS = {"axes", "axes_of", "at"}
"""Values of settings of a training, which has the limits."""


def numbers(schema: dict[str, Any], node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers that a config takes: their keys, and their nodes in its JSON schema."""
    if isinstance(node, list):
        for one in node:
            yield from numbers(schema, one, path)
    if not isinstance(node, dict) or "const" in node or "enum" in node:
        return
    if node.get("type") in ("integer", "number"):
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from numbers(schema, inner, f"{path}.{name}".lstrip("."))
    for key in ("anyOf", "oneOf", "items", "prefixItems", "additionalProperties"):
        yield from numbers(schema, node.get(key), path)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_number_of_a_config_has_limits(config: type[pydantic.BaseModel]) -> None:
    schema = config.model_json_schema()
    parts = {config.__name__: schema, **schema.get("$defs", {})}
    unlimited = [
        f"{name}.{key}"
        for name, part in parts.items()
        for key, node in numbers(schema, part)
        if not any(bound in node for bound in ("maximum", "exclusiveMaximum"))
        or not any(bound in node for bound in ("minimum", "exclusiveMinimum"))
    ]
    assert [name for name in unlimited if name.rpartition(".")[2] not in WITHOUT_LIMITS] == []


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[argparse.ArgumentParser, argparse.Action]]:
    """The options that take numbers, of a command and those below it."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options(command)
        elif action.type in (int, float, shard) or isinstance(action.type, partial):
            yield parser, action


OPTIONS = [
    pytest.param(parser, action, id=f"{parser.prog.partition(' ')[2]} {action.option_strings[0]}")
    for parser, action in options(build_parser())
]


@pytest.mark.parametrize(("parser", "action"), OPTIONS)
def test_every_number_of_an_option_has_limits(parser: argparse.ArgumentParser, action: argparse.Action) -> None:
    assert callable(action.type)
    for text in ("nan", "inf", "-inf", "1e39", "-1e39", "9" * 30, "x", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected"):
            action.type(text)
    given = action.default[0] if isinstance(action.default, (list, tuple)) else action.default
    number = 1 if action.type is shard or given is None else given
    assert action.type("1/1" if action.type is shard else str(number)) in (number, (1, 1))


@pytest.mark.parametrize("value", ["1e39", "1001", "-1e-9", ".inf"])
@pytest.mark.parametrize("key", ["training.learning_rate", "training.weight_decay", "data.prior.weight"])
def test_a_number_beyond_its_limit_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str
) -> None:
    command = ["train", "dreambooth", "--config", "quickstart/dreambooth", f"output_dir={tmp_path / 'run'}"]
    assert main([*command, f"{key}={value}"]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1
    assert f"{key}={value}: " in printed
    assert not (tmp_path / "run").exists()
