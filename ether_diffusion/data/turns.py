"""Turns: which subject and which photo the sample of a global index shows. A function of seed and index."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from ether_diffusion.randomness import permutation


class Turn(NamedTuple):
    """Subject and photo of a sample by number, and the sample's own number among those of its subject."""

    subject: int
    photo: int
    number: int


class Turns:
    """Subjects take turns, then the photos of each; a run of `group` samples shares a subject and a shape.

    Sample indices from a multiple of `group` to the next are one unit. In each round of units every subject has one,
    in an order of the round. A subject with n photos goes through cycles of n units: n_b of them go to a shape that
    n_b of its photos have, so that a cycle shows each photo exactly `group` times whatever the shapes. Where all
    photos have one shape, any n samples of a subject in a row from a multiple of n on show each photo once.

    Args:
        shapes: The shape of each photo of each subject.
        group: A multiple of the samples in one forward pass. 1 where shapes need not be shared.
    """

    def __init__(self, shapes: Sequence[Sequence[Hashable]], seed: int, group: int = 1) -> None:
        self.seed, self.group = seed, group
        self.shapes = [list(of_subject) for of_subject in shapes]

    def __len__(self) -> int:
        return samples_an_epoch(len(of_subject) for of_subject in self.shapes)

    def __getitem__(self, index: int) -> Turn:
        unit, place = divmod(index, self.group)
        round_, turn = divmod(unit, len(self.shapes))
        subject = permutation(self.seed, "subject", round_, len(self.shapes))[turn]
        number = round_ * self.group + place
        return Turn(subject, self._photo(subject, round_, place), number)

    def _photo(self, subject: int, unit: int, place: int) -> int:
        stream = "instance" if subject == 0 else f"instance/{subject}"
        shapes = self.shapes[subject]
        cycle, turn = divmod(unit, len(shapes))
        order = [shapes[photo] for photo in permutation(self.seed, f"{stream}/shapes", cycle, len(shapes))]
        shape = order[turn]
        photos = [photo for photo, other in enumerate(shapes) if other == shape]
        # The how-manieth sample of this shape this is, since the run began.
        sample = (cycle * len(photos) + order[:turn].count(shape)) * self.group + place
        if len(photos) < len(shapes):
            stream = f"{stream}/shape-{shapes.index(shape)}"
        epoch, position = divmod(sample, len(photos))
        return photos[permutation(self.seed, stream, epoch, len(photos))[position]]


def samples_an_epoch(photos: Iterable[int]) -> int:
    """Of subjects with so many photos: each subject has as many samples as the one with most photos."""
    counts = list(photos)
    return len(counts) * max(counts)
