"""Quick scores of subjects, on rendered pictures whose content is known."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

from ether_diffusion.evaluation.quick_scores import (
    TITLES,
    MapScores,
    SubjectScores,
    score_images,
    score_photos,
    setting_of,
    table,
    without_identifier,
)
from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, render_photos
from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scenes import SETTINGS, Scene, sample_scene
from ether_diffusion.tinyworld.scoring import Scorers, load_scorers

PROMPTS = ["a toy in the snow", "a toy on the beach", "a toy at night", "a toy in the water", "a toy in the desert"]
PLACES = ["snow", "beach", "night", "water", "desert"]


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return load_scorers()


def rendered_elsewhere(name: str) -> list:
    subject = SUBJECTS[name]
    return [render(subject.scene(place, 0.45, 0.88, 0.58, flip=True))[0] for place in PLACES]


@pytest.mark.parametrize("name", ["robot", "party_cat", "racing_car"])
def test_the_subject_itself_scores_above_others_of_its_class(scorers: Scorers, name: str) -> None:
    photos = render_photos(name)
    kind = SUBJECTS[name].class_name
    seeds = [seed for seed in range(400) if [t.kind for t in sample_scene(seed).things] == [kind]][:5]
    others = [render(Scene(place, sample_scene(seed).things))[0] for seed, place in zip(seeds, PLACES, strict=True)]
    true, false = (score_images(scorers, photos, images, PROMPTS) for images in (rendered_elsewhere(name), others))
    assert true.identity > false.identity + 0.2
    assert true.clip_i > false.clip_i
    assert true.settings >= 0.8
    assert true.copies == 0


def test_a_prompt_scores_more_for_its_own_picture_than_for_another(scorers: Scorers) -> None:
    images = rendered_elsewhere("robot")
    right = score_images(scorers, images, images, PROMPTS)
    wrong = score_images(scorers, images, images, PROMPTS[1:] + PROMPTS[:1])
    assert right.clip_t > wrong.clip_t
    assert (right.settings, wrong.settings) == (1.0, 0.0)


def test_a_photo_given_for_another_place_is_a_copy(scorers: Scorers) -> None:
    photos = render_photos("robot")
    places = [scene.setting for scene in SUBJECTS["robot"].photos]
    prompt = next(p for p, place in zip(PROMPTS, PLACES, strict=True) if place != places[0])
    assert score_images(scorers, photos, photos[:1], [prompt]).copies == 1.0
    assert math.isnan(score_images(scorers, photos, photos[:1], ["a photo of a toy"]).copies)


def test_the_ceiling_is_the_mean_over_pairs_of_different_photos(scorers: Scorers) -> None:
    photos = render_photos("robot")
    features = scorers.identity(photos)
    pairs = [float(features[i] @ features[j]) for i in range(5) for j in range(i)]
    assert score_photos(scorers, photos).identity == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_settings_are_read_from_prompts() -> None:
    assert [setting_of(prompt) for prompt in PROMPTS] == PLACES
    assert setting_of("a photo of a toy") is None
    assert setting_of("a toy in the snow at night") is None
    for subject in SUBJECTS.values():
        named = {setting_of(prompt) for prompt in subject.prompts} - {None}
        assert named == set(SETTINGS)


def test_the_identifier_is_taken_out_as_a_word() -> None:
    assert without_identifier("a qwe toy beside a qwerty", "qwe") == "a toy beside a qwerty"


def test_every_score_has_a_title() -> None:
    assert list(TITLES) == [field.name for kind in (SubjectScores, MapScores) for field in fields(kind)]


def test_the_table_shows_nan_as_a_dash(scorers: Scorers) -> None:
    text = table({"photos": score_photos(scorers, render_photos("robot"))})
    assert text.splitlines()[0].split() == ["photos"]
    assert text.splitlines()[3].endswith("-")
