"""Sample order: which subject and which photo the sample of a global index shows, as a function of seed and index."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ether_diffusion.randomness import generator, permutation


class SubjectPhoto(NamedTuple):
    """The index of a sample's subject, of the photo in it, and of the sample among those of its subject."""

    subject: int
    photo: int
    number: int


class SampleOrder:
    """Rounds over the subjects and, within each subject, over its photos; `group` samples share subject and shape.

    The sample indices from a multiple of `group` to the next form a unit. Each round of units shows every subject once,
    in an order of its own. A subject with n photos has cycles of n units: n_b of them show a shape that n_b of its
    photos have, so that a cycle shows each photo exactly `group` times, whatever the shapes. Where all photos have one
    shape, each run of n samples of a subject, from a multiple of n on, shows every photo once.

    Args:
        shapes: The shape of each photo of each subject.
        group: A multiple of the samples in one forward pass. 1 where shapes need not be shared.
    """

    def __init__(self, shapes: Sequence[Sequence[Hashable]], seed: int, group: int = 1) -> None:
        self.seed, self.group = seed, group
        self.shapes = [list(of_subject) for of_subject in shapes]

    def __len__(self) -> int:
        return samples_per_epoch(len(of_subject) for of_subject in self.shapes)

    def __getitem__(self, index: int) -> SubjectPhoto:
        check_index(index)
        unit, place = divmod(index, self.group)
        round_, position = divmod(unit, len(self.shapes))
        subject = _epoch(self.seed, "subject", round_, len(self.shapes))[position]
        number = round_ * self.group + place
        return SubjectPhoto(subject, self._photo(subject, round_, place), number)

    def _photo(self, subject: int, unit: int, place: int) -> int:
        stream = "instance" if subject == 0 else f"instance/{subject}"
        shapes = self.shapes[subject]
        cycle, position = divmod(unit, len(shapes))
        order = [shapes[photo] for photo in _epoch(self.seed, f"{stream}/shapes", cycle, len(shapes))]
        shape = order[position]
        photos = [photo for photo, other in enumerate(shapes) if other == shape]
        # The index of this sample among those of its shape, from the beginning of the run.
        sample = (cycle * len(photos) + order[:position].count(shape)) * self.group + place
        if len(photos) < len(shapes):
            stream = f"{stream}/shape-{shapes.index(shape)}"
        return photos[in_epochs(sample, len(photos), self.seed, stream)]


def samples_per_epoch(photos: Iterable[int]) -> int:
    """Samples in an epoch over subjects with so many photos each: every subject has as many as the largest one."""
    counts = list(photos)
    return len(counts) * max(counts)


def in_epochs(index: int, size: int, seed: int, stream: str) -> int:
    """Which of `size` items a sample shows: epoch `index // size` shows each item once, in an order of its own."""
    epoch, position = divmod(index, size)
    return _epoch(seed, stream, epoch, size)[position]


def dropped(prompt: str, probability: float, seed: int, index: int) -> str:
    """The prompt of a sample, or "" with this probability."""
    if probability and torch.rand((), generator=generator(seed, "caption_dropout", index)).item() < probability:
        return ""
    return prompt


def check_index(index: int) -> None:
    """Raise IndexError for a negative index: a run has no last sample to count from."""
    if index < 0:
        raise IndexError(f"samples are numbered from 0, got {index}")


@lru_cache(maxsize=64)  # consecutive samples share their epoch, whose order takes milliseconds for a large data set
def _epoch(seed: int, stream: str, epoch: int, size: int) -> tuple[int, ...]:
    return tuple(permutation(seed, stream, epoch, size))
