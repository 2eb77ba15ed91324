"""Settings of the miniature paper: a grid of learning rates, and tables of each method at its own best rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import Field, model_validator

from ether_diffusion.benchmark.config import BenchmarkConfig, MapPart, Method, SubjectPart
from ether_diffusion.benchmark.grid_config import Axes, Cell, Grid, GridConfig, GridMapPart, GridSubjectPart
from ether_diffusion.config import Settings, load_config
from ether_diffusion.limits import Count, Many, PositiveStrength, Workers
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS

RATE = "training.learning_rate"
CHOOSING_SEEDS = FIRST_SEEDS["validation"] + 1_000_000
"""Seeds of the scenes that rates are chosen on; none of them is in `builtin:scenes`."""
PACK = "off"
"""The page in docs/ was made by trainings one by one, whose last bits it repeats."""


class PaperSubjectPart(GridSubjectPart):
    """Subject-driven generation: rates are chosen on `subjects`, and the table scores `table_subjects`."""

    table_subjects: tuple[str, ...] = Field(min_length=1)
    base: str
    """The method that does not change the base."""

    @model_validator(mode="after")
    def _apart(self) -> PaperSubjectPart:
        if self.subjects is None or set(self.subjects) & set(self.table_subjects):
            raise ValueError(
                "subjects: expected subjects that are not in table_subjects: rates are not chosen on the table's"
            )
        if self.base not in self.methods:
            raise ValueError(f"base: {self.base!r}; expected one of {', '.join(self.methods)}")
        return self


class Scenes(Settings):
    """The number of rendered scenes, by use."""

    training: Many = 2000
    choosing: Many = 40
    """Scenes to choose rates on; not the table's."""
    tables: Many = 100


class Refit(Settings):
    """A second phase after another method's run at its best rate: the paper's magnitudes after OFT."""

    after: str
    method: Method
    rates: tuple[PositiveStrength, ...] = Field(min_length=1)

    def settings(self, run: Path) -> Method:
        """The method's settings for a training after this run."""
        return Method(config=self.method.config, settings=(*self.method.settings, f"adapter.after={run}"))


class PaperMapPart(GridMapPart):
    """Maps to images: rates are chosen on other scenes than the table's."""

    scenes: Scenes = Scenes()
    base: str
    """The method without an adapter."""
    refits: dict[str, Refit] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_names(self) -> PaperMapPart:
        for name in (self.base, *(refit.after for refit in self.refits.values())):
            if name not in self.methods:
                raise ValueError(f"{name!r} is not a method; expected one of {', '.join(self.methods)}")
        return self


class Perturbations(Settings):
    """Fig. 3: distances of random transforms of the frozen base, by kind."""

    distances: dict[str, tuple[PositiveStrength, ...]]
    prompts: Count = 8
    """The first prompts of each of the table's subjects, with one image each."""


class PaperConfig(Settings):
    """Everything that the page depends on."""

    output_dir: Path
    page: Path
    """The page. Its figures go into the folder of its name next to it."""
    workers: Workers = 2
    """Processes, of one thread each."""
    dreambooth: PaperSubjectPart
    controllable: PaperMapPart
    perturbations: Perturbations
    is_quick: bool = False
    quick: tuple[str, ...] = ()
    """Settings of `--quick`: a short run that shows that everything works."""

    def rates(self) -> GridConfig:
        """The grid of learning rates of both tasks."""
        return GridConfig(
            output_dir=self.output_dir / "rates",
            device="cpu",
            threads=1,
            pack=PACK,
            dreambooth=GridSubjectPart.model_validate(_only(self.dreambooth, GridSubjectPart)),
            controllable=GridMapPart.model_validate(self._maps(GridMapPart, "choosing")),
        )

    def refit_rates(self, runs: Mapping[str, Path]) -> GridConfig | None:
        """The grid of the second phases; None if there are none.

        Args:
            runs: The run folders of the first phases at their best rates, by method.
        """
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
        return GridConfig(output_dir=self.output_dir / "refits", device="cpu", threads=1, pack=PACK, controllable=part)

    def tables(self, best: Mapping[str, Mapping[str, Cell]]) -> BenchmarkConfig:
        """The benchmark behind the tables.

        Args:
            best: By task and method, with second phases. Methods that are missing are left out.
        """
        subjects, maps = self.dreambooth, self.controllable
        folder = self.output_dir / "tables"
        methods = {
            task: {
                name: best[task][name].as_method(method) for name, method in part.methods.items() if name in best[task]
            }
            for task, part in (("dreambooth", subjects), ("controllable", maps))
        }
        for name, refit in maps.refits.items():
            if name in best["controllable"]:
                after = refit.settings(folder / "controllable" / refit.after / "run")
                methods["controllable"][name] = best["controllable"][name].as_method(after)
        changed = {"also_checkpoints": ()}
        shared = {**_only(subjects, SubjectPart), **changed, "subjects": subjects.table_subjects}
        return BenchmarkConfig(
            output_dir=folder,
            device="cpu",
            threads=1,
            pack=PACK,
            dreambooth=SubjectPart.model_validate({**shared, "methods": methods["dreambooth"]}),
            controllable=MapPart.model_validate(
                {**self._maps(MapPart, "tables"), **changed, "methods": methods["controllable"]}
            ),
        )

    def scenes_folder(self, use: str) -> Path:
        """The folder of the scenes `choosing` or `tables`. Their protocol has the same name and ends in `.yaml`."""
        return self.output_dir / "scenes" / use

    def _maps(self, model: type[MapPart], use: str) -> dict[str, object]:
        folder = self.scenes_folder(use)
        rendered = {"dataset_dir": str(folder), "protocol": str(folder.with_suffix(".yaml"))}
        return {**_only(self.controllable, model), **rendered}


def load_paper(path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False) -> PaperConfig:
    """A config from a file or a shipped config's name.

    Args:
        overrides: `section.key=value`.
        quick: With the config's own `quick` settings, which overrides replace.

    Raises:
        UserError: as `load_config`.
    """
    config = load_config(PaperConfig, path, overrides)
    return load_config(PaperConfig, path, ["is_quick=true", *config.quick, *overrides]) if quick else config


def _only(part: Settings, model: type[Settings]) -> dict[str, object]:
    """Those settings that the simpler model has, too."""
    return {name: getattr(part, name) for name in model.model_fields}


TITLES = {
    "base": "base, untrained",
    "full": "DreamBooth (full)",
    "none": "encoder only",
    "lora": "LoRA r=4",
    "oft": "OFT n=4",
    "oft_magnitude": "OFT n=4 + magnitudes",
    "naive": "Naive n=4",
    "ether": "ETHER",
    "ether_plus": "ETHER+",
    "ether_plus_one_sided": "ETHER+ one-sided",
}
"""Titles of rows and lines."""

STYLES = {"oft": "OFT", "naive": "Naive", "ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA"}
"""The titles under which plots know a method's colour. Other methods are plotted under their own titles."""
