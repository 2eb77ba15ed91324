"""Scores of one or several runs as tables. A table holds only scores that compare."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.comparison import check_comparable
from ether_diffusion.evaluation.quick_scores import TITLES
from ether_diffusion.evaluation.results import Results

from .reported_run import QuickScores, ReportedRun
from .tables import Table, Value, mark_best

T = TypeVar("T")
Named: TypeAlias = tuple[str, T]
"""With the label of its row."""

_LOWER_IS_BETTER = {"copies", "shuffled"}
_DETAILS = ("per_subject", "per_prompt", "per_class")


def score_tables(runs: Sequence[ReportedRun]) -> list[Table]:
    """A table for each group of results that compare, one for each group of quick scores, then folded details."""
    results = [(run.named(found.place, ""), found.results) for run in runs for found in run.results]
    scores = [(run.named(found.place, "evaluation"), found) for run in runs for found in run.scores]
    groups = _comparable(results)
    tables = [results_table(group, reason) for group, reason in groups]
    tables += [_quick_table(group) for group in _generated_alike(scores)]
    return tables + [table for group, _ in groups for field in _DETAILS for table in _details(group, field)]


def results_table(group: Sequence[Named[Results]], reason: str = "") -> Table:
    """Results that compare, a row each, and a row for real images.

    Args:
        reason: Why they do not compare with others; goes into the note.
    """
    first = group[0][1]
    better = {name: metric.higher_is_better for _, results in group for name, metric in results.metrics.items()}
    rows = []
    for name, results in group:
        found = (results.metrics.get(metric) for metric in better)
        cells = (Value(one.value, one.low, one.high) if one else Value(None) for one in found)
        rows.append((name, *cells, _counted(results.counts)))
    rows += [(name, *(Value(real.get(metric)) for metric in better), "") for name, real in _ceilings(group)]
    note = f"In brackets: intervals of the bootstrap. Digest of the protocol: {first.protocol_digest[:12]}."
    note = " ".join(filter(None, [note, *_absent(group), reason]))
    return _marked(first.protocol, better, {}, ("images",), rows, note, len(group))


def _quick_table(group: Sequence[Named[QuickScores]]) -> Table:
    first = group[0][1]
    metrics = dict.fromkeys(metric for values in first.scores.values() for metric in values)
    named = [(name, found.scores.get("after", {})) for name, found in group]
    named += [("base alone", values) for name, values in first.scores.items() if name == "before"]
    named += [(f"real {name}", values) for name, values in first.scores.items() if name not in ("before", "after")]
    rows = [(name, *(Value(values.get(metric)) for metric in metrics)) for name, values in named]
    better = {metric: metric not in _LOWER_IS_BETTER for metric in metrics}
    title = "Quick scores, by the miniature's scorers"
    return _marked(title, better, TITLES, (), rows, _sampling_note(first.settings), len(group))


def _marked(
    title: str,
    better: Mapping[str, bool],
    titles: Mapping[str, str],
    others: tuple[str, ...],
    rows: Sequence[tuple[str | Value, ...]],
    note: str,
    among: int,
) -> Table:
    """A table of metrics with the best of each marked, and columns of text after them."""
    headings = [f"{titles.get(key, key)} {'↑' if higher else '↓'}" for key, higher in better.items()]
    table = Table(title, ("", *headings, *others), tuple(rows), note, keys=("", *better, *others))
    return mark_best(table, dict(zip(headings, better.values(), strict=True)), among)


def _comparable(found: Sequence[Named[Results]]) -> list[tuple[list[Named[Results]], str]]:
    """The largest groups of results that all compare with each other.

    With each comes why it does not compare with an earlier group of the same protocol, or "". Results that do not
    record their data may be in two groups. The groups do not depend on the order of the results; they and their rows
    keep it.
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
    """Why a group does not compare with the first earlier group of its protocol."""
    for other in earlier:
        for j, k in itertools.product(sorted(other), sorted(group)):
            if found[j][1].protocol == found[k][1].protocol and (reason := _difference(found[j], found[k])):
                return reason
    return ""


def _generated_alike(found: Sequence[Named[QuickScores]]) -> list[list[Named[QuickScores]]]:
    """Quick scores in groups that compare: the same settings, and equal scores of the base and of real images."""
    groups: dict[str, list[Named[QuickScores]]] = {}
    for name, one in found:
        settings = {key: value for key, value in one.settings.items() if key not in ("adapter", "condition_encoder")}
        others = {column: values for column, values in one.scores.items() if column != "after"}
        groups.setdefault(json.dumps([settings, others], sort_keys=True), []).append((name, one))
    return list(groups.values())


def _details(group: Sequence[Named[Results]], field: str) -> Iterator[Table]:
    """A table for each metric: a row for each subject, prompt or class, a column for each run."""
    what = field.removeprefix("per_")
    for metric in dict.fromkeys(metric for _, results in group for metric in results.metrics):
        columns = [getattr(results.metrics.get(metric), field, {}) for _, results in group]
        keys = list(dict.fromkeys(key for values in columns for key in values))
        rows = tuple((key, *(Value(values.get(key)) for values in columns)) for key in keys)
        if rows:
            title = f"{metric} by {what} · {group[0][1].protocol}"
            yield Table(title, (what, *(name for name, _ in group)), rows, folded=True)


def _ceilings(group: Sequence[Named[Results]]) -> Iterator[tuple[str, dict[str, float]]]:
    """Scores of real images among themselves: once if all runs have the same."""
    found = {name: results.ceilings for name, results in group if results.ceilings}
    same = len({json.dumps(ceilings, sort_keys=True) for ceilings in found.values()}) == 1
    for name, ceilings in list(found.items())[: 1 if same else None]:
        yield "real images" if same else f"real images ({name})", ceilings


def _absent(group: Sequence[Named[Results]]) -> list[str]:
    """The sentences of each run about what its results lack: once if they are the same for all runs."""
    found = {name: results.absent() for name, results in group}
    first = next(iter(found.values()))
    if all(sentences == first for sentences in found.values()):
        return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in first]
    return [f"{name}: {sentence}." for name, sentences in found.items() for sentence in sentences]


def _counted(counts: Mapping[str, int]) -> str:
    """`2,998, 2 missing`."""
    faults = [f"{counts[kind]:,} {kind}" for kind in ("missing", "black", "duplicate") if counts.get(kind)]
    images = [f"{counts['images']:,}"] if "images" in counts else []
    return ", ".join(images + faults)


def _sampling_note(settings: Mapping[str, Any]) -> str:
    """How the images were generated, in a sentence."""
    sampling, parts = settings.get("sampling") or {}, []
    if "prompts" in settings:
        parts.append(f"{len(settings['prompts'])} prompts, images of each: {settings.get('images_per_prompt')}")
    if "scenes" in settings:
        parts.append(f"scenes {settings['scenes']}")
    parts += [f"{name} {sampling[name]}" for name in ("scheduler", "steps", "guidance") if name in sampling]
    if "seed" in settings:
        parts.append(f"seed {settings['seed']}")
    return f"{'; '.join(parts)}." if parts else ""
