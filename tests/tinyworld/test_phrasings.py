"""Captions: true, closed in their words, and a fifth of the sentences unseen in training."""

from __future__ import annotations

import pytest

from ether_diffusion.tinyworld.phrasing import VOCABULARY, caption
from ether_diffusion.tinyworld.scenes import CLASSES, COLOURS, Scene, Thing, sample_scene
from support.every_caption import captions

SCENES = [sample_scene(seed) for seed in range(300)]


def test_captions_name_every_thing_once_and_nothing_else():
    for scene in SCENES:
        for text in captions(scene):
            words = text.split()
            assert sorted(word for word in words if word in CLASSES) == sorted(thing.kind for thing in scene.things)
            for thing in scene.things:
                before = words[max(0, words.index(thing.kind) - 2) : words.index(thing.kind)]
                colours, sizes = set(before) & set(COLOURS), set(before) & {"big", "small"}
                assert colours <= {thing.colour}
                assert sizes <= {thing.size_word}


def test_left_and_right_are_as_rendered():
    things = Thing("car", "red", "right", 0.4, 0.7, 0.9), Thing("dog", "white", "left", 0.3, 0.2, 0.9)
    texts = captions(Scene("snow", things))
    assert "a white dog to the left of a red car in the snow" in texts
    assert "a red car to the right of a white dog in a snowy field" in texts
    assert "a dog on the left and a car on the right in the snow" in texts
    assert not any("dog on the right" in text or "car to the left" in text for text in texts)


def test_the_plain_prompts_are_among_those_for_training():
    texts = captions(Scene("snow", (Thing("toy", "orange", "middle", 0.6, 0.5, 0.9),)), held_out=False)
    assert {"a photo of a toy", "a photo of toy", "a toy", "a toy in the snow", "a photo of a toy in the snow"} <= set(
        texts
    )
    assert {"an orange toy in the snow", "a snowy field with a big orange toy in the middle"} <= set(texts)


def test_every_caption_occurs_once_and_can_be_chosen():
    scene = SCENES[0]
    every, training, unseen = captions(scene), captions(scene, held_out=False), captions(scene, held_out=True)
    assert len(set(every)) == len(every)
    assert set(every) == set(training) | set(unseen)
    assert {caption(scene, seed) for seed in range(3000)} == set(training)
    assert {caption(scene, seed, held_out=True) for seed in range(2000)} == set(unseen)
    assert caption(scene, 7) == caption(scene, 7)


def test_a_fifth_of_the_phrasings_is_held_out():
    for scene in SCENES:
        assert not set(captions(scene, held_out=False)) & set(captions(scene, held_out=True))
    shares = [len(captions(scene, held_out=True)) / len(captions(scene)) for scene in SCENES]
    assert sum(shares) / len(shares) == pytest.approx(0.2, abs=0.06)


def test_the_vocabulary_holds_exactly_the_words_of_training_captions():
    training = {word for scene in SCENES for text in captions(scene, held_out=False) for word in text.split()}
    unseen = {word for scene in SCENES for text in captions(scene, held_out=True) for word in text.split()}
    assert tuple(sorted(training)) == VOCABULARY
    assert unseen < training
