"""The paper's own numbers as if the miniature had measured them, for the tests of the miniature paper."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch

from ether_diffusion.analysis.published import (
    DISTANCE_RATES,
    DISTANCES,
    ENERGY_CHANGES,
    MIOU_BY_RATE,
    MIOU_RATES,
    TABLE_2,
    TABLE_2_REAL,
    TABLE_3,
    TABLE_3_REAL,
)
from ether_diffusion.evaluation.intervals import Estimate, Interval
from ether_diffusion.evaluation.results import COUNTS, MetricRecord, Results
from miniature_paper.config import STYLES
from miniature_paper.gains import MapTraining
from miniature_paper.paper_findings import Findings, Scores

OURS = {"DINO": "backbone"}
SUBJECTS = {
    **TABLE_2,
    "ether_plus_one_sided": {**TABLE_2["ether_plus_one_sided"], "CLIP-T": 0.245},  # not in the paper
    "base": {"DINO": 0.4, "CLIP-I": 0.6, "CLIP-T": 0.26},
}
ALONE = TABLE_3["none"]["mIoU"]
PERTURBED = {"base": {0.0: 0.6}, "oft": {0.5: 0.6, 14.0: 0.1}, "ether": {2.0: 0.58}, "ether_plus": {1.4: 0.57}}


def table(paper: Mapping[str, Mapping[str, float]], ceilings: Mapping[str, float], noise: float = 0.0) -> Scores:
    """The paper's table as if the miniature had measured it, every difference within `noise`."""
    results, differences = {}, {}
    for method, found in paper.items():
        metrics = {
            OURS.get(name, name): MetricRecord(value=value, low=value, high=value, higher_is_better=name != "FID")
            for name, value in found.items()
        }
        results[method] = Results(
            protocol="p", protocol_digest="", run={}, judges={}, versions={}, counts=dict.fromkeys(COUNTS, 0),
            metrics=metrics,
            ceilings=dict(ceilings),
        )  # fmt: skip
    for one, other in itertools.permutations(results, 2):
        for name in results[one].metrics.keys() & results[other].metrics.keys():
            value = results[one].metrics[name].value - results[other].metrics[name].value
            differences[name, one, other] = Interval(value, value - noise, value + noise)
    return Scores(results, dict.fromkeys(paper, 1), differences)


def estimate(value: float, noise: float = 0.0) -> Estimate:
    """An estimate with an interval of `noise` in both directions, whatever it is compared with."""
    draws = torch.linspace(-1, 1, 101, dtype=torch.float64)
    return Estimate(value, value + draws * noise * value / 0.95)


def trainings(noise: float = 0.0) -> dict[str, list[MapTraining]]:
    """Fig. 5; and after a tenth of the steps Fig. 6's ETHER+, which is nearly at its best from 1e-4 on."""
    soon = {"ether_plus": lambda rate, value: value if rate < 1e-4 else 0.95 * value + 0.05 * ALONE}
    found = {"none": [MapTraining(None, False, {None: Estimate(ALONE, torch.full((101,), ALONE).double())})]}
    for method, curve in MIOU_BY_RATE.items():
        early = soon.get(method, lambda rate, value: (value + ALONE) / 2)
        found[method] = [
            MapTraining(rate, False, {20: estimate(early(rate, value), noise), None: estimate(value, noise)})
            for rate, value in zip(MIOU_RATES, curve, strict=True)
        ]
    return found


def the_papers(noise: float = 0.0) -> Findings:
    keys = {title: name for name, title in STYLES.items()}
    return Findings(
        subjects=table(SUBJECTS, {"backbone": TABLE_2_REAL["DINO"]}, noise),
        maps=table(TABLE_3, TABLE_3_REAL, noise),
        grids={"dreambooth": [], "controllable": []},
        chosen={"dreambooth": {}, "controllable": {}},
        distances={
            keys[title]: {rate: {"transform": value} for rate, value in zip(DISTANCE_RATES, found, strict=True)}
            for title, found in DISTANCES.items()
        },
        energies={keys[title]: {0: 0.0, 1400: change} for title, change in ENERGY_CHANGES.items()},
        perturbed=PERTURBED,
        trainings=trainings(noise),
        map_steps=200,
    )
