"""Settings of the miniature paper: a grid of learning rates, and tables of each method at its own best rate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ether_diffusion.benchmark.config import BenchmarkConfig, MapPart, Method, SubjectPart
from ether_diffusion.benchmark.grid_config import Axes, Cell, Grid, GridConfig, GridMapPart, GridSubjectPart
from ether_diffusion.config import Settings
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS

RATE = "training.learning_rate"
CHOOSING_SEEDS = FIRST_SEEDS["validation"] + 1_000_000
"""Of the scenes that rates are chosen on: none of `builtin:scenes`."""


class PaperSubjectPart(GridSubjectPart):
    """Subject-driven generation: rates are chosen on `subjects`, the table is of `table_subjects`."""

    table_subjects: tuple[str, ...] = Field(min_length=1)
    base: str
    """The method that leaves the base as it is."""

    @model_validator(mode="after")
    def _apart(self) -> PaperSubjectPart:
        if self.subjects is None or set(self.subjects) & set(self.table_subjects):
            raise ValueError(
                "subjects: expected some that are not in table_subjects: the table is not what was chosen on"
            )
        if self.base not in self.methods:
            raise ValueError(f"base: {self.base!r}; expected one of {', '.join(self.methods)}")
        return self


class Scenes(Settings):
    """How many scenes are drawn."""

    training: PositiveInt = 2000
    choosing: PositiveInt = 40
    """To choose rates by: others than the table's."""
    tables: PositiveInt = 100


class Refit(Settings):
    """A second phase, from another method's run at its best rate: the paper's magnitudes after OFT."""

    after: str
    method: Method
    rates: tuple[PositiveFloat, ...] = Field(min_length=1)

    def settings(self, run: Path) -> Method:
        """Of a training upon this run."""
        return Method(config=self.method.config, settings=(*self.method.settings, f"adapter.after={run}"))


class PaperMapPart(GridMapPart):
    """Maps to images: rates are chosen on other scenes than the table is of."""

    scenes: Scenes = Scenes()
    base: str
    """The method without an adapter."""
    refits: dict[str, Refit] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_names(self) -> PaperMapPart:
        for name in (self.base, *(refit.after for refit in self.refits.values())):
            if name not in self.methods:
                raise ValueError(f"{name!r} is named, but no method; expected one of {', '.join(self.methods)}")
        return self


class Perturbations(Settings):
    """Fig. 3: distances of random transforms on the frozen base, by kind, and the images that are drawn then."""

    distances: dict[str, tuple[PositiveFloat, ...]]
    prompts: PositiveInt = 8
    """Of each of the table's subjects, the first ones, an image each."""


class PaperConfig(Settings):
    """Everything that the page depends on."""

    output_dir: Path
    page: Path
    """The page; its pictures go into a folder of its name beside it."""
    workers: PositiveInt = 2
    """Processes, of one thread each."""
    dreambooth: PaperSubjectPart
    controllable: PaperMapPart
    perturbations: Perturbations
    is_quick: bool = False
    quick: tuple[str, ...] = ()
    """What is changed for a run that shows that everything works, and little else."""

    def rates(self) -> GridConfig:
        """The grid of learning rates, of both tasks."""
        return GridConfig(
            output_dir=self.output_dir / "rates",
            device="cpu",
            threads=1,
            dreambooth=GridSubjectPart.model_validate(_only(self.dreambooth, GridSubjectPart)),
            controllable=GridMapPart.model_validate(self._maps(GridMapPart, "choosing")),
        )

    def refit_rates(self, runs: Mapping[str, Path]) -> GridConfig | None:
        """The grid of the second phases; None if there are none.

        Args:
            runs: Of the first ones, at their best rates, by method.
        """
        if not self.controllable.refits:
            return None
        refits = {name: refit for name, refit in self.controllable.refits.items() if refit.after in runs}
        if not refits:
            return None
        rates: dict[str, Axes] = {name: {RATE: refit.rates} for name, refit in refits.items()}
        changed = {
            "methods": {name: refit.settings(runs[refit.after]) for name, refit in refits.items()},
            "grid": Grid(
                axes={RATE: next(iter(rates.values()))[RATE]}, axes_of=rates, metrics=self.controllable.grid.metrics
            ),
            "also_checkpoints": (),
        }
        part = GridMapPart.model_validate({**self._maps(GridMapPart, "choosing"), **changed})
        return GridConfig(output_dir=self.output_dir / "refits", device="cpu", threads=1, controllable=part)

    def tables(self, best: Mapping[str, Mapping[str, Cell]]) -> BenchmarkConfig:
        """The benchmark behind the tables.

        Args:
            best: By task and method, second phases among them. A method that is not there is left out.
        """
        subjects, maps = self.dreambooth, self.controllable
        folder = self.output_dir / "tables"
        methods: dict[str, dict[str, Method]] = {"dreambooth": {}, "controllable": {}}
        for task, part in (("dreambooth", subjects), ("controllable", maps)):
            for name, method in part.methods.items():
                if name in best[task]:
                    methods[task][name] = best[task][name].as_method(method)
        for name, refit in maps.refits.items():
            if name in best["controllable"]:
                upon = refit.settings(folder / "controllable" / refit.after / "run")
                methods["controllable"][name] = best["controllable"][name].as_method(upon)
        changed = {"also_checkpoints": ()}
        told = {**_only(subjects, SubjectPart), **changed, "subjects": subjects.table_subjects}
        return BenchmarkConfig(
            output_dir=folder,
            device="cpu",
            threads=1,
            dreambooth=SubjectPart.model_validate({**told, "methods": methods["dreambooth"]}),
            controllable=MapPart.model_validate(
                {**self._maps(MapPart, "tables"), **changed, "methods": methods["controllable"]}
            ),
        )

    def scenes_folder(self, use: str) -> Path:
        """Of the scenes `choosing` or of the `tables`. Their protocol, `.yaml`, lies beside it."""
        return self.output_dir / "scenes" / use

    def _maps(self, model: type[MapPart], use: str) -> dict[str, object]:
        folder = self.scenes_folder(use)
        made = {"dataset_dir": str(folder), "protocol": str(folder.with_suffix(".yaml"))}
        return {**_only(self.controllable, model), **made}


def _only(part: Settings, model: type[Settings]) -> dict[str, object]:
    """The settings that a plainer kind has, too."""
    return {name: getattr(part, name) for name in model.model_fields}
