"""Laws of the miniature paper's config: methods differ in method and rate only; tables choose no rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ether_diffusion.benchmark.config import BenchmarkConfig, Unit
from ether_diffusion.benchmark.grid_config import Cell
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.config import ConfigError, load_config
from ether_diffusion.training.checkpoint import flatten
from miniature_paper.config import RATE, PaperConfig
from miniature_paper.run import write_scenes

ENCODER = "training.encoder_learning_rate"
OWN = ("adapter.", "output_dir", RATE, ENCODER, "training.keep_checkpoints")
"""Settings that may differ. Of whole modules fewer checkpoints are kept."""


def load(*overrides: str) -> PaperConfig:
    return load_config(PaperConfig, "benchmark/paper_mini", overrides)


def quick() -> PaperConfig:
    return load("is_quick=true", *load().quick)


@pytest.fixture
def config(tmp_path: Any) -> PaperConfig:
    small = ["controllable.scenes={training: 2, choosing: 2, tables: 3}", f"output_dir={tmp_path}"]
    config = load(*small)
    write_scenes(config)
    return config


def tables(config: PaperConfig) -> BenchmarkConfig:
    """As if the grid had chosen the rates of the middle."""
    best: dict[str, dict[str, Cell]] = {}
    for task, part in (("dreambooth", config.dreambooth), ("controllable", config.controllable)):
        best[task] = {cell.method: cell for cell in part.cells()}
    best["controllable"] |= {name: Cell(name, ((RATE, 0.5),), 0) for name in config.controllable.refits}
    return config.tables(best)


@pytest.mark.parametrize("made", [lambda config: config.rates().benchmark(), tables], ids=["rates", "tables"])
def test_methods_have_equal_steps_data_layers_and_seeds(
    config: PaperConfig, made: Callable[[PaperConfig], BenchmarkConfig]
) -> None:
    plan = Plan(made(config))
    apart = (config.dreambooth.base, *config.controllable.refits)
    for task in plan.tasks:
        seen, targets = {}, {}
        for unit in plan.units():
            if unit.task != task or unit.method.split("-")[0] in apart:
                continue
            training: Any = plan.training(unit)
            settings = flatten(training.model_dump(mode="json"))
            if task == "controllable":  # as in the paper, up to a bound that suits shorter runs
                assert settings[ENCODER] == min(settings[RATE], 0.002), unit
            alike = {key: value for key, value in settings.items() if not key.startswith(OWN)}
            seen.setdefault(unit.subject, []).append(alike)
            if training.adapter.method not in ("none", "full"):
                targets[unit.method] = training.adapter.target
        for found in seen.values():
            assert all(one == found[0] for one in found)
        assert len({str(target) for target in targets.values()}) == 1, targets


def test_rates_are_not_chosen_on_the_tables_data(config: PaperConfig) -> None:
    rates, table = Plan(config.rates().benchmark()), Plan(tables(config))
    assert not set(rates.names()) & set(table.names())
    chosen_on = {pair.image.read_bytes() for pair in rates.scenes.pairs if pair.image}
    shown = {pair.image.read_bytes() for pair in table.scenes.pairs if pair.image}
    assert (len(chosen_on), len(shown)) == (2, 3)
    assert not chosen_on & shown
    with pytest.raises(ConfigError, match="rates are not chosen on the table's"):
        load("dreambooth.subjects=[smiling_mug]")


def test_both_train_on_the_same_scenes(config: PaperConfig) -> None:
    files = [sorted(config.scenes_folder(use).glob("*/training/*")) for use in ("choosing", "tables")]
    assert len(files[0]) == 4
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


def test_scenes_are_rendered_again_only_when_their_number_changes(config: PaperConfig) -> None:
    folder = config.scenes_folder("tables")
    before = folder.stat().st_ino
    write_scenes(config)
    assert folder.stat().st_ino == before
    scenes = config.controllable.scenes.model_copy(update={"tables": 4})
    more = config.model_copy(update={"controllable": config.controllable.model_copy(update={"scenes": scenes})})
    write_scenes(more)
    assert len(list(folder.glob("images/validation/*"))) == 4


def test_a_second_phase_trains_after_the_tables_first_one(config: PaperConfig) -> None:
    plan = Plan(tables(config))
    for name, refit in config.controllable.refits.items():
        training: Any = plan.training(Unit("controllable", name))
        assert training.adapter.after == plan.run_folder(Unit("controllable", refit.after))
        assert training.training.learning_rate == 0.5


def test_the_quick_one_asks_for_the_same_methods_and_writes_elsewhere() -> None:
    whole, small = load(), quick()
    assert small.page != whole.page
    assert small.output_dir != whole.output_dir
    assert small.dreambooth.methods.keys() == whole.dreambooth.methods.keys()
    assert small.controllable.methods.keys() == whole.controllable.methods.keys()
    assert len(small.rates().benchmark().controllable.methods) < len(whole.rates().benchmark().controllable.methods)  # pyright: ignore[reportOptionalMemberAccess]
