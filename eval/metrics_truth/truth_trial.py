"""The trial: every metric on every fault at every degree, for each subject; and the files that show it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ether_diffusion.analysis.output import check_outputs, write_command, write_table
from ether_diffusion.evaluation.galleries import gallery_of
from ether_diffusion.evaluation.intervals import Interval
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.subject_images import find_images
from ether_diffusion.own_files import write_own
from ether_diffusion.progress import progress_bar
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos
from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scoring import load_scorers

from .faults import FAULTS, Images, faulty, scenes_of, spoiled
from .measures import HIGHER_IS_BETTER, agreement, measure, over_subjects
from .truth_page import plot_table, table

DEGREES = (0.0, 0.25, 0.5, 0.75, 1.0)
SEES = 0.3
"""The tau, and above 0 the lower end of its interval, from which on a metric counts as seeing a fault."""
SPOILED = ("individual", "setting", "copy", "blur")
"""The faults that need no scene."""


def cases(count: int, images: Path | None) -> Iterator[tuple[str, str, str, float, Images]]:
    """(source, subject, fault, degree, images): rendered, and of generated images if a folder is given.

    Raises:
        UserError: as `find_images`.
    """
    for name, subject in SUBJECTS.items():
        scenes = scenes_of(subject, count, "images")
        for fault, kind in FAULTS.items():
            for degree in DEGREES:
                yield "rendered", name, fault, degree, faulty(subject, scenes, kind, degree)
    if images is None:
        return
    protocol = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v1")
    opened, prompts = {}, {}
    for found in find_images(protocol, images, "builtin:"):
        pairs = [(template, file) for template, files in found.files.items() for file in files]
        opened[found.name] = [Image.open(file).convert("RGB") for _, file in pairs]
        prompts[found.name] = [protocol.prompt(found.name, template, "") for template, _ in pairs]
    names = list(opened)
    for k, name in enumerate(names):
        others = opened[names[(k + 1) % len(names)]]
        for fault in SPOILED:
            for degree in DEGREES:
                shown = spoiled(opened[name], prompts[name], others, render_photos(name), fault, degree)
                yield "generated", name, fault, degree, shown


def try_metrics(count: int, images: Path | None, output: Path, command: str) -> str:
    """Measure everything; write `table.md`, `table.csv`, `values.csv` and a plot. Returns the table.

    Args:
        count: Images of each subject, fault and degree.
        images: Generated images, as `SUBJECT/images.jsonl`.

    Raises:
        UserError: as `cases` and `check_outputs`.
    """
    check_outputs(output, "table.csv", "table.md", "values.csv", plots=["metrics"])
    scorers, protocol = load_scorers(), load_protocol(SubjectProtocol, "tinyworld/dreambooth-v2")
    galleries: dict[str, torch.Tensor] = {}
    real: dict[str, list[Image.Image]] = {}
    for name, subject in SUBJECTS.items():
        galleries[name] = scorers.identity([p.open() for p in gallery_of(protocol, name, "builtin:").values()])
        real[name] = [render(scene)[0] for scene in scenes_of(subject, 2 * count, "real")]
    values: list[dict[str, Any]] = []
    with progress_bar(len(SUBJECTS) * len(FAULTS) * len(DEGREES), "measuring", "set") as bar:
        for source, name, fault, degree, shown in cases(count, images):
            found = measure(scorers, shown, render_photos(name), galleries[name], real[name])
            own = {"source": source, "subject": name, "fault": fault, "degree": degree}
            values += [{**own, "metric": metric, "value": value} for metric, value in found.items()]
            bar.update()
    rows = taus(values)
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "values.csv", values)
    write_table(output / "table.csv", rows)
    write_own(output / "table.md", table(rows))
    plot_table(output / "metrics", rows, command)
    write_command(output, command)
    return table(rows)


def taus(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each source, metric and fault the mean of the subjects' taus, its interval, and a verdict."""
    rows = []
    for source in dict.fromkeys(one["source"] for one in values):
        for metric, higher in HIGHER_IS_BETTER.items():
            for fault in FAULTS:
                by_subject: dict[str, list[tuple[float, float]]] = {}
                for one in values:
                    if (one["source"], one["metric"], one["fault"]) == (source, metric, fault):
                        by_subject.setdefault(one["subject"], []).append((one["degree"], one["value"]))
                found = {
                    name: agreement([degree for degree, _ in pairs], [value for _, value in pairs], higher)
                    for name, pairs in by_subject.items()
                }
                if found:
                    rows.append({"source": source, "metric": metric, "fault": fault, **_shown(over_subjects(found))})
    return rows


def _shown(interval: Interval) -> dict[str, Any]:
    sees = interval.value >= SEES and interval.low > 0
    misled = interval.value <= -SEES and interval.high < 0
    verdict = "sees" if sees else "misled" if misled else "does not see"
    return {"tau": interval.value, "low": interval.low, "high": interval.high, "verdict": verdict}
