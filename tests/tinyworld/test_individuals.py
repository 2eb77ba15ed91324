"""Subjects: each the same individual in five different photos, and unlike every sampled thing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ether_diffusion.tinyworld.builtin_subjects import SUBJECTS, Subject, render_photos
from ether_diffusion.tinyworld.phrasing import VOCABULARY
from ether_diffusion.tinyworld.render import LABELS, render
from ether_diffusion.tinyworld.scenes import CLASSES, COLOURS, KINDS, SETTINGS, Scene, sample_scene

every_subject = pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))


def colours(scene: Scene) -> np.ndarray:
    """Histogram of the colours of a scene's one thing in 4 x 4 x 4 bins; sums to 1."""
    image, labels = render(scene)
    pixels = np.asarray(image)[labels == LABELS.index(scene.things[0].kind)]
    return np.histogramdd(pixels, bins=4, range=[(0, 256)] * 3)[0].ravel() / len(pixels)


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """Histogram intersection (Swain and Ballard 1991): 1 for the same colours in the same shares."""
    return float(np.minimum(one, other).sum())


@every_subject
def test_photos_show_one_individual_and_its_class_has_no_other_like_it(subject: Subject):
    photos = [colours(scene) for scene in subject.photos]
    assert min(similarity(a, b) for i, a in enumerate(photos) for b in photos[:i]) > 0.8
    thing = subject.photos[0].things[0]
    others = [
        replace(thing, individual=None, colour=colour, look=look)
        for colour in KINDS[subject.class_name].colours
        for look in range(4)
    ]
    assert max(similarity(photos[0], colours(Scene("meadow", (other,)))) for other in others) < 0.55


@every_subject
def test_photos_differ_in_setting_place_size_and_pose(subject: Subject):
    assert len({scene.setting for scene in subject.photos}) == len(subject.photos) == 5
    things = [scene.things[0] for scene in subject.photos]
    assert len({(thing.x, thing.y) for thing in things}) == len({thing.size for thing in things}) == 5
    images = [np.asarray(image).astype(int) for image in render_photos(subject.name)]
    assert min(np.abs(a - b).mean() for i, a in enumerate(images) for b in images[:i]) > 20
    still = replace(things[0], x=0.5, tilt=0, flip=False)
    poses = [render(Scene("room", (replace(still, pose=pose),)))[0].tobytes() for pose in (0.0, 1.0)]
    assert poses[0] != poses[1]


def test_subjects_differ_from_each_other():
    looks = [colours(subject.photos[0]) for subject in SUBJECTS.values()]
    assert len(looks) >= 6
    assert max(similarity(a, b) for i, a in enumerate(looks) for b in looks[:i]) < 0.6


def test_no_sampled_scene_has_an_individual():
    scenes = [sample_scene(seed, split) for seed in range(500) for split in ("train", "held_out")]
    assert {thing.individual for scene in scenes for thing in scene.things} == {None}


@every_subject
def test_ten_prompts_in_the_worlds_words_about_things_that_exist(subject: Subject):
    assert subject.class_name in CLASSES
    assert subject.class_name not in {kind for phrase in subject.companions for kind in phrase.split()}
    for phrase in subject.companions:
        _, colour, kind = phrase.split()
        assert colour in COLOURS
        assert colour in KINDS[kind].colours
    assert len(set(subject.prompts)) == 10
    for prompt in subject.prompts:
        assert prompt.count(f"qwe {subject.class_name}") == 1
        assert set(prompt.split()) - {"qwe"} <= set(VOCABULARY)
    assert {scene.setting for scene in subject.photos} < set(SETTINGS)
