"""Laws of the miniature paper's page: its sentences on settings and missing rows come from the config."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import Summary
from ether_diffusion.benchmark.grid_config import Cell
from ether_diffusion.config import load_config
from miniature_paper.best_rates import Chosen
from miniature_paper.config import RATE, PaperConfig
from miniature_paper.gains import MapTraining
from miniature_paper.paper_figures import Figures
from miniature_paper.paper_findings import Findings, Scores
from miniature_paper.paper_page import encoder_rates, page_text
from miniature_paper.run import write_scenes
from support.paper_findings import the_papers, trainings


def config(folder: Path, *overrides: str) -> PaperConfig:
    small = ["controllable.scenes={training: 2, choosing: 2, tables: 3}", f"output_dir={folder}", *overrides]
    return load_config(PaperConfig, "benchmark/paper_mini", [*small, f"page={folder / 'page.md'}"])


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> PaperConfig:
    made = config(tmp_path_factory.mktemp("paper"))
    write_scenes(made)
    return made


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["encoder_learning_rate=null", "max_encoder_learning_rate=0.003"], "the adapter's, and at most 0.003;"),
        (["encoder_learning_rate=0.004"], "0.004 at every rate of the adapter;"),
    ],
)
def test_the_encoders_rate_is_that_of_the_trainings(paper: PaperConfig, settings: list[str], text: str) -> None:
    own = [*paper.controllable.settings, *(f"training.{setting}" for setting in settings)]
    part = paper.controllable.model_copy(update={"settings": tuple(own)})
    assert encoder_rates(paper.model_copy(update={"controllable": part})).startswith(
        f"The encoder's learning rate is {text} the encoder alone trains at "
    )


def test_diverged_trainings_are_named(paper: PaperConfig) -> None:
    whole = the_papers()
    sound = page_text(paper, whole, {}, "command")
    assert "diverged:" not in sound
    assert "cross" not in sound
    lost = trainings()
    lost["naive"][-1] = MapTraining(0.1, True, {})
    points = [Summary("full", ((RATE, rate),), None, 0, rate > 0.01, 0, {}) for rate in (0.001, 0.1)]
    full = Chosen(Cell("full", ((RATE, 0.001),), 0), 0.001, 0.7, at_edge=False)
    findings = replace(
        whole,
        trainings=lost,
        grids={"dreambooth": points, "controllable": []},
        chosen={"dreambooth": {"full": full}, "controllable": {}},
        subjects=replace(whole.subjects, diverged=(Unit("dreambooth", "lora", "smiling_mug"),)),
    )
    text = page_text(paper, findings, {}, "command")
    assert "Without a row, because a training diverged: LoRA r=4 on smiling_mug." in text
    assert "A cross marks a training that diverged" in text
    assert "| 0.001, 0.1 (diverged) | 0.001 |" in text


def test_the_page_says_which_numbers_have_no_training_noise_or_no_interval(paper: PaperConfig) -> None:
    text = page_text(paper, the_papers(), {}, "command")
    parts = {part.split("\n")[0]: part for part in text.split("\n## ")}
    assert "one training for each method" in parts["Table 3"]
    assert "t intervals (95%)" in parts["Table 2"]
    assert "LPIPS (0.709 to 0.766" in parts["Table 2"]
    assert [name for name in parts if "Single values" in parts[name]] == ["Fig. 3", "Fig. 4", "Fig. 7"]


def test_only_figures_with_data_are_plotted(paper: PaperConfig) -> None:
    lost = trainings()
    lost["naive"][-1] = MapTraining(0.1, True, {})
    curves = replace(the_papers(), subjects=Scores({}, {}), maps=Scores({}, {}), distances={}, perturbed={})
    plotted = Figures(paper, replace(curves, trainings=lost), "command").plot_all()
    assert set(plotted) == {"fig-5", "fig-6", "fig-7"}
    assert all(file.stat().st_size for file in plotted.values())
    nothing = Findings(Scores({}, {}), Scores({}, {}), {"dreambooth": []}, {"controllable": {}}, {}, {}, {})
    assert Figures(paper, nothing, "command").plot_all() == {}
