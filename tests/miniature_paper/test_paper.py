"""Laws of a run of the miniature paper: a training that diverges is a finding, whatever else fails ends the run."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from miniature_paper.config import PaperConfig
from miniature_paper.pool import Pool
from miniature_paper.run import _check

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.stages import Stages
from ether_diffusion.benchmark.worker import DIVERGED, TRAINED, stages_file
from ether_diffusion.config import load_config
from ether_diffusion.errors import TrainingFailed, UserError

OFT, REFIT = Unit("controllable", "oft"), Unit("controllable", "oft_magnitude")
MUG = Unit("dreambooth", "oft", "smiling_mug")


@pytest.fixture
def tables(tmp_path: Path) -> Plan:
    config = load_config(PaperConfig, "benchmark/paper_mini", [f"output_dir={tmp_path}"])
    parts = {"dreambooth": config.dreambooth, "controllable": config.controllable}
    return Plan(config.tables({task: {cell.method: cell for cell in part.cells()} for task, part in parts.items()}))


def diverge(plan: Plan, unit: Unit) -> None:
    stages = Stages(stages_file(plan, unit))
    stages.begin(TRAINED, {})
    stages.end(TRAINED, {DIVERGED: "step 3: the loss is nan"})


def test_a_training_of_the_tables_that_diverges_does_not_end_the_paper(tables: Plan) -> None:
    failed = {OFT: "step 3: the loss is nan", MUG: "step 3: the loss is nan", REFIT: "oft failed"}
    diverge(tables, OFT)
    with pytest.raises(UserError, match=r"smiling_mug.*\n.*oft_magnitude"):
        _check(failed, tables)
    diverge(tables, MUG)
    with pytest.raises(UserError, match=r"^controllable/oft_magnitude"):
        _check(failed, tables)
    _check(failed, tables, {REFIT: OFT})


@dataclass(frozen=True)
class Note:
    name: str
    done: list[str] = field(default_factory=list)
    fault: str | None = None

    def __str__(self) -> str:
        return self.name

    def do(self) -> None:
        self.done.append(self.name)
        if self.fault is not None:
            raise TrainingFailed(self.fault)


def test_what_builds_on_a_job_that_failed_fails_unbegun_and_the_others_go_on() -> None:
    done: list[str] = []
    jobs = [Note("first", done, "nan"), Note("second", done), Note("third", done), Note("fourth", done)]
    said: list[str] = []
    with ThreadPoolExecutor(1) as executor:
        failed = Pool(executor, said.append).run(jobs, "x", {1: 0, 3: 2})  # pyright: ignore[reportArgumentType]
    assert failed == {0: "nan", 1: "first, which it builds on, failed"}
    assert sorted(done) == ["first", "fourth", "third"]
    assert len(said) == len(jobs)
