"""Scenes: held-out combinations never occur, all others do, and no thing hides another."""

from __future__ import annotations

import pytest

from ether_diffusion.errors import UserError
from ether_diffusion.tinyworld.render import LABELS, render
from ether_diffusion.tinyworld.scenes import CLASSES, COLOURS, KINDS, SETTINGS, Scene, is_held_out, sample_scene

COMBINATIONS = [(kind, colour, place) for kind in CLASSES for colour in KINDS[kind].colours for place in SETTINGS]
TRAINING = [sample_scene(seed) for seed in range(12_000)]
HELD_OUT = [sample_scene(seed, "held_out") for seed in range(2_000)]


def combinations(scene: Scene) -> list[tuple[str, str, str]]:
    return [(thing.kind, thing.colour, scene.setting) for thing in scene.things]


def test_a_scene_is_a_function_of_its_seed_and_split():
    assert TRAINING[:50] == [sample_scene(seed) for seed in range(50)]
    assert len(set(TRAINING[:500] + HELD_OUT[:500])) == 1000
    with pytest.raises(UserError, match="split 'test'; expected 'train' or 'held_out'"):
        sample_scene(0, "test")  # pyright: ignore[reportArgumentType]


def test_training_has_exactly_the_combinations_that_are_not_held_out():
    seen = {combination for scene in TRAINING for combination in combinations(scene)}
    assert seen == {combination for combination in COMBINATIONS if not is_held_out(*combination)}


def test_scenes_held_out_have_every_combination_held_out():
    assert all(is_held_out(*combinations(scene)[0]) for scene in HELD_OUT)
    seen = {combinations(scene)[0] for scene in HELD_OUT}
    assert seen == {combination for combination in COMBINATIONS if is_held_out(*combination)}


def test_a_fifth_is_held_out_of_every_class_colour_and_setting():
    held = [combination for combination in COMBINATIONS if is_held_out(*combination)]
    assert len(held) / len(COMBINATIONS) == pytest.approx(0.2, abs=0.01)
    for position, names in enumerate((CLASSES, tuple(COLOURS), SETTINGS)):
        for name in names:
            of_name = [combination for combination in COMBINATIONS if combination[position] == name]
            share = sum(is_held_out(*combination) for combination in of_name) / len(of_name)
            assert 0.1 < share < 0.3, name


def test_sizes_and_places():
    for scene in TRAINING[:2000] + HELD_OUT:
        main, *others = (thing.size for thing in scene.things)
        assert 0.4 <= main <= 0.65
        assert all(0.22 <= size <= 0.4 for size in others)
        assert len({thing.kind for thing in scene.things}) == len(scene.things)
        across = [thing.place for thing in sorted(scene.things, key=lambda thing: thing.x)]
        if len(across) > 1:
            assert across == (["left", "right"] if len(across) == 2 else ["left", "middle", "right"])
        else:
            assert across == ["left" if main_x(scene) < 0.42 else "right" if main_x(scene) > 0.58 else "middle"]


def main_x(scene: Scene) -> float:
    return scene.things[0].x


def test_nearly_all_of_every_thing_is_visible():
    for scene in TRAINING[:150] + HELD_OUT[:50]:
        labels = render(scene)[1]
        for thing in scene.things:
            alone = render(Scene(scene.setting, (thing,), scene.seed))[1]
            label = LABELS.index(thing.kind)
            assert (labels == label).sum() >= 0.9 * (alone == label).sum() > 36
