"""Laws of the miniature paper's estimates: they come from results.json, and agree with a second segmentation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.intervals import Estimate, Interval
from ether_diffusion.evaluation.map_images import find_map_images
from ether_diffusion.evaluation.map_scores import score_maps, segmentation_estimates
from ether_diffusion.evaluation.protocols import MapProtocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.metrics.segmentation import class_counts
from ether_diffusion.pictures import save_png
from miniature_paper.config import PaperConfig
from miniature_paper.gains import map_estimates, mean_estimate, over_subjects
from miniature_paper.run import write_scenes

ONE, OTHER = Unit("controllable", "none"), Unit("controllable", "oft")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Three scenes, scored as if one method had generated the real images, and another those of the next scene."""
    folder = tmp_path_factory.mktemp("paper")
    small = ["controllable.scenes={training: 2, choosing: 2, tables: 3}", f"output_dir={folder}"]
    config = load_config(PaperConfig, "benchmark/paper_mini", small)
    write_scenes(config)
    parts = {"dreambooth": config.dreambooth, "controllable": config.controllable}
    plan = Plan(config.tables({task: {cell.method: cell for cell in part.cells()} for task, part in parts.items()}))
    protocol = plan.part("controllable")[1]
    assert isinstance(protocol, MapProtocol)
    scorers, pairs = load_scorers(protocol.judges), plan.scenes.pairs
    for unit, shown in ((ONE, pairs), (OTHER, pairs[1:] + pairs[:1])):
        for pair, other in zip(pairs, shown, strict=True):
            assert other.image is not None
            save_png(Image.open(other.image), plan.images_folder(unit) / "images" / f"{pair.name}.png")
        found = find_map_images(protocol, plan.images_folder(unit), plan.scenes)
        score_maps(protocol, plan.scenes, found, scorers, {}).save(plan.scores_file(unit))
    return plan


def segmented(plan: Plan, unit: Unit) -> dict[str, Estimate]:
    """The estimates of a second segmentation of the same images."""
    protocol = plan.part("controllable")[1]
    segment = load_scorers({"segmenter": protocol.judges["segmenter"]})["segmenter"].network
    files = [plan.images_folder(unit) / "images" / f"{pair.name}.png" for pair in plan.scenes.pairs]
    conditions = [pair.condition for pair in plan.scenes.pairs if pair.condition]
    labels = np.stack([np.asarray(Image.open(condition)) for condition in conditions])
    counts = class_counts(segment([Image.open(file).convert("RGB") for file in files]), labels, 23)
    return segmentation_estimates(counts, protocol.bootstrap)


def test_estimates_are_those_of_a_second_segmentation(plan: Plan) -> None:
    read, again = ({unit: find(plan, unit) for unit in (ONE, OTHER)} for find in (map_estimates, segmented))
    for name, key in (("mIoU", "miou"), ("accuracy", "pixel_accuracy")):
        for unit in (ONE, OTHER):
            assert read[unit][name].value == again[unit][key].value
            assert torch.equal(read[unit][name].replicas, again[unit][key].replicas)
        difference = (read[ONE][name] - read[OTHER][name]).interval()
        assert difference == (again[ONE][key] - again[OTHER][key]).interval()
        assert difference.value > 0.3


def test_estimates_are_the_values_of_the_results(plan: Plan) -> None:
    metrics = Results.read(plan.scores_file(OTHER)).metrics
    found = map_estimates(plan, OTHER)
    assert {name: estimate.value for name, estimate in found.items()} == {
        name: metrics[name].value for name in ("mIoU", "accuracy")
    }


def test_results_without_counts_of_all_scenes_are_refused(plan: Plan) -> None:
    file = plan.scores_file(ONE)
    whole = Results.read(file)
    try:
        whole.model_copy(update={"per_image": {}}).save(file)
        with pytest.raises(UserError, match=r"results\.json: per_image\.segmenter has 0 of 3 scenes\. Delete the file"):
            map_estimates(plan, ONE)
    finally:
        whole.save(file)


def test_seeds_are_averaged() -> None:
    one, other = (Estimate(value, torch.linspace(0, value, 9).double()) for value in (1.0, 2.0))
    both = mean_estimate([one, other])
    assert both.value == 1.5
    assert torch.allclose(both.replicas, (one.replicas + other.replicas) / 2)


def test_subjects_are_compared_with_themselves() -> None:
    """What a subject does to both methods cancels."""
    one, other = {"a": 0.9, "b": 0.3, "c": 0.6}, {"c": 0.5, "b": 0.2, "a": 0.8}
    found = over_subjects(one, other)
    assert (found.low, found.high) == pytest.approx((0.1, 0.1))
    assert over_subjects({"a": 0.7}, {"a": 0.7}) == Interval(0.0, -math.inf, math.inf)
