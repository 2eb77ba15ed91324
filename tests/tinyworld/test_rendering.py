"""Rendering: the same bits everywhere, shapes as an independent rasteriser fills them, labels exact to the pixel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from skimage.measure import points_in_poly

from ether_diffusion.files import Digest
from ether_diffusion.tinyworld.brush import SAMPLES, SIDE, Canvas, Region, oval, polygon
from ether_diffusion.tinyworld.render import LABELS, PALETTE, render
from ether_diffusion.tinyworld.scenes import CLASSES, KINDS, SETTINGS, SIZE, Scene, Thing, sample_scene


def test_golden_images():
    """Pinned: the shipped weights were trained on exactly these images."""
    digest = Digest(16)
    for seed in range(60):
        for split in ("train", "held_out"):
            image, labels = render(sample_scene(seed, split))
            digest.update(image.tobytes() + labels.tobytes())
    assert digest.hex() == GOLDEN


GOLDEN = "587608a29ed2a412953cfbee410bac70"


def test_polygons_are_filled_as_scikit_image_does(rng: np.random.Generator):
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    centres = np.stack([columns.ravel(), rows.ravel()], 1)
    for corners in (3, 4, 5, 9):
        points = rng.uniform(-60, SIDE + 60, (corners, 2))  # crossing themselves, and partly off the canvas
        expected = points_in_poly(centres, points).reshape(SIDE, SIDE)
        assert np.array_equal(on_canvas(polygon([(x, y) for x, y in points])), expected)


def test_neighbouring_shapes_share_no_sample_and_leave_no_gap():
    """Two halves of a square, cut along a line through many samples' centres."""
    upper = on_canvas(polygon([(10.5, 10.5), (90.5, 10.5), (90.5, 90.5)])).astype(int)
    lower = on_canvas(polygon([(10.5, 10.5), (90.5, 90.5), (10.5, 90.5)])).astype(int)
    square = on_canvas(polygon([(10.5, 10.5), (90.5, 10.5), (90.5, 90.5), (10.5, 90.5)])).astype(int)
    assert np.array_equal(upper + lower, square)
    assert square.sum() == 80 * 80


def test_regions_intersect_and_grow(rng: np.random.Generator):
    for _ in range(5):
        one, other = (polygon([(x, y) for x, y in rng.uniform(-20, SIDE + 20, (4, 2))]) for _ in range(2))
        assert np.array_equal(on_canvas(one.within(other)), on_canvas(one) & on_canvas(other))
    apart = polygon(oval(40, 40, 20, 20)).within(polygon(oval(200, 200, 20, 20)))
    assert not on_canvas(apart).any()
    for x, y in ((100, 100), (3, 250)):  # inside, and across two edges of the canvas
        disc, grown = on_canvas(polygon(oval(x, y, 30, 30))), on_canvas(polygon(oval(x, y, 30, 30)).grown(3))
        assert (grown >= disc).all()
        assert (grown >= on_canvas(polygon(oval(x, y, 32, 32)))).all()
        assert (grown <= on_canvas(polygon(oval(x, y, 34, 34)))).all()


def test_a_pixel_has_the_mean_colour_and_the_most_frequent_label_of_its_samples(rng: np.random.Generator):
    canvas = Canvas()
    canvas.samples[...] = rng.integers(0, 256, canvas.samples.shape)
    canvas.samples[..., 3] %= 4
    cells = canvas.samples.reshape(SIZE, SAMPLES, SIZE, SAMPLES, 4).swapaxes(1, 2).reshape(SIZE, SIZE, -1, 4)
    assert np.abs(canvas.pixels() - cells[..., :3].mean(2)).max() <= 0.5
    labels = canvas.label_map(4)
    for y, x in rng.integers(0, SIZE, (300, 2)):
        votes = Counter(cells[y, x, :, 3].tolist())
        assert labels[y, x] == min(votes, key=lambda label: (-votes[label], label))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", CLASSES)
def test_a_things_label_covers_what_it_changes(kind: str, setting: str):
    """Against the same scene without it: the image changes wherever the label is, and nowhere else."""
    thing = Thing(kind, KINDS[kind].colours[0], "middle", 0.5, 0.5, 0.9, look=3)
    image, labels = render(Scene(setting, (thing,), seed=5))
    bare_image, bare_labels = render(Scene(setting, (), seed=5))
    figure = labels == LABELS.index(kind)
    beyond = ~neighbours(figure)  # without the antialiased rim, less than half covered
    assert np.array_equal(labels[beyond], bare_labels[beyond])
    changed = (np.asarray(image) != np.asarray(bare_image)).any(-1)
    assert changed[figure].mean() > 0.98
    beyond[round(0.82 * SIZE) :] = False  # the ground, which the thing shades
    assert not changed[beyond].any()


def test_labels_and_palette():
    assert LABELS[0] == "unlabelled"
    assert not PALETTE[0].any()
    assert PALETTE.shape == (len(LABELS), 3)
    assert len(set(LABELS)) == len({tuple(colour) for colour in PALETTE.tolist()}) == len(LABELS)
    seen = set()
    for seed in range(150):
        labels = render(sample_scene(seed))[1]
        assert (labels.dtype, labels.shape) == (np.uint8, (SIZE, SIZE))
        seen |= set(np.unique(labels).tolist())
    assert seen == set(range(len(LABELS)))


@pytest.mark.parametrize("change", [{"colour": "blue"}, {"flip": True}, {"tilt": 4.0}, {"x": 0.4}, {"look": 1}])
def test_every_attribute_of_a_thing_shows(change: dict[str, object]):
    thing = Thing("car", "red", "middle", 0.5, 0.5, 0.9)
    before, after = (render(Scene("street", (each,)))[0] for each in (thing, replace(thing, **change)))
    assert before.tobytes() != after.tobytes()


def on_canvas(region: Region) -> np.ndarray:
    whole = np.zeros((SIDE, SIDE), bool)
    whole[region.window] = region.mask
    return whole


def neighbours(mask: np.ndarray) -> np.ndarray:
    """Pixels that touch a pixel of the mask, at a corner at least."""
    padded = np.pad(mask, 1)
    return np.any([np.roll(padded, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)[1:-1, 1:-1]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
