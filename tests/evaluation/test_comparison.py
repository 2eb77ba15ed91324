"""`compare` refuses results measured differently; the choice of checkpoints keeps those that no other beats."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.comparison import choose, comparison, pareto
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol, load_protocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.generation import checkpoints_of


def results(value: float = 0.5, other: float = 0.3, **changes: Any) -> Results:
    def metric(mean: float, higher: bool) -> dict[str, Any]:
        per_subject = dict.fromkeys(changes.get("subjects", ("cat", "dog")), mean)
        span = {"low": mean - 0.1, "high": mean + 0.1}
        return {"value": mean, **span, "higher_is_better": higher, "per_subject": per_subject}

    whole = {
        "protocol": "dreambooth/oft-v1",
        "protocol_digest": "a" * 64,
        "run": {},
        "data": {"photos of cat": "c" * 64, "photos of dog": "d" * 64},
        "judges": {"dino": {"source": "a file", "sha256": "b" * 64}},
        "versions": {},
        "counts": {
            "subjects": 2,
            "prompts": 50,
            "images": 200,
            "expected": 200,
            "black": 0,
            "missing": 0,
            "duplicate": 0,
        },
        "metrics": {
            "DINO": metric(value, True),
            "CLIP-T": metric(other, True),
            "mIoU": metric(value, True),
            "FID": metric(other, False),
        },
    }
    return Results.model_validate({**whole, **{key: one for key, one in changes.items() if key != "subjects"}})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": "dreambooth/subject-macro-v1"}, "protocols dreambooth/oft-v1 and dreambooth/subject-macro-v1"),
        (
            {"protocol_digest": "c" * 64},
            "their protocols of the name dreambooth/oft-v1 differ (digests aaaaaaaaaaaa and cccccccccccc)",
        ),
        ({"judges": {"dino": {"source": "a file", "sha256": "c" * 64}}}, "scorer dino has different weights"),
        ({"judges": {"other": {"source": "a file", "sha256": "b" * 64}}}, "scorers dino and other"),
        ({"data": {"photos of cat": "e" * 64}}, "photos of cat differ (digests cccccccccccc and eeeeeeeeeeee)"),
        ({"subjects": ("cat", "dog", "dog2")}, "DINO of different subjects: only one has dog2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_results_that_were_measured_differently_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        comparison({"one": results(), "another": results(**changes)})
    assert str(refused.value).startswith("one and another cannot be compared: ")
    assert reason in str(refused.value)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_a_third_result_does_not_hide_a_difference_between_two(order: tuple[int, ...]) -> None:
    """One result that records no photos, between two that record different ones; the same with metrics."""
    photos: dict[str, dict[str, Any]] = {
        "silent": {"data": {}},
        "one": {},
        "another": {"data": {"photos of cat": "e" * 64}},
    }
    metrics = {names: results(subjects=names).model_dump()["metrics"] for names in (("cat", "dog"), ("cat",))}
    subjects: dict[str, dict[str, Any]] = {
        "silent": {"metrics": {"FID": metrics["cat", "dog"]["FID"]}},
        "one": {"metrics": {"DINO": metrics["cat", "dog"]["DINO"]}},
        "another": {"metrics": {"DINO": metrics["cat",]["DINO"]}},
    }
    for changes, reason in ((photos, "photos of cat differ"), (subjects, "different subjects: only one has dog")):
        names = [list(changes)[k] for k in order]
        with pytest.raises(UserError, match=reason) as refused:
            comparison({name: results(**changes[name]) for name in names})
        assert "silent" not in str(refused.value)


def test_comparable_results_stand_side_by_side_with_their_missing_images() -> None:
    same_scorer_elsewhere = {"dino": {"source": "another file", "sha256": "b" * 64}}
    short = {**results().counts, "images": 199, "missing": 1}
    both = {"ether": results(0.5), "lora": results(0.625, judges=same_scorer_elsewhere, counts=short)}
    head, ether, lora, note = comparison(both, allow_incomplete=True).splitlines()
    assert head.split() == ["dreambooth/oft-v1", "DINO", "CLIP-T", "mIoU", "FID", "images"]
    assert ether.startswith("ether              0.500 [0.400, 0.600]")
    assert "0.625 [0.525, 0.725]" in lora
    assert note == "lora: 2 subjects, 199 of 200 images; 1 missing, 0 black, 0 duplicate"


def test_the_pareto_set_is_what_no_other_beats() -> None:
    assert pareto({"a": (1, 5), "b": (2, 4), "c": (2, 3), "d": (0, 0), "e": (3, 1)}) == ["a", "b", "e"]
    assert pareto({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]


def test_checkpoints_are_chosen_by_the_protocols_two_metrics(tmp_path: Path) -> None:
    by_step = {"step-000200": results(0.4, 0.35), "step-000400": results(0.5, 0.3), "step-000600": results(0.45, 0.25)}
    chosen = choose(load_protocol(SubjectProtocol, "dreambooth/oft-v1"), by_step)
    assert chosen.pareto == ("step-000200", "step-000400")  # DINO and CLIP-T: higher is better
    *lines, best = chosen.table().splitlines()
    assert [line.endswith("*") for line in lines] == [False, True, True, False]
    assert best.startswith("Best: step-000400, by the largest harmonic mean of DINO and CLIP-T")
    saved = json.loads(chosen.save(tmp_path).read_text())
    assert saved["pareto"] == ["step-000200", "step-000400"]
    assert saved["metrics"] == ["DINO", "CLIP-T"]
    assert saved["best"] == "step-000400"
    chosen = choose(load_protocol(MapProtocol, "s2i/csail-v1"), by_step)
    assert chosen.pareto == ("step-000400", "step-000600")  # mIoU and FID: lower FID is better


def test_checkpoints_come_in_the_order_of_their_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no weights in checkpoints/step-…; expected a run folder"):
        checkpoints_of(tmp_path)
    for step, part in ((1_000_000, "adapter"), (999_999, "adapter"), (200, "condition_encoder"), (600, "")):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}" / part
        folder.mkdir(parents=True)
        (folder / "weights.safetensors").write_bytes(b"")
    # By number, where text order differs; step 600 holds an optimiser's state only.
    assert list(checkpoints_of(tmp_path)) == ["step-000200", "step-999999", "step-1000000"]
