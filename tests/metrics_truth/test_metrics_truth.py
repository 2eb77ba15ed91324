"""The metrics against the truth: faults grow with their degree, and tau has the right sign."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats

from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos
from metrics_truth.faults import FAULTS, faulty, scenes_of, spoiled
from metrics_truth.measures import agreement, over_subjects
from metrics_truth.truth_page import table

SUBJECT = SUBJECTS["party_cat"]


def pixels(images: object) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.int64) for image in images])  # pyright: ignore


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_changes_nothing_at_degree_0_and_more_at_every_step(name: str) -> None:
    scenes = scenes_of(SUBJECT, 4, "images")
    found = [faulty(SUBJECT, scenes, FAULTS[name], degree) for degree in (0.0, 0.5, 1.0)]
    changes = [np.abs(pixels(one.images) - pixels(one.clean)).sum() for one in found]
    assert changes[0] == 0
    assert changes[0] < changes[1] < changes[2]
    assert found[0].prompts == found[2].prompts
    first, last = found[0].labels, found[2].labels
    assert first is not None
    assert last is not None
    assert (first == last).all()


def test_a_copy_is_of_a_photo_in_another_setting_than_the_prompts() -> None:
    scenes = scenes_of(SUBJECT, 8, "images")
    photos = [photo.tobytes() for photo in render_photos(SUBJECT.name)]
    found = faulty(SUBJECT, scenes, FAULTS["copy"], 1.0)
    places = [SUBJECT.photos[photos.index(image.tobytes())].setting for image in found.images]
    assert all(place != scene.setting for place, scene in zip(places, scenes, strict=True))


def test_generated_images_are_spoiled_in_a_share() -> None:
    images, others = render_photos("robot"), render_photos("monster")
    found = spoiled(images, ["a toy"] * 5, others, images, "individual", 0.4)
    assert sum(a.tobytes() != b.tobytes() for a, b in zip(found.images, images, strict=True)) == 2
    assert [i.tobytes() for i in spoiled(images, ["a toy"] * 5, others, images, "blur", 0).images] == [
        i.tobytes() for i in images
    ]


def test_agreement_is_kendalls_tau_with_how_bad_a_metric_finds_the_images() -> None:
    degrees, values = [0, 0.25, 0.5, 0.75, 1], [0.9, 0.8, 0.85, 0.6, 0.6]
    kendall: Any = scipy.stats.kendalltau(degrees, values)
    expected = float(kendall.statistic)
    assert agreement(degrees, values, higher_is_better=True) == pytest.approx(-expected)
    assert agreement(degrees, values, higher_is_better=False) == pytest.approx(expected)
    assert agreement(degrees, [0.5] * 5, higher_is_better=True) == 0
    assert over_subjects({"a": 1.0, "b": 1.0, "c": 0.8}).high == 1


def test_the_table_marks_what_a_metric_does_not_see() -> None:
    rows = [
        {"source": "rendered", "metric": "FID", "fault": "blur", "tau": 0.9, "verdict": "sees"},
        {"source": "rendered", "metric": "FID", "fault": "copy", "tau": 0.1, "verdict": "does not see"},
        {"source": "rendered", "metric": "CLIP-I", "fault": "copy", "tau": -0.8, "verdict": "misled"},
    ]
    lines = table(rows).splitlines()
    assert lines[0] == "| rendered images | copied photo | blur |"
    assert lines[2:] == ["| FID | (0.10) | **0.90** |", "| CLIP-I | **-0.80** (misled) |  |"]
