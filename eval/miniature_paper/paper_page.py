"""The miniature paper as a page of Markdown: tables, figures, and the paper's claims with their verdicts."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ether_diffusion.analysis.published import TABLE_2, TABLE_2_LPIPS, TABLE_2_REAL, TABLE_3
from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.files import write_whole

from .config import TITLES, PaperConfig
from .figure_claims import claims
from .interval_verdicts import Claim
from .paper_figures import Figures
from .paper_findings import Findings, Scores, steps_of

METRICS_2 = {"backbone": "DINO", "CLIP-I": "CLIP-I", "CLIP-T": "CLIP-T"}
METRICS_3 = {"mIoU": "mIoU", "accuracy": "accuracy", "FID": "FID"}
IN_PERCENT = ("mIoU", "accuracy")

QUICK = (
    "**A quick run: with so few steps, rates and images its numbers and verdicts mean nothing.** It shows that "
    "everything runs."
)

ABOUT = {
    "Table 2": "Subject-driven generation. Each method has its own best rate, and one training for each subject. "
    "`backbone` is in the role of DINO. The table's intervals are by a bootstrap over subjects and prompts, and too "
    "narrow for so few subjects. Criteria use t intervals (95%) of the difference between two methods, over the "
    "subjects' means: they cover how subjects and their trainings differ, for the protocol's prompts. The paper's "
    f"LPIPS ({TABLE_2_LPIPS[0]:.3f} to {TABLE_2_LPIPS[1]:.3f}; two photos of one subject {TABLE_2_REAL['LPIPS']:.3f}) "
    "is left out: it compares images with photos, as `backbone` does here. The picture shows two photos of each "
    "subject, then each method's images of two of its prompts.",
    "Table 3": "Semantic maps to images, one training for each method. Intervals (95%) are over scenes, and do not "
    "cover the effect of another seed. Criteria use intervals of the difference between two methods on the same "
    "scenes, resampled for both alike. The encoder has the same size in every row and is not counted. FID uses "
    "features of the miniature's own backbone and does not compare with the paper's. The picture shows maps, scenes, "
    "and each method's images.",
    "Fig. 3": "Random transforms of all adapted layers of the frozen base, by their distance from the identity. Single "
    "values, without intervals.",
    "Fig. 4": "Distances of trained adapters by learning rate, for the subject that rates are chosen on. Single "
    "values, without intervals.",
    "Fig. 5": "mIoU by learning rate on the scenes that rates are chosen on, with 95% intervals over scenes and one "
    "training for each rate; and the same for subjects, which the paper does not show. Much of mIoU comes from "
    "captions, without any map: criteria use the gain over the encoder alone. Bands show each training by itself; "
    "criteria resample the scenes for all trainings alike, and detect smaller differences.",
    "Fig. 6": "mIoU during training, on the scenes that rates are chosen on, with 95% intervals over scenes and one "
    "training for each rate.",
    "Fig. 7": "Change of the hyperspherical energy during training (the mean over pairs, summed over layers), of the "
    "table's first subject; each method at its best rate. Single values, without intervals.",
}
PICTURES = {
    "Table 2": ("table-2",),
    "Table 3": ("table-3",),
    "Fig. 3": ("fig-3", "fig-3-images"),
    "Fig. 4": ("fig-4",),
    "Fig. 5": ("fig-5", "fig-5-subjects"),
    "Fig. 6": ("fig-6",),
    "Fig. 7": ("fig-7",),
}


def write_page(config: PaperConfig, findings: Findings, command: str) -> Path:
    """Plot the figures and write the page. What is not done counts as not measured."""
    pictures = Figures(config, findings, command).plot_all()
    write_whole(config.page, page_text(config, findings, pictures, command))
    return config.page


def page_text(config: PaperConfig, findings: Findings, pictures: Mapping[str, Path], command: str) -> str:
    """The text of the page.

    Args:
        pictures: Files of figures by name.
    """
    found = claims(findings)
    parts = [_introduction(config, findings, found, command)]
    tables = {"Table 2": _table_2(findings), "Table 3": _table_3(findings)}
    more = {
        "Table 2": _diverged(findings.subjects),
        "Table 3": _diverged(findings.maps),
        "Fig. 5": f"{encoder_rates(config)} {_crosses(findings)}",
        "Fig. 6": _crosses(findings),
    }
    for where, about in ABOUT.items():
        parts += [f"## {where}", f"{about} {more.get(where, '')}".strip()]
        parts += filter(None, [tables.get(where)])
        parts += [
            f"![{where}]({Path(os.path.relpath(pictures[name], config.page.parent)).as_posix()})"
            for name in PICTURES[where]
            if name in pictures
        ]
        parts += [_claim(claim) for claim in found if claim.where == where]
    parts.append(_rates(findings))
    return "\n\n".join(parts) + "\n"


def encoder_rates(config: PaperConfig) -> str:
    """A sentence on the condition encoder's learning rate in the grid of maps, from the trainings' settings."""
    part, plan = config.controllable, Plan(config.rates().benchmark())
    found = [(cell.method, plan.training(Unit("controllable", cell.name)).training) for cell in part.cells()]
    alone = ", ".join(f"{one.encoder_learning_rate:g}" for method, one in found if method == part.base)
    others = [one for method, one in found if method != part.base]
    rates, bounds = {one.encoder_learning_rate for one in others}, {one.max_encoder_learning_rate for one in others}
    text = f"between {min(rates):g} and {max(rates):g}"
    if len(rates) == 1:
        text = f"{max(rates):g} at every rate of the adapter"
    elif len(bounds) == 1 and all(one.encoder_learning_rate == min(one.learning_rate, *bounds) for one in others):
        text = f"the adapter's, and at most {max(bounds):g}"
    return f"The encoder's learning rate is {text}; the encoder alone trains at {alone}."


def _introduction(config: PaperConfig, findings: Findings, found: list[Claim], command: str) -> str:
    counts = Counter(claim.verdict for claim in found)
    verdicts = {
        "holds": "hold",
        "does not hold": "do not",
        "undecided": "are undecided",
        "not measured": "not measured",
    }
    summary = ", ".join(f"{counts[verdict]} {words}" for verdict, words in verdicts.items() if counts[verdict])
    subjects, maps = config.dreambooth, config.controllable
    steps = {task: steps_of(config, task) for task in ("dreambooth", "controllable")}
    lines = [
        "# The miniature paper",
        f"`{command}`",
        *([QUICK] if config.is_quick else []),
        "The paper's experiments in small, on the built-in miniature (base `tiny`, its scorers, rendered subjects and "
        "scenes): the paper's claims, and whether they hold here, decided by code from the numbers. A tiny model is "
        "not Stable Diffusion: a claim that does not hold here may hold there, and the other way round.",
        f"Of {len(found)} claims: {summary}. *Undecided*: the interval of the difference contains both answers. "
        "Figures 3, 4 and 7 have no intervals and are decided by single values: one training each, and one subject.",
        "All methods of a table have the same layers, steps, data and seed. "
        f"Subjects: {steps['dreambooth']} steps each; each method's rate is the best of its grid on "
        f"{', '.join(subjects.subjects or ())}, and the table scores {', '.join(subjects.table_subjects)}. Scenes: "
        f"{steps['controllable']} steps on {maps.scenes.training:,} scenes; rates are chosen on {maps.scenes.choosing} "
        f"scenes, and the table scores {maps.scenes.tables} others. The paper chooses the best of its grid, and of "
        "each run's checkpoints, by the numbers that it prints; the numbers of these tables chose nothing. Rates of "
        "subjects are chosen by the harmonic mean of two shares: subject similarity (`backbone`) as a share of that "
        "between the photos, and CLIP-T as a share of the untrained base's. Rates of scenes are chosen by mIoU.",
    ]
    rows = ["| | claim | here |", "|---|---|---|"]
    rows += [f"| {claim.where} | {claim.paper} | {_verdict(claim)} |" for claim in found]
    return "\n\n".join([*lines, "\n".join(rows)])


def _claim(claim: Claim) -> str:
    found = f" *Here*: {claim.found}." if claim.found else ""
    return f"- **{claim.verdict.capitalize()}.** *Paper*: {claim.paper}{found} *Criterion*: {claim.criterion}"


def _verdict(claim: Claim) -> str:
    return claim.verdict if claim.verdict in ("undecided", "not measured") else f"**{claim.verdict}**"


def _table_2(findings: Findings) -> str:
    ceilings = next((one.ceilings for one in findings.subjects.results.values()), {})
    rows = _rows(findings, "dreambooth", findings.subjects, METRICS_2, TABLE_2)
    real = []
    for name, theirs in METRICS_2.items():
        value, paper = ceilings.get(name), TABLE_2_REAL.get(theirs)
        real += ["" if value is None else f"{value:.3f}", "" if paper is None else f"{paper:.3f}"]
    return "\n".join([*rows, f"| real photos | | | {' | '.join(real)} |"])


def _table_3(findings: Findings) -> str:
    return "\n".join(_rows(findings, "controllable", findings.maps, METRICS_3, TABLE_3))


def _rows(
    findings: Findings,
    task: str,
    scores: Scores,
    metrics: Mapping[str, str],
    paper: Mapping[str, Mapping[str, float]],
) -> list[str]:
    heads = [head for ours, theirs in metrics.items() for head in (ours, f"paper: {theirs}")]
    lines = [f"| | rate | parameters | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    best = {}
    for name in metrics:
        known = {method: one.metrics[name] for method, one in scores.results.items() if method != "base"}
        if known:
            ordered = sorted(known, key=lambda method, name=name: known[method].value)
            best[name] = ordered[-1 if next(iter(known.values())).higher_is_better else 0]
    for method, results in scores.results.items():
        chosen = findings.chosen[task].get(method)
        rate = "" if chosen is None or chosen.rate is None else f"{chosen.rate:g}"
        cells = [TITLES.get(method, method), rate, _count(scores.parameters[method], method)]
        for name, theirs in metrics.items():
            one, scale = results.metrics[name], 100 if name in IN_PERCENT else 1
            digits = 1 if name in IN_PERCENT else 3
            value = f"{scale * one.value:.{digits}f}"
            value = f"**{value}**" if best.get(name) == method else value
            cells.append(f"{value} [{scale * one.low:.{digits}f}, {scale * one.high:.{digits}f}]")
            number = paper.get(method, {}).get(theirs)
            cells.append("" if number is None else f"{number:.3f}" if number < 1 else f"{number:g}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _count(number: int, method: str) -> str:
    return "" if method == "base" else f"{number:,}"


def _diverged(scores: Scores) -> str:
    """A sentence on the trainings that a table lacks."""
    lost = [TITLES.get(u.method, u.method) + (f" on {u.subject}" if u.subject else "") for u in scores.diverged]
    return f"Without a row, because a training diverged: {', '.join(lost)}." if lost else ""


def _crosses(findings: Findings) -> str:
    lost = any(one.diverged for trainings in findings.trainings.values() for one in trainings)
    return "A cross marks a training that diverged." if lost else ""


def _rates(findings: Findings) -> str:
    lines = [
        "## The rates",
        "The rates that the grid chose. A rate at the edge of its grid is marked: a better one may be outside.",
    ]
    rows = ["| task | method | tried | chosen | by |", "|---|---|---|---|---|"]
    for task, found in findings.chosen.items():
        for name, one in found.items():
            if one.rate is None:
                continue
            points = [s for s in findings.grids[task] if s.method == name and s.point]
            tried = sorted({(float(s.point[-1][1]), s.diverged > 0) for s in points})
            edge = " (edge)" if one.at_edge and len(tried) > 1 else ""
            rates = ", ".join(f"{rate:g}{' (diverged)' * lost}" for rate, lost in tried)
            rows.append(f"| {task} | {TITLES.get(name, name)} | {rates} | {one.rate:g}{edge} | {one.score:.3f} |")
    return "\n\n".join([*lines, "\n".join(rows)])
