"""Scores of one or several runs as tables. Only what was measured alike stands in one table."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.comparison import check_comparable
from ether_diffusion.evaluation.quick_maps import TITLES as MAP_TITLES
from ether_diffusion.evaluation.quick_scores import TITLES as SUBJECT_TITLES
from ether_diffusion.evaluation.results import MetricRecord, Results

from .reported_run import QuickScores, ReportedRun
from .tables import Cell, Table, Value, mark_best

T = TypeVar("T")
Named: TypeAlias = tuple[str, T]
"""With the label of its row."""

_TITLES = {**SUBJECT_TITLES, **MAP_TITLES}
_LOWER_IS_BETTER = {"copies", "shuffled"}
_DETAILS = ("per_subject", "per_prompt", "per_class")


def score_tables(runs: Sequence[ReportedRun]) -> list[Table]:
    """A table for all results that compare, one for each way that quick scores were drawn, then details, folded."""
    results = [(run.named(found.place, ""), found.results) for run in runs for found in run.results]
    scores = [(run.named(found.place, "evaluation"), found) for run in runs for found in run.scores]
    groups = _comparable(results)
    tables = [results_table(group, reason) for group, reason in groups]
    tables += [_scores_table(group) for group in _drawn_alike(scores)]
    return tables + [table for group, _ in groups for field in _DETAILS for table in _details(group, field)]


def results_table(group: Sequence[Named[Results]], reason: str = "") -> Table:
    """Results that compare, a row each, and a row for real images.

    Args:
        reason: Why they do not compare with others.
    """
    first = group[0][1]
    better = {name: metric.higher_is_better for _, results in group for name, metric in results.metrics.items()}
    rows: list[tuple[Cell, ...]] = [
        (name, *(_measured(results.metrics.get(metric)) for metric in better), _counted(results.counts))
        for name, results in group
    ]
    for name, real in _ceilings(group):
        rows.append((name, *(Value(real.get(metric)) for metric in better), ""))
    headings = {metric: _heading(metric, higher) for metric, higher in better.items()}
    note = f"In brackets: intervals of the bootstrap. Digest of the protocol: {first.protocol_digest[:12]}."
    table = Table(
        first.protocol,
        ("", *headings.values(), "images"),
        tuple(rows),
        " ".join(filter(None, [note, *_absent(group), reason])),
        keys=("", *better, "images"),
    )
    return mark_best(table, {headings[metric]: higher for metric, higher in better.items()}, len(group))


def _comparable(found: Sequence[Named[Results]]) -> list[tuple[list[Named[Results]], str]]:
    """The largest groups in which each compares with each; with every group, why it does not compare with an earlier
    one of the same protocol, or "".

    What does not say what it was measured against may be in two groups. The groups are the same in whatever order the
    results come; they and their rows stand in that order.
    """
    groups: list[frozenset[int]] = []
    for k in range(len(found)):
        near = {j for j in range(k) if _difference(found[j], found[k]) is None}
        groups += {group & near | {k} for group in groups} | {frozenset({k})}
        groups = [group for group in dict.fromkeys(groups) if not any(group < other for other in groups)]
    groups.sort(key=sorted)
    return [
        ([found[k] for k in sorted(group)], _apart(found, groups[:place], group)) for place, group in enumerate(groups)
    ]


def _difference(one: Named[Results], other: Named[Results]) -> str | None:
    """Why two results do not compare; None if they do."""
    try:
        check_comparable(dict((one, other)))
    except UserError as error:
        return str(error)
    return None


def _apart(found: Sequence[Named[Results]], earlier: Sequence[frozenset[int]], group: frozenset[int]) -> str:
    """Why a group does not compare with the first of the earlier ones that has its protocol."""
    for other in earlier:
        for j, k in itertools.product(sorted(other), sorted(group)):
            if found[j][1].protocol == found[k][1].protocol and (reason := _difference(found[j], found[k])):
                return reason
    return ""


def _drawn_alike(found: Sequence[Named[QuickScores]]) -> list[list[Named[QuickScores]]]:
    """Quick scores in groups that compare: drawn with the same settings, beside equal scores of base and real ones."""
    groups: dict[str, list[Named[QuickScores]]] = {}
    for name, one in found:
        settings = {key: value for key, value in one.settings.items() if key not in ("adapter", "condition_encoder")}
        others = {column: told for column, told in one.scores.items() if column != "after"}
        groups.setdefault(json.dumps([settings, others], sort_keys=True), []).append((name, one))
    return list(groups.values())


def _scores_table(group: Sequence[Named[QuickScores]]) -> Table:
    first = group[0][1]
    metrics = list(dict.fromkeys(metric for told in first.scores.values() for metric in told))
    named = [(name, found.scores.get("after", {})) for name, found in group]
    named += [("base alone", told) for name, told in first.scores.items() if name == "before"]
    named += [(f"real {name}", told) for name, told in first.scores.items() if name not in ("before", "after")]
    rows = tuple((name, *(Value(told.get(metric)) for metric in metrics)) for name, told in named)
    headings = {key: _heading(_TITLES.get(key, key), key not in _LOWER_IS_BETTER) for key in metrics}
    title = "Quick scores, by the miniature's judges"
    table = Table(title, ("", *headings.values()), rows, _drawn(first.settings), keys=("", *metrics))
    return mark_best(table, {headings[key]: key not in _LOWER_IS_BETTER for key in metrics}, len(group))


def _details(group: Sequence[Named[Results]], field: str) -> Iterator[Table]:
    """A table a metric: a row a subject, prompt or class, a column a run."""
    what = field.removeprefix("per_")
    for metric in dict.fromkeys(metric for _, results in group for metric in results.metrics):
        columns = [getattr(results.metrics.get(metric), field, {}) for _, results in group]
        keys = list(dict.fromkeys(key for told in columns for key in told))
        rows = tuple((key, *(Value(told.get(key)) for told in columns)) for key in keys)
        if rows:
            title = f"{metric} by {what} · {group[0][1].protocol}"
            yield Table(title, (what, *(name for name, _ in group)), rows, folded=True)


def _measured(metric: MetricRecord | None) -> Value:
    return Value(metric.value, metric.low, metric.high) if metric else Value(None)


def _ceilings(group: Sequence[Named[Results]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Of real images among themselves: once, where all runs have the same."""
    told = {name: results.ceilings for name, results in group if results.ceilings}
    same = len({json.dumps(ceilings, sort_keys=True) for ceilings in told.values()}) == 1
    for name, ceilings in list(told.items())[: 1 if same else None]:
        yield "real images" if same else f"real images ({name})", ceilings


def _absent(group: Sequence[Named[Results]]) -> list[str]:
    """A sentence for each metric that left out classes, and run; once, where all runs say the same."""
    told = {name: results.absent() for name, results in group}
    first = next(iter(told.values()))
    if all(sentences == first for sentences in told.values()):
        return [f"{sentence}." for sentence in first]
    return [f"{name}: {sentence}." for name, sentences in told.items() for sentence in sentences]


def _heading(metric: str, higher_is_better: bool) -> str:
    return f"{metric} {'↑' if higher_is_better else '↓'}"


def _counted(counts: Mapping[str, int]) -> str:
    """`2,998, 2 missing`."""
    faults = [f"{counts[kind]:,} {kind}" for kind in ("missing", "black", "duplicate") if counts.get(kind)]
    return ", ".join([f"{counts['images']:,}"] * ("images" in counts) + faults)


def _drawn(settings: Mapping[str, Any]) -> str:
    """How images were drawn, in a sentence."""
    sampling, parts = settings.get("sampling") or {}, []
    if "prompts" in settings:
        parts.append(f"{len(settings['prompts'])} prompts, images of each: {settings.get('images_per_prompt')}")
    for name, told in (("scenes", settings), ("scheduler", sampling), ("steps", sampling), ("guidance", sampling)):
        if name in told:
            parts.append(f"{name} {told[name]}")
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    return f"{'; '.join(parts)}." if parts else ""
