"""Order, batch size and number of processes change nothing, for every metric whose images have keys."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import (
    ClipImageScore,
    ClipTextScore,
    DinoScore,
    InceptionDistance,
    load_tiny_backbone,
    load_tiny_clip,
)
from ether_diffusion.metrics.accumulators import Table
from ether_diffusion.metrics.pairwise import Pairs, summary
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos


@dataclass(frozen=True)
class Item:
    """One image with its key, subject and text."""

    image: Image.Image
    key: str
    subject: str
    real: bool
    text: str


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Photos of two subjects, in unequal numbers; photos of two others stand for generated images."""
    names = list(SUBJECTS)[:4]
    found = []
    for subject, real, name in zip(("a", "b", "a", "b"), (True, True, False, False), names, strict=True):
        photos = render_photos(name)[: 3 if subject == "a" else 5]
        found += [
            Item(photo, f"{k}.png", subject, real, f"a {SUBJECTS[name].class_name} {k % 2}")
            for k, photo in enumerate(photos)
        ]
    return found


def add_similarity(metric: Any, part: list[Item]) -> None:
    for subject, real in {(one.subject, one.real) for one in part}:
        chosen = [one for one in part if (one.subject, one.real) == (subject, real)]
        metric.update([one.image for one in chosen], [one.key for one in chosen], subject=subject, real=real)


def add_text(metric: ClipTextScore, part: list[Item]) -> None:
    for subject in {one.subject for one in part}:
        chosen = [one for one in part if one.subject == subject and not one.real]
        texts = [one.text for one in chosen]
        metric.update([one.image for one in chosen], texts, [one.key for one in chosen], subject=subject)


def add_distance(metric: InceptionDistance, part: list[Item]) -> None:
    for real in (True, False):
        chosen = [one for one in part if one.real == real]
        metric.update([one.image for one in chosen], [f"{one.subject}/{one.key}" for one in chosen], real=real)


METRICS: dict[str, tuple[Callable[[int], Any], Callable[[Any, list[Item]], None]]] = {
    "DINO": (lambda size: DinoScore(load_tiny_backbone(), size), add_similarity),
    "CLIP-I": (lambda size: ClipImageScore(load_tiny_clip(), size), add_similarity),
    "CLIP-T": (lambda size: ClipTextScore(load_tiny_clip(), size), add_text),
    "FID": (lambda size: InceptionDistance(load_tiny_backbone(), size), add_distance),
}


def flat(found: dict[str, Any]) -> dict[str, float]:
    return {
        f"{key}/{inner}": value
        for key, one in found.items()
        for inner, value in (one if isinstance(one, dict) else {"": one}).items()
    }


@pytest.mark.parametrize("name", METRICS)
def test_order_batch_size_and_processes_change_nothing(name: str, items: list[Item]) -> None:
    make, add = METRICS[name]
    whole = make(32)
    add(whole, items)
    expected = flat(whole.compute())
    for processes, batch_size in ((2, 1), (3, 3)):
        parts = [make(batch_size) for _ in range(processes)]
        for rank, part in enumerate(parts):
            add(part, items[::-1][rank::processes])
        states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
        results = []
        for order in (states, states[::-1]):
            total = make(1)
            for state in order:
                total.merge(state)
            results.append(total.compute())
        assert results[0] == results[1]  # to the bit
        assert flat(results[0]) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(UserError, match=f"^{name}.* is counted twice"):
            total.merge(states[0])


def test_states_can_be_written_to_files(items: list[Item]) -> None:
    for make, add in METRICS.values():
        metric = make(32)
        add(metric, items[:4] + items[-4:])

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(inner) for key, inner in value.items()}
            return value.tolist() if isinstance(value, Tensor) else value

        assert json.loads(json.dumps(plain(metric.state()))) == plain(metric.state())


def test_a_subject_with_images_of_one_kind_is_named(items: list[Item]) -> None:
    metric = DinoScore(load_tiny_backbone())
    with pytest.raises(UserError, match="DINO: no pairs to compare"):
        metric.compute()
    add_similarity(metric, [one for one in items if one.real or one.subject == "a"])
    with pytest.raises(UserError, match="DINO: no generated images of b"):
        metric.compute()
    assert summary(metric.real_pairs(), "DINO")["pairs"] == {"a": 3, "b": 10}


def test_real_pairs_are_the_pairs_of_different_photos(items: list[Item]) -> None:
    backbone = load_tiny_backbone()
    metric = DinoScore(backbone)
    photos = [one for one in items if one.real and one.subject == "b"]
    add_similarity(metric, photos)
    features = backbone.image_features([one.image for one in photos])
    pairs = [float(features[i] @ features[j]) for i, j in combinations(range(5), 2)]
    assert metric.real_pairs()["b"].mean() == pytest.approx(sum(pairs) / 10, abs=1e-6)


def test_means_weight_pairs_or_groups_equally() -> None:
    def group(values: list[list[float]]) -> Pairs:
        tensor = torch.tensor(values, dtype=torch.float64)
        rows, columns = ([str(k) for k in range(n)] for n in tensor.shape)
        return Pairs(tuple(rows), tuple(columns), tensor, torch.ones_like(tensor, dtype=torch.bool))

    groups = {"many": group([[1, 1], [1, 0], [0, 0]]), "one": group([[0.2]])}
    found = summary(groups, "x")
    assert found["flat"] == pytest.approx(3.2 / 7)
    assert found["macro"] == pytest.approx((0.5 + 0.2) / 2)


def test_tables_accept_each_key_once_and_only_finite_values() -> None:
    table, pairs = Table("x"), Table("x")
    table.add(("dog", "b"), torch.tensor([1.0]))
    table.add(("dog", "a"), torch.tensor([2.0]))
    assert table.of("dog")[0] == ("a", "b")
    assert table.of("dog")[1].tolist() == [[2], [1]]
    pairs.add(("dog", "r", "c"), torch.tensor(0.5))
    for one, name, value, message in (
        (table, ("dog", "b"), torch.ones(1), "x: b of dog is counted twice"),
        (table, ("dog", "c"), torch.tensor([torch.nan]), "x: the value of c of dog is not finite"),
        (pairs, ("dog", "r", "c"), torch.tensor(1.0), "x: r with c of dog is counted twice"),
        (pairs, ("dog", "r", "d"), torch.tensor(torch.nan), "x: the value of r with d of dog is not finite"),
    ):
        with pytest.raises(UserError, match=message):
            one.add(name, value)
    with pytest.raises(UserError, match="DINO: 2 keys for 1 images of dog"):
        DinoScore(load_tiny_backbone()).update_features(torch.ones(1, 4), ["c", "d"], subject="dog", real=True)
