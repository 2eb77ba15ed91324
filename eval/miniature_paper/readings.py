"""Readings: a number for each training and unit (a subject, or a fold of scenes), and differences between methods.

They are a CSV next to the page, from which everybody can recompute every verdict.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import special

from ether_diffusion.analysis.output import write_table
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.intervals import Interval
from ether_diffusion.input_files import read_text

COLUMNS = ("table", "method", "unit", "seed", "metric", "value")
CROSSED = ("maps", "captioned_maps")
"""Tables in which one training has a value for every unit: seeds are crossed with units. In others every unit has
trainings of its own."""


@dataclass(frozen=True)
class Reading:
    """One number.

    Attributes:
        table: subjects, maps, …
        unit: What a training was scored on: a subject, or a fold of scenes.
    """

    table: str
    method: str
    unit: str
    seed: int
    metric: str
    value: float


@dataclass(frozen=True)
class Difference:
    """A mean difference between two methods, with its standard error, degrees of freedom, and number of trainings."""

    value: float
    error: float
    freedom: float
    trainings: int

    def above(self, bound: float) -> float:
        """The one-sided p value of the hypothesis that the true difference is at most `bound`."""
        if self.error == 0:
            return float(self.value <= bound)
        return float(special.stdtr(self.freedom, (bound - self.value) / self.error))

    def below(self, bound: float) -> float:
        """The one-sided p value of the hypothesis that the true difference is at least `bound`."""
        return Difference(-self.value, self.error, self.freedom, self.trainings).above(-bound)

    def interval(self, level: float = 0.95) -> Interval:
        """Student's t interval."""
        reach = float(special.stdtrit(self.freedom, (1 + level) / 2)) * self.error
        return Interval(self.value, self.value - reach, self.value + reach)


class Readings:
    """All readings of an experiment."""

    def __init__(self, readings: Iterable[Reading]) -> None:
        self.readings = list(readings)
        self._values: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
        for one in self.readings:
            self._values.setdefault((one.table, one.method, one.metric), {})[one.unit, one.seed] = one.value

    @classmethod
    def read(cls, path: Path) -> Readings:
        """Read a CSV that `write` wrote. Raises UserError for another file, with the line."""
        rows = csv.DictReader(read_text(path).splitlines())
        if tuple(rows.fieldnames or ()) != COLUMNS:
            raise UserError(f"{path}:1: expected the columns {', '.join(COLUMNS)}.")
        found, seen = [], set()
        for number, row in enumerate(rows, 2):
            try:
                seed, value = int(row["seed"]), float(row["value"])
            except (TypeError, ValueError):
                raise UserError(f"{path}:{number}: expected a whole seed and a number as value.") from None
            one = Reading(row["table"], row["method"], row["unit"], seed, row["metric"], value)
            key = (one.table, one.method, one.unit, one.seed, one.metric)
            if key in seen or not math.isfinite(one.value):
                raise UserError(f"{path}:{number}: {'a reading that is there twice' if key in seen else 'no number'}.")
            seen.add(key)
            found.append(one)
        return cls(found)

    def write(self, path: Path) -> Path:
        """Write them as CSV, sorted."""
        ordered = sorted(self.readings, key=lambda one: (one.table, one.metric, one.method, one.unit, one.seed))
        return write_table(path, [vars(one) for one in ordered])

    def only(self, seeds: int) -> Readings:
        """The readings of the first so many seeds, from 0 on: what an earlier look saw."""
        return Readings(one for one in self.readings if one.seed < seeds)

    def difference(self, table: str, metric: str, one: str, other: str) -> Difference | None:
        """`one` minus `other`, paired by unit and seed; None if fewer than two units are complete."""
        return self.shifted(table, (metric, one), ((metric, other, 1.0),))

    def shifted(self, table: str, one: tuple[str, str], others: Sequence[tuple[str, str, float]]) -> Difference | None:
        """A reading minus others, each times a factor; paired by unit and seed, None if fewer than two units are
        complete.

        Units are random. Where seeds are crossed with units, they are, too.

        Args:
            one: Metric and method.
            others: Metric, method and factor.
        """
        first = self._values.get((table, one[1], one[0]), {})
        rest = [(self._values.get((table, method, metric), {}), factor) for metric, method, factor in others]
        both = first.keys()
        for values, _ in rest:
            both = both & values.keys()
        units, seeds = sorted({unit for unit, _ in both}), sorted({seed for _, seed in both})
        if len(units) < 2 or len(both) < len(units) * len(seeds):
            return None
        found = [[first[u, s] - sum(f * values[u, s] for values, f in rest) for s in seeds] for u in units]
        methods = len({one[1], *(method for _, method, _ in others)})
        trainings = methods * len(seeds) * (1 if table in CROSSED else len(units))
        return mean_difference(np.array(found), table in CROSSED, trainings)


def mean_difference(values: np.ndarray, crossed: bool, trainings: int) -> Difference:
    """From (units, seeds) values.

    Nested seeds: Student's t over the units' means. Crossed: the variance of the mean is
    (MS_units + MS_seeds - MS_rest) / (U S), at least that of the larger part alone, with Satterthwaite's freedom.
    """
    units, seeds = values.shape
    mean = float(values.mean())
    by_unit = seeds * float(values.mean(axis=1).var(ddof=1))
    if not crossed or seeds < 2:
        return Difference(mean, math.sqrt(by_unit / values.size), units - 1, trainings)
    by_seed = units * float(values.mean(axis=0).var(ddof=1))
    rest = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0, keepdims=True) + mean
    by_rest = float(np.square(rest).sum()) / ((units - 1) * (seeds - 1))
    parts = ((by_unit, units - 1), (by_seed, seeds - 1))
    total, largest = by_unit + by_seed - by_rest, max(parts)
    if total <= largest[0]:
        return Difference(mean, math.sqrt(largest[0] / values.size), largest[1], trainings)
    freedom = total**2 / sum(square**2 / n for square, n in (*parts, (by_rest, (units - 1) * (seeds - 1))))
    return Difference(mean, math.sqrt(total / values.size), max(freedom, 1.0), trainings)
