"""Settings of a grid: a benchmark whose methods are trained at every point of some axes, with several seeds."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from ether_diffusion.config import Settings
from ether_diffusion.errors import did_you_mean
from ether_diffusion.limits import Seed, SignedStrength

from .config import NAME, BenchmarkConfig, MapPart, Method, SubjectPart

Coordinate = StrictBool | StrictInt | StrictFloat | StrictStr
Point = tuple[tuple[str, Coordinate], ...]
"""A value on each axis of a method, in the axes' order."""
Axes = dict[str, tuple[Coordinate, ...]]
MOST_CELLS = 10_000


class Reference(Settings):
    """Published values of one metric along one axis, shown next to the grid's own."""

    source: str
    """Where they were published; for the legend."""
    axis: str
    metric: str
    at: tuple[Coordinate, ...]
    values: dict[str, tuple[SignedStrength, ...]]
    """By method, one value for each of `at`, in the metric's unit (mIoU and accuracy: a share of 1)."""

    @model_validator(mode="after")
    def _as_long(self) -> Reference:
        for method, values in self.values.items():
            if len(values) != len(self.at):
                raise ValueError(f"values.{method}: {len(values)} values; expected {len(self.at)}, as many as `at`")
        return self


class Grid(Settings):
    """The points at which a task's methods are trained, and the metrics that are shown."""

    axes: Axes = Field(min_length=1)
    """Settings of a training, such as `training.learning_rate`, and their values. All combinations are trained."""
    axes_of: dict[str, Axes] = Field(default_factory=dict)
    """By method: other values of an axis; `[]` where the method lacks the setting or keeps its own."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    metrics: tuple[str, ...] | None = None
    """Metrics of the protocol to show; null: all."""
    references: tuple[Reference, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Grid:
        for method, axes in {"": self.axes, **self.axes_of}.items():
            for axis, values in axes.items():
                where = f"axes_of.{method}.{axis}" if method else f"axes.{axis}"
                if method:
                    _known(where, axis, self.axes)
                texts = [as_text(value) for value in values]
                if (not values and not method) or len(set(texts)) < len(texts):
                    raise ValueError(f"{where}: [{', '.join(texts)}]; expected some values, each once")
                if bad := [text for text in texts if not re.fullmatch(NAME, text)]:
                    raise ValueError(f"{where}: {bad[0]!r}; expected numbers, or words for a folder's name")
        if "seed" in self.axes:
            raise ValueError("axes.seed: seeds are averaged over; give them as grid.seeds")
        if len(set(map(short, self.axes))) < len(self.axes):
            raise ValueError(f"axes: {', '.join(self.axes)}; expected names that end differently")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)}; expected each once")
        for number, reference in enumerate(self.references):
            _known(f"references[{number}].axis", reference.axis, self.axes)
        return self


@dataclass(frozen=True)
class Cell:
    """One training of a grid; on each subject, if the task has subjects."""

    method: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Its method's name in the benchmark: `ether-learning_rate_0.001-seed_0`."""
        parts = [f"{short(axis)}_{as_text(value)}" for axis, value in self.point]
        return "-".join([self.method, *parts, f"seed_{self.seed}"])

    def as_method(self, method: Method) -> Method:
        """The benchmark's method: the given one, with the settings of this cell after its own."""
        own = [f"{axis}={as_text(value)}" for axis, value in self.point]
        return Method(config=method.config, settings=(*method.settings, *own, f"seed={self.seed}"))


class _GridPart(Settings):
    methods: dict[str, Method]
    grid: Grid

    @model_validator(mode="after")
    def _check_grid(self) -> _GridPart:
        for method in self.grid.axes_of:
            _known(f"grid.axes_of.{method}", method, self.methods)
        of_one = [math.prod(len(values) for values in self._axes(method).values()) for method in self.methods]
        if (count := sum(of_one) * len(self.grid.seeds)) > MOST_CELLS:
            raise ValueError(f"grid: {count:,} trainings; expected at most {MOST_CELLS:,}")
        names = Counter(cell.name for cell in self.cells())
        if twice := next((name for name, times in names.items() if times > 1), None):
            raise ValueError(f"two cells are named {twice}; rename a method")
        return self

    def cells(self) -> list[Cell]:
        """All cells of the first seed, then of the next: a grid that is interrupted has complete seeds."""
        return [
            Cell(method, point, seed)
            for seed in self.grid.seeds
            for method in self.methods
            for point in self._points(method)
        ]

    def _points(self, method: str) -> Iterator[Point]:
        columns = [[(axis, value) for value in values] for axis, values in self._axes(method).items()]
        return itertools.product(*columns)

    def _axes(self, method: str) -> Axes:
        axes = {**self.grid.axes, **self.grid.axes_of.get(method, {})}
        return {axis: values for axis, values in axes.items() if values}


class GridSubjectPart(SubjectPart, _GridPart):
    """Subject-driven generation along a grid."""


class GridMapPart(MapPart, _GridPart):
    """Semantic maps to images along a grid."""


class GridConfig(BenchmarkConfig):
    """A benchmark along a grid, of one task or both."""

    dreambooth: GridSubjectPart | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it is frozen
    controllable: GridMapPart | None = None  # pyright: ignore[reportIncompatibleVariableOverride]

    def benchmark(self) -> BenchmarkConfig:
        """The benchmark whose methods are the cells."""
        plain = self.model_dump(exclude={"dreambooth": {"grid", "methods"}, "controllable": {"grid", "methods"}})
        for task, part in (("dreambooth", self.dreambooth), ("controllable", self.controllable)):
            if part is not None:
                plain[task]["methods"] = {cell.name: cell.as_method(part.methods[cell.method]) for cell in part.cells()}
        return BenchmarkConfig.model_validate(plain)


def short(axis: str) -> str:
    """The last part of a setting's name: `learning_rate`."""
    return axis.rpartition(".")[2]


def as_text(value: Coordinate) -> str:
    """A value as an override and a folder's name spell it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _known(where: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ValueError(f"{where}: {name!r};{did_you_mean(name, known)} expected one of {', '.join(known)}")
