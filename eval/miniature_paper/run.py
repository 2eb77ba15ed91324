"""The miniature paper from end to end: rates, tables, analyses and the page. Finished stages are not done again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from ether_diffusion.analysis.output import check_matplotlib
from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.grid import divergence
from ether_diffusion.benchmark.grid_config import Cell, GridConfig
from ether_diffusion.benchmark.grid_report import run_grid
from ether_diffusion.benchmark.local_pool import Job, Pool, PoolUnits, open_pool
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.runner import run_benchmark
from ether_diffusion.config import to_yaml
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.protocols import MapProtocol, load_protocol
from ether_diffusion.files import write_whole
from ether_diffusion.tinyworld.layouts import FIRST_SEEDS, SplitName, write_ade20k_splits

from .analyses import DistanceJob, EnergyJob, PerturbationJob
from .best_rates import cells_of, choose_rates, choose_refits
from .config import CHOOSING_SEEDS, PaperConfig
from .paper_findings import distance_file, energy_file, perturbation_file, perturbations, read_findings
from .paper_page import write_page

NO_TRANSFORM = ("full",)
"""Methods whose runs have no adapter, and so no distances and energies."""


def run_paper(config: PaperConfig, command: str) -> Path:
    """Do the stages that are not done, and write the page.

    Args:
        command: The command line, which is written into the page.

    Raises:
        UserError: the user has to correct something; or a training failed for another reason than divergence.
        Interrupted: a signal came; the same command resumes.
    """
    check_matplotlib()
    write_scenes(config)
    rates = config.rates()
    Plan(rates.benchmark()).check()
    with open_pool(config.workers, config.output_dir / "logs") as workers:
        perturbing: list[Job] = _perturbation_jobs(config)
        workers.run(perturbing, "perturbations")
        failed = run_grid(rates, command, executor=PoolUnits(workers, "rates"))[0].failed
        check_failures(failed, Plan(rates.benchmark()))
        chosen = cells_of(choose_rates(config))
        refits = _run_refits(config, rates, chosen, command, workers)
        chosen["controllable"] |= {name: one.cell for name, one in choose_refits(refits).items()}
        tables = config.tables(chosen)
        builds = {
            Unit("controllable", name): Unit("controllable", refit.after)
            for name, refit in config.controllable.refits.items()
        }
        failed = run_benchmark(tables, executor=PoolUnits(workers, "tables", builds)).failed
        check_failures(failed, Plan(tables), builds)
        workers.run(_run_jobs(config, rates, Plan(tables)), "analyses")
    return write_page(config, read_findings(config, refits), command)


def write_scenes(config: PaperConfig) -> None:
    """Render the scenes that rates are chosen on and those of the tables, each set with a protocol of its size.

    Both sets have the same training scenes. A complete set is kept; an incomplete one is rendered again.
    """
    stated = load_protocol(MapProtocol, config.controllable.protocol)
    scenes = config.controllable.scenes
    counts = {"choosing": (CHOOSING_SEEDS, scenes.choosing), "tables": (FIRST_SEEDS["validation"], scenes.tables)}
    first = FIRST_SEEDS["training"]
    for use, (start, count) in counts.items():
        folder = config.scenes_folder(use)
        seeds: dict[SplitName, range] = {
            "training": range(first, first + scenes.training),
            "validation": range(start, start + count),
        }
        protocol = stated.model_copy(update={"images": count, "name": f"{stated.name}/{use}-{count}"})
        write_whole(folder.with_suffix(".yaml"), to_yaml(protocol))
        record = folder.with_suffix(".txt")
        text = " ".join(f"{name} {span.start}-{span.stop}" for name, span in seeds.items())
        with FileLock(folder.with_suffix(".lock")):  # the same command may run twice at once
            if folder.is_dir() and record.is_file() and record.read_text(encoding="utf-8") == text:
                continue
            shutil.rmtree(folder, ignore_errors=True)
            write_ade20k_splits(folder, seeds, shown=True)
            write_whole(record, text)


def _run_refits(
    config: PaperConfig, rates: GridConfig, chosen: Mapping[str, Mapping[str, Cell]], command: str, workers: Pool
) -> GridConfig | None:
    plan = Plan(rates.benchmark())
    runs = {name: plan.run_folder(Unit("controllable", cell.name)) for name, cell in chosen["controllable"].items()}
    refits = config.refit_rates(runs)
    if refits is not None:
        failed = run_grid(refits, command, executor=PoolUnits(workers, "second phases"))[0].failed
        check_failures(failed, Plan(refits.benchmark()))
    return refits


def _perturbation_jobs(config: PaperConfig) -> list[Job]:
    """Perturbations of the layers that adapters are attached to."""
    part, plan = config.dreambooth, Plan(config.rates().benchmark())
    base = next(unit for unit in plan.units() if unit.method == Cell(part.base, (), part.grid.seeds[0]).name)
    layers = tuple(sorted(plan.training(base).adapter.peft_config().target_modules))
    return [
        PerturbationJob(
            part.protocol,
            kind,
            distance,
            layers,
            part.table_subjects,
            config.perturbations.prompts,
            perturbation_file(config, kind, distance),
        )
        for kind, distance in perturbations(config)
    ]


def _run_jobs(config: PaperConfig, rates: GridConfig, tables: Plan) -> list[Job]:
    """Distances of the grid's subject, energies of the table's first subject."""
    part, grid = config.dreambooth, Plan(rates.benchmark())
    skipped = (*NO_TRANSFORM, part.base)
    subject, jobs = (part.subjects or ("",))[0], []
    for cell in part.cells():
        unit = Unit("dreambooth", cell.name, subject)
        if cell.method not in skipped and not divergence(grid.config, unit):
            jobs.append(DistanceJob(grid.run_folder(unit), distance_file(config, cell)))
    for method in tables.part("dreambooth")[0].methods:
        unit = Unit("dreambooth", method, part.table_subjects[0])
        if method not in skipped and not divergence(tables.config, unit):
            jobs.append(EnergyJob(tables.run_folder(unit), energy_file(config, method)))
    return jobs


def check_failures(failed: Mapping[Unit, str], plan: Plan, builds: Mapping[Unit, Unit] | None = None) -> None:
    """Accept trainings that diverged, and those that were to build on them: both are results.

    Raises:
        UserError: other trainings failed.
    """
    causes = {unit: (unit, (builds or {}).get(unit, unit)) for unit in failed}
    bad = [f"{u}: {why}" for u, why in failed.items() if not any(divergence(plan.config, one) for one in causes[u])]
    if bad:
        raise UserError("\n".join(bad))
