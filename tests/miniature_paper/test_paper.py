"""Laws of a run of the miniature paper: a diverged training is a result; any other failure ends the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.stages import DIVERGED, TRAINED
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from miniature_paper.config import PaperConfig
from miniature_paper.run import check_failures

OFT, REFIT = Unit("controllable", "oft"), Unit("controllable", "oft_magnitude")
MUG = Unit("dreambooth", "oft", "smiling_mug")


@pytest.fixture
def tables(tmp_path: Path) -> Plan:
    config = load_config(PaperConfig, "benchmark/paper_mini", [f"output_dir={tmp_path}"])
    parts = {"dreambooth": config.dreambooth, "controllable": config.controllable}
    return Plan(config.tables({task: {cell.method: cell for cell in part.cells()} for task, part in parts.items()}))


def diverge(plan: Plan, unit: Unit) -> None:
    stages = plan.stages(unit)
    stages.begin(TRAINED, {})
    stages.end(TRAINED, {DIVERGED: "step 3: the loss is nan"})


def test_a_diverged_training_of_the_tables_does_not_end_the_paper(tables: Plan) -> None:
    failed = {OFT: "step 3: the loss is nan", MUG: "step 3: the loss is nan", REFIT: "oft failed"}
    diverge(tables, OFT)
    with pytest.raises(UserError, match=r"smiling_mug.*\n.*oft_magnitude"):
        check_failures(failed, tables)
    diverge(tables, MUG)
    with pytest.raises(UserError, match=r"^controllable/oft_magnitude"):
        check_failures(failed, tables)
    check_failures(failed, tables, {REFIT: OFT})
