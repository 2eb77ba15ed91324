"""Laws of counts by scene: they sum to the segmenter's scores, and are found again only for other images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from miniature_paper.config import PaperConfig
from miniature_paper.counts import CountsJob, read_counts
from miniature_paper.estimates import map_estimates
from miniature_paper.run import write_scenes
from PIL import Image

from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.worker import images_folder
from ether_diffusion.config import load_config
from ether_diffusion.evaluation.protocols import Bootstrap
from ether_diffusion.metrics.segmentation import SegmentationScore
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.scoring import load_scorers

UNIT = Unit("controllable", "none")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Of three scenes, as if a method had drawn the real ones."""
    folder = tmp_path_factory.mktemp("paper")
    small = ["controllable.scenes={training: 2, choosing: 2, tables: 3}", f"output_dir={folder}"]
    config = load_config(PaperConfig, "benchmark/paper_mini", small)
    write_scenes(config)
    parts = {"dreambooth": config.dreambooth, "controllable": config.controllable}
    plan = Plan(config.tables({task: {cell.method: cell for cell in part.cells()} for task, part in parts.items()}))
    for pair in plan.scenes.pairs:
        assert pair.image is not None
        save_png(Image.open(pair.image), images_folder(plan, UNIT) / "images" / f"{pair.name}.png")
    return plan


def job(plan: Plan, folder: Path) -> CountsJob:
    return CountsJob(plan.config.model_dump_json(), UNIT, folder / "counts.json")


def test_counts_sum_to_what_the_segmenter_scores(plan: Plan, tmp_path: Path) -> None:
    job(plan, tmp_path).do()
    found = read_counts(tmp_path / "counts.json")
    assert found is not None
    counts = found["segmenter"]
    pairs = [(pair.image, pair.condition) for pair in plan.scenes.pairs if pair.image and pair.condition]
    seen = load_scorers().segment([Image.open(image).convert("RGB") for image, _ in pairs])
    labels = np.stack([np.asarray(Image.open(condition)) for _, condition in pairs])
    whole = SegmentationScore(23).update(seen, labels).compute()
    estimates = map_estimates(counts, Bootstrap(replicates=5))
    assert counts.shape == (3, 3, 23)
    for name in ("miou", "pixel_accuracy"):
        assert estimates[name].value == whole[name] > 0.5


def test_counts_are_kept_as_long_as_the_images_are(plan: Plan, tmp_path: Path) -> None:
    one = job(plan, tmp_path)
    one.do()
    before = one.file.stat()
    one.do()
    assert (one.file.stat().st_ino, one.file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    file = images_folder(plan, UNIT) / "images" / f"{plan.scenes.pairs[0].name}.png"
    content, counts = file.read_bytes(), read_counts(one.file)
    save_png(Image.new("RGB", (64, 64)), file)
    one.do()
    changed = read_counts(one.file)
    file.write_bytes(content)
    assert counts is not None
    assert changed is not None
    same = (counts["segmenter"] == changed["segmenter"]).flatten(1).all(dim=1).tolist()
    assert same == [False, True, True]


def test_what_was_not_counted_is_not_there(tmp_path: Path) -> None:
    assert read_counts(tmp_path / "none.json") is None
