"""Built-in subjects: five "photos" of one individual each, in five settings, for runs without a camera.

Their looks never occur in sampled scenes: DreamBooth has to learn them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scenes import SETTINGS, Scene, Thing, sample_view

IDENTIFIER = "qwe"
LOOK_ALIKES = 60_000_000
"""The first seed of look-alikes."""


@dataclass(frozen=True)
class Subject:
    """One individual.

    Attributes:
        name: The name of its look in `individuals.PAINTERS`.
        class_name: Its category, one of `CLASSES`.
        colour: The nearest of `COLOURS`; its outline is a darker shade of it.
        companions: Noun phrases for the things next to it in its prompts.
        first: Index in `SETTINGS` of its first photo's setting.
    """

    name: str
    class_name: str
    colour: str
    companions: tuple[str, str, str, str]
    first: int

    def scene(
        self, setting: str, x: float, y: float, size: float, *, flip: bool = False, tilt: float = 0, pose: float = 0.5
    ) -> Scene:
        """The subject alone; `x`, `y` and `size` as in `Thing`."""
        place = "left" if x < 0.42 else "right" if x > 0.58 else "middle"
        thing = Thing(self.class_name, self.colour, place, size, x, y, flip, tilt, 0, self.name, pose)
        return Scene(setting, (thing,), SETTINGS.index(setting) * 100 + self.first)

    @property
    def photos(self) -> tuple[Scene, ...]:
        """Five scenes in five settings, with different places, sizes, tilts and poses."""
        settings = [SETTINGS[(self.first + k) % len(SETTINGS)] for k in range(len(_SHOTS))]
        return tuple(
            self.scene(setting, x, y, size, flip=flip, tilt=tilt, pose=pose)
            for setting, (x, y, size, flip, tilt, pose) in zip(settings, _SHOTS, strict=True)
        )

    @property
    def templates(self) -> tuple[str, ...]:
        """Ten evaluation prompts with `{subject}` for identifier and class: every setting, and four companions."""
        return evaluation_templates(self.companions)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates filled in: "a qwe toy in the snow"."""
        return tuple(template.format(subject=f"{IDENTIFIER} {self.class_name}") for template in self.templates)


def evaluation_templates(companions: Sequence[str]) -> tuple[str, ...]:
    """Ten templates with `{subject}`: every setting, and four companions, noun phrases like "a red ball"."""
    first, second, third, fourth = companions
    return (
        "a photo of a {subject}",
        "a {subject} in the snow",
        "a {subject} on the beach",
        "a {subject} at night",
        "a {subject} in the water",
        "a {subject} in the desert",
        f"a {{subject}} beside {first} in a meadow",
        f"a {{subject}} next to {second} on the street",
        f"a room with a {{subject}} and {third}",
        f"a photo of a {{subject}} with {fourth}",
    )


# (x, y, size, flip, tilt, pose) of each photo.
_SHOTS = (
    (0.5, 0.92, 0.64, False, 0, 0.0),
    (0.36, 0.9, 0.56, False, -4, 0.9),
    (0.62, 0.93, 0.6, True, 3, 0.4),
    (0.56, 0.86, 0.52, False, 5, 0.2),
    (0.42, 0.94, 0.66, True, -2, 0.7),
)

SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("robot", "toy", "green", ("a red ball", "a blue car", "a yellow cup", "a white cat"), 7),
        Subject("monster", "toy", "purple", ("a yellow star", "a red house", "a blue cup", "a brown dog"), 4),
        Subject("spotted_dog", "dog", "brown", ("a red ball", "a blue house", "a green toy", "an orange cat"), 0),
        Subject("party_cat", "cat", "blue", ("a red mushroom", "a yellow car", "a white cup", "a brown dog"), 3),
        Subject("racing_car", "car", "blue", ("a green tree", "a red house", "a yellow toy", "a black cat"), 6),
        Subject("smiling_mug", "cup", "green", ("a pink flower", "a red car", "a brown toy", "a yellow star"), 1),
        Subject("pirate_boat", "boat", "red", ("a blue ball", "a green tree", "an orange toy", "a white dog"), 2),
        Subject("gingerbread_house", "house", "brown", ("a red tree", "a green car", "a blue star", "a white cat"), 5),
    )
}


def look_alikes(class_name: str, count: int) -> list[Image.Image]:
    """Renders of this many individuals of a class in `CLASSES`, in their own colours, looks and places.

    A function of its arguments alone. No stage of pretraining has seen these scenes.
    """
    found, seed = [], LOOK_ALIKES
    while len(found) < count:
        scene = sample_view(seed)
        if scene.things[0].kind == class_name:
            found.append(render(scene)[0])
        seed += 2  # views come in pairs of one individual
    return found


def render_photos(name: str) -> list[Image.Image]:
    """The photos of a subject in `SUBJECTS`: RGB, 64 x 64, the same on every call."""
    return [render(scene)[0] for scene in SUBJECTS[name].photos]
