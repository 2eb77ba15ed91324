"""Which trainings of a benchmark share passes, and who works on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.benchmark.config import BenchmarkConfig, Unit
from ether_diffusion.benchmark.executors import Job, Pool, PoolUnits, Shard, WorkerLost
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.config import ConfigError, load_config

CONFIGS = Path(__file__).parents[2] / "configs/benchmark"


def plan(name: str, *overrides: str, kind: Any = BenchmarkConfig) -> Plan:
    config = load_config(kind, CONFIGS / f"{name}.yaml", overrides)
    return Plan(config.benchmark() if kind is GridConfig else config)


def sizes(plan: Plan) -> list[int]:
    return [len(pack) for pack in plan.packs]


def test_all_subjects_of_a_method_that_packs_train_together() -> None:
    """In the benchmark of the miniature: 16 of its 27 trainings. LoRA's do not, nor those with condition encoders."""
    found = plan("tinyworld")
    assert [{unit.method for unit in pack} for pack in found.packs] == [{"ether"}, {"ether_plus"}]
    assert [sorted(str(unit.subject) for unit in pack) for pack in found.packs] == [sorted(found.names())] * 2


def test_cells_that_differ_in_rate_or_seed_alone_train_together() -> None:
    seeds = plan("rates_tinyworld", "dreambooth.grid.seeds=[0, 1]", kind=GridConfig)
    assert [{unit.method.partition("-")[0] for unit in pack} for pack in seeds.packs] == [{"ether"}, {"ether_plus"}]
    assert sizes(seeds) == [6, 6]
    blocks = "dreambooth.grid.axes={training.learning_rate: [0.001, 0.01], adapter.num_blocks: [1, 4]}"
    lacks = "dreambooth.grid.axes_of={lora: {adapter.num_blocks: []}}"
    apart = plan("rates_tinyworld", blocks, lacks, "controllable=null", kind=GridConfig)
    assert [[unit.method for unit in pack] for pack in apart.packs][:2] == [
        [f"ether-learning_rate_{rate}-num_blocks_{number}-seed_0" for rate in (0.001, 0.01)] for number in (1, 4)
    ]


@pytest.mark.parametrize(("pack", "expected"), [("3", [3, 2, 3] * 2), ("8", [8, 8]), ("1", []), ("off", [])])
def test_the_setting_bounds_a_pack_and_the_sizes_are_even(pack: str, expected: list[int]) -> None:
    assert sorted(sizes(plan("tinyworld", f"pack={pack}"))) == sorted(expected)


def test_the_word_off_needs_no_quotes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((CONFIGS / "tinyworld.yaml").read_text().replace("pack: auto", "pack: off"))
    assert load_config(BenchmarkConfig, tmp_path / "config.yaml").pack == "off"


@pytest.mark.parametrize("pack", ["0", "all", "1.5", "true"])
def test_other_values_are_refused_with_those_that_can_be(pack: str) -> None:
    with pytest.raises(ConfigError, match=r"pack(.|\n)*auto"):
        plan("tinyworld", f"pack={pack}")


@pytest.mark.parametrize("setting", ["training.compile=true", "training.profile=3", "adapter.text_encoder=true"])
def test_what_shares_no_passes_trains_alone(setting: str) -> None:
    assert plan("tinyworld", f"dreambooth.settings=[{setting}]").packs == []


def test_a_pack_is_whole_in_a_share_and_the_shares_are_even() -> None:
    units = [
        Unit("dreambooth", method, f"s{number}") for number in range(30) for method in ("ether", "ether_plus", "lora")
    ]
    of_it = {method: [unit for unit in units if unit.method == method] for method in ("ether", "ether_plus")}
    packs = [tuple(own[start : start + 6]) for own in of_it.values() for start in range(0, 30, 6)]
    for count in (2, 5, 9):
        shares = [Shard(number, count).of(units, packs) for number in range(1, count + 1)]
        assert sorted((unit for share in shares for unit in share), key=units.index) == units
        assert all(sum(pack[0] in share for share in shares) == 1 for pack in packs)
        assert all(set(pack) <= set(share) for pack in packs for share in shares if pack[0] in share)
        assert max(map(len, shares)) - min(map(len, shares)) <= 6


@dataclass
class Noted(Pool[Job]):
    """Does nothing, and notes the names of jobs; loses the workers of packs if `loses`."""

    names: list[str] = field(default_factory=list)
    loses: bool = False

    def start(self, job: Job) -> Job:
        return job

    def wait(self, running: Collection[Job]) -> Job:
        return next(iter(running))

    def result(self, ended: Job) -> str | None:
        self.names.append(str(ended))
        if self.loses and "together" in str(ended):
            raise WorkerLost("SIGKILL")
        return None


@pytest.mark.parametrize("loses", [False, True])
def test_the_units_of_a_pack_follow_it_and_do_not_fail_with_it(tmp_path: Path, loses: bool) -> None:
    found = plan("tinyworld", f"output_dir={tmp_path}", "dreambooth.subjects=[robot, monster]", "controllable=null")
    pool = Noted(1, lambda line: None, retries=1, loses=loses)
    assert PoolUnits(pool).run(found.config, found.units()) == {}
    pack = "dreambooth/ether/robot and 1 more, trained together"
    assert pool.names.count(pack) == (2 if loses else 1)
    for name in ("robot", "monster"):
        assert pool.names.index(f"dreambooth/ether/{name}") > pool.names.index(pack)
    assert len({*pool.names}) == 2 + 6


def test_units_that_build_on_others_and_parts_of_packs_are_done_one_by_one(tmp_path: Path) -> None:
    found = plan("tinyworld", f"output_dir={tmp_path}", "dreambooth.subjects=[robot, monster]", "controllable=null")
    by_name = {str(unit): unit for unit in found.units()}
    one, other = by_name["dreambooth/ether/monster"], by_name["dreambooth/ether/robot"]
    pool = Noted(1, lambda line: None)
    assert PoolUnits(pool, after={one: other}).run(found.config, found.units()) == {}
    assert not any(name.startswith("dreambooth/ether/") and "together" in name for name in pool.names)
    pool = Noted(1, lambda line: None)
    PoolUnits(pool).run(found.config, [one])
    assert pool.names == [str(one)]
