"""Scores of one subject as a file, so that subjects can be scored by different workers and averaged by any of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.protocols import SubjectProtocol
from ether_diffusion.evaluation.results import Results, ScorerRecord, versions
from ether_diffusion.evaluation.scorers import Loaded
from ether_diffusion.evaluation.subject_images import SubjectImages
from ether_diffusion.evaluation.subject_runs import recorded_settings
from ether_diffusion.evaluation.subject_scores import SubjectPairs, subject_results
from ether_diffusion.files import write_whole
from ether_diffusion.metrics.pairwise import Pairs


@dataclass(frozen=True)
class ScoredSubject:
    """What the judges said of a subject, who they were, and what its images say of themselves."""

    scores: SubjectPairs
    judges: Mapping[str, ScorerRecord]
    versions: Mapping[str, str]
    identifier: str
    facts: Mapping[str, Any]


def save_scores(path: Path, scores: SubjectPairs, found: SubjectImages, judges: Mapping[str, Loaded]) -> None:
    """Write a subject's scores, whole or not at all. JSON keeps fp64 to the last bit."""
    content = {
        "subject": scores.subject,
        "identifier": found.identifier,
        "facts": dict(found.facts),
        "judges": {name: {"source": judge.source, "sha256": judge.sha256} for name, judge in judges.items()},
        "versions": versions(),
        "prompt_of": dict(scores.prompt_of),
        "digests": scores.digests,
        "black": scores.black,
        "photos": scores.photos,
        "pairs": {name: _plain(pairs) for name, pairs in scores.pairs.items()},
        "ceilings": {name: _plain(pairs) for name, pairs in scores.ceilings.items()},
    }
    write_whole(path, json.dumps(content, ensure_ascii=False) + "\n")


def read_scores(path: Path) -> ScoredSubject:
    """What `save_scores` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return ScoredSubject(
        SubjectPairs(
            content["subject"],
            {name: _pairs(plain) for name, plain in content["pairs"].items()},
            {name: _pairs(plain) for name, plain in content["ceilings"].items()},
            content["prompt_of"],
            tuple(content["digests"]),
            content["black"],
            content["photos"],
        ),
        {name: ScorerRecord(**record) for name, record in content["judges"].items()},
        content["versions"],
        content["identifier"],
        content["facts"],
    )


def average_scores(protocol: SubjectProtocol, scored: Sequence[ScoredSubject]) -> Results:
    """The results of a method, from its subjects.

    Raises:
        UserError: judges with different weights scored them, or they were drawn from different bases or by different
            methods.
    """
    first = scored[0]
    for other in scored[1:]:
        for name, record in first.judges.items():
            if other.judges[name].sha256 != record.sha256:
                pair = f"{first.scores.subject} and {other.scores.subject}"
                raise UserError(f"judge {name} had different weights for {pair}; delete the scores of one.")
    judges = {name: Loaded(None, record.source, record.sha256) for name, record in first.judges.items()}
    told = recorded_settings([SubjectImages(one.scores.subject, (), {}, one.identifier, one.facts) for one in scored])
    names = [one.scores.subject for one in scored]  # those that the benchmark is of
    results = subject_results(protocol, [one.scores for one in scored], judges, told, names)
    return results.model_copy(update={"versions": _all_versions(scored)})


def _all_versions(scored: Sequence[ScoredSubject]) -> dict[str, str]:
    """Of each package, all that had a part in it."""
    packages = dict.fromkeys(package for one in scored for package in one.versions)
    return {
        package: ", ".join(sorted({one.versions[package] for one in scored if package in one.versions}))
        for package in packages
    }


def _plain(pairs: Pairs) -> dict[str, Any]:
    values, counted = pairs.values.tolist(), pairs.counted.tolist()
    return {"rows": pairs.rows, "columns": pairs.columns, "values": values, "counted": counted}


def _pairs(plain: dict[str, Any]) -> Pairs:
    rows, columns = tuple(plain["rows"]), tuple(plain["columns"])
    shape = (len(rows), len(columns))
    values = torch.tensor(plain["values"], dtype=torch.float64).reshape(shape)
    return Pairs(rows, columns, values, torch.tensor(plain["counted"], dtype=torch.bool).reshape(shape))
