"""What trainings on maps add to the encoder alone. Much of mIoU itself comes from captions, without any map."""

from __future__ import annotations

from collections.abc import Sequence

from ether_diffusion.evaluation.intervals import Estimate, quantiles

from .map_trainings import MapTraining, best_of
from .verdicts import Verdict, above, all_of

KEEPS = 0.75
"""The share of its own largest gain that a method keeps at a rate that suits it."""
LOSES = 0.5
"""The share of its own largest gain below which a method no longer follows maps."""
SOON = 0.9
"""The share of a training's largest gain that counts as near its best."""


def keeps(training: MapTraining, trainings: Sequence[MapTraining], alone: Estimate | None) -> Verdict:
    """Whether a training ends with most of the gain of its method's best one. A diverged training does not."""
    best = best_of(trainings)
    if training.diverged:
        return "does not hold"
    if training.end is None or best is None or alone is None:
        return "not measured"
    return _has(training.end - alone, _end(best) - alone, KEEPS)


def loses(training: MapTraining, trainings: Sequence[MapTraining], alone: Estimate | None) -> Verdict:
    """Whether a training ends with less than half of the gain of its method's best one."""
    best = best_of(trainings)
    if training.diverged:
        return "holds"
    if training.end is None or best is None or alone is None:
        return "not measured"
    return above(((_end(best) - alone) * LOSES - (training.end - alone)).interval())


def is_soon(training: MapTraining, step: int, alone: Estimate | None) -> Verdict:
    """Whether a training has nearly the largest gain of its own checkpoints at a step."""
    if training.diverged:
        return "does not hold"
    if step not in training.miou or alone is None:
        return "not measured"
    return _has(training.miou[step] - alone, _largest(training) - alone, SOON)


def end_share(training: MapTraining, trainings: Sequence[MapTraining], alone: Estimate | None) -> str:
    """The share of its method's largest gain at its end, with the interval."""
    best = best_of(trainings)
    if training.diverged or training.end is None or best is None or alone is None:
        return "diverged" if training.diverged else "not measured"
    return _share(training.end - alone, _end(best) - alone)


def early_share(training: MapTraining, step: int, alone: Estimate) -> str:
    """The share of its own checkpoints' largest gain at a step, with the interval."""
    if training.diverged or step not in training.miou:
        return "diverged" if training.diverged else "not measured"
    return _share(training.miou[step] - alone, _largest(training) - alone)


def more(some: Sequence[Sequence[Verdict]], others: Sequence[Sequence[Verdict]]) -> Verdict:
    """Whether more verdicts hold in each of `some` than in each of `others`, whatever the undecided ones are."""
    if any("not measured" in found for found in (*some, *others)):
        return "not measured"
    if min(map(_sure, some)) > max(map(_possible, others)):
        return "holds"
    return "does not hold" if min(map(_possible, some)) <= max(map(_sure, others)) else "undecided"


def count(found: Sequence[Verdict]) -> str:
    """How many verdicts hold, in words; a range if some are undecided."""
    sure, possible = _sure(found), _possible(found)
    return f"{sure} of {len(found)}" if sure == possible else f"{sure} to {possible} of {len(found)}"


def _has(gain: Estimate, largest: Estimate, share: float) -> Verdict:
    """Whether a gain is above 0 and above this share of the largest."""
    return all_of([above(gain.interval()), above((gain - largest * share).interval())])


def _share(gain: Estimate, largest: Estimate) -> str:
    """A gain as a share of the largest; both numbers if the largest may be 0."""
    if largest.value <= 0:
        return "no gain over the encoder alone"
    share = f"{gain.value / largest.value:.0%}"
    if gain is largest:
        return share
    if float(largest.replicas.min()) <= 0:  # a share of it would mean nothing
        return f"{100 * gain.value:+.1f} of {100 * largest.value:+.1f} points of mIoU"
    low, high = quantiles(gain.replicas / largest.replicas, gain.level)
    return share if low == high else f"{share} [{low:.0%}, {high:.0%}]"


def _end(training: MapTraining) -> Estimate:
    assert training.end is not None
    return training.end


def _largest(training: MapTraining) -> Estimate:
    return max(training.miou.values(), key=lambda one: one.value)


def _sure(found: Sequence[Verdict]) -> int:
    return sum(verdict == "holds" for verdict in found)


def _possible(found: Sequence[Verdict]) -> int:
    return sum(verdict != "does not hold" for verdict in found)
