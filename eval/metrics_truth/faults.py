"""Images of a subject with a known fault of a known degree: rendered, or made of images that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFilter

from ether_diffusion.randomness import derive_seed
from ether_diffusion.tinyworld.builtin_subjects import Subject, render_photos
from ether_diffusion.tinyworld.phrasing import WHERE
from ether_diffusion.tinyworld.render import LABELS, render
from ether_diffusion.tinyworld.scenes import SETTINGS, Dice, Scene

BLUR, SHIFT, HIDDEN = 2.0, 0.25, 0.6
"""At degree 1: the blur's radius in pixels, the shift as a share of the side, the hidden share of the subject."""


@dataclass(frozen=True)
class Images:
    """Images of one subject, and what they are compared with.

    Attributes:
        prompts: Of each image, without an identifier.
        clean: The same images without the fault.
        labels: (N, 64, 64) of the scenes that they were to show; None for images of an unknown layout.
    """

    images: Sequence[Image.Image]
    prompts: Sequence[str]
    clean: Sequence[Image.Image]
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Fault:
    """A fault of images.

    Attributes:
        paint: The image of a subject's scene with this fault, of a degree from 0 to 1.
        graded: Every image has the fault in its degree; otherwise a share of the images, the degree, has all of it.
    """

    title: str
    paint: Callable[[Subject, Scene, float], Image.Image]
    graded: bool


def scenes_of(subject: Subject, count: int, name: str) -> list[Scene]:
    """Scenes of the subject alone, in all settings in turn, at random places; a function of its arguments."""
    found = []
    for k in range(count):
        dice = Dice(derive_seed(k, f"truth/{name}/{subject.name}"))
        x, y, size = dice.between(0.3, 0.7), dice.between(0.84, 0.94), dice.between(0.5, 0.66)
        options = {"flip": dice.chance(0.5), "tilt": dice.between(-4, 4), "pose": dice.between(0, 1)}
        found.append(subject.scene(SETTINGS[k % len(SETTINGS)], x, y, size, **options))
    return found


@lru_cache(maxsize=512)
def _rendered(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """`render`, which takes longer than all else: every fault and degree starts from the same scenes."""
    return render(scene)


def faulty(subject: Subject, scenes: Sequence[Scene], fault: Fault, degree: float) -> Images:
    """The scenes' images with a fault. Shares of a higher degree contain those of a lower one."""
    order = Dice(derive_seed(0, f"truth/order/{subject.name}")).shuffled(range(len(scenes)))
    wrong = set(order[: round(degree * len(scenes))])
    degrees = [degree if fault.graded else float(k in wrong) for k in range(len(scenes))]
    clean = [_rendered(scene) for scene in scenes]
    pairs = list(zip(scenes, degrees, clean, strict=True))
    return Images(
        [fault.paint(subject, scene, own) if own else image for scene, own, (image, _) in pairs],
        [f"a {subject.class_name} {WHERE[scene.setting][0]}" for scene in scenes],
        [image for image, _ in clean],
        np.stack([labels for _, labels in clean]),
    )


def _look_alike(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    look = Dice(derive_seed(scene.seed, f"truth/look/{scene.things[0].x}")).number(2**16)
    return _rendered(replace(scene, things=(replace(scene.things[0], individual=None, look=look),)))[0]


def _recoloured(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    image, labels = _rendered(scene)
    hue, saturation, value = (np.array(band) for band in image.convert("HSV").split())
    shifted = np.where(labels == LABELS.index(subject.class_name), hue + round(128 * degree), hue).astype(np.uint8)
    return Image.merge("HSV", [Image.fromarray(band) for band in (shifted, saturation, value)]).convert("RGB")


def _partly_hidden(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    image, labels = _rendered(scene)
    rows = np.flatnonzero((labels == LABELS.index(subject.class_name)).any(axis=1))
    height = round(HIDDEN * degree * len(rows))
    shown, behind = np.array(image), np.asarray(_rendered(replace(scene, things=()))[0])
    above = slice(max(rows[0] - 2, 0), rows[0] + height)  # its outline, too
    shown[above] = behind[above]
    return Image.fromarray(shown)


def _elsewhere(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    return _rendered(replace(scene, setting=SETTINGS[(SETTINGS.index(scene.setting) + 3) % len(SETTINGS)]))[0]


def _copied(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    others = [k for k, photo in enumerate(subject.photos) if photo.setting != scene.setting]
    return render_photos(subject.name)[others[SETTINGS.index(scene.setting) % len(others)]]


def _blurred(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    return _rendered(scene)[0].filter(ImageFilter.GaussianBlur(BLUR * degree))


def _shifted(subject: Subject, scene: Scene, degree: float) -> Image.Image:
    thing = scene.things[0]
    away = SHIFT * degree * (1 if thing.x < 0.5 else -1)
    return render(replace(scene, things=(replace(thing, x=thing.x + away),)))[0]


FAULTS: dict[str, Fault] = {
    "individual": Fault("wrong individual", _look_alike, graded=False),
    "colour": Fault("wrong colour", _recoloured, graded=True),
    "part": Fault("missing part", _partly_hidden, graded=True),
    "setting": Fault("wrong setting", _elsewhere, graded=False),
    "copy": Fault("copied photo", _copied, graded=False),
    "blur": Fault("blur", _blurred, graded=True),
    "layout": Fault("layout shifted", _shifted, graded=True),
}
"""By name: what a training can get wrong, one at a time."""


def spoiled(
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    others: Sequence[Image.Image],
    photos: Sequence[Image.Image],
    fault: str,
    degree: float,
) -> Images:
    """Images of an unknown layout with a fault: those of `FAULTS` that need no scene.

    Args:
        others: As many images of another subject, of the same prompts.
        fault: individual (of `others`), setting (the next prompt's image), copy or blur.
    """
    order = Dice(derive_seed(0, "truth/order/generated")).shuffled(range(len(images)))
    wrong = set(order[: round(degree * len(images))])
    replaced = {
        "individual": others,
        "setting": [images[(k + 3) % len(images)] for k in range(len(images))],
        "copy": [photos[k % len(photos)] for k in range(len(images))],
    }
    if fault == "blur":
        shown = [image.filter(ImageFilter.GaussianBlur(BLUR * degree)) if degree else image for image in images]
    else:
        shown = [replaced[fault][k] if k in wrong else image for k, image in enumerate(images)]
    return Images(shown, prompts, images)
