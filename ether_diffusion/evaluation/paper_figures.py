"""The miniature paper's figures: curves beside the paper's, and sheets of images; small files beside the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ether_diffusion.analysis import plots
from ether_diffusion.analysis.output import FAINT, line_style, plot
from ether_diffusion.analysis.paper import DISTANCE_RATES, DISTANCES
from ether_diffusion.generation import pair_sources
from ether_diffusion.pictures import save_png, sheet

from .benchmark_config import Unit
from .benchmark_plan import Plan
from .benchmark_worker import images_folder
from .paper_analyses import NO_CHANGE
from .paper_claims import miou_by_rate, miou_by_step
from .paper_config import RATE, PaperConfig
from .paper_findings import FAITHFULNESS, LIKENESS, Findings, perturbation_file, perturbations, steps_of
from .paper_numbers import MIOU_BY_RATE, RATES, STYLES, TITLES
from .subject_images import photos_of, read_subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS_OF_SHEETS = 128
"""Of a palette of its own, which small pictures lose little by."""


class Figures:
    """Draws into `output_dir`/figures, and puts copies beside the page.

    Args:
        command: Goes into the files' metadata.
    """

    def __init__(self, config: PaperConfig, findings: Findings, command: str) -> None:
        self.config, self.findings, self.command = config, findings, command
        self.beside = config.page.with_suffix("")

    def draw_all(self) -> dict[str, Path]:
        """All that there is something to draw of: by name, the file beside the page."""
        makers = {
            "table-2": self._subjects,
            "table-3": self._scenes,
            "fig-3": self._strength,
            "fig-3-images": self._perturbed_images,
            "fig-4": self._distances,
            "fig-5": self._rates,
            "fig-5-subjects": self._subject_rates,
            "fig-6": self._steps,
            "fig-7": self._energy,
        }
        found = {}
        for name, make in makers.items():
            path = self.config.output_dir / "figures" / name
            if make(path):
                self.beside.mkdir(parents=True, exist_ok=True)
                found[name] = Path(shutil.copyfile(path.with_name(f"{name}.png"), self.beside / f"{name}.png"))
        return found

    def _strength(self, path: Path) -> bool:
        found = self.findings.perturbed
        rows = [
            {"method": TITLES_OF_KINDS[kind], "distance": distance, "clip_t": value}
            for kind, values in found.items()
            if kind != NO_CHANGE
            for distance, value in sorted(values.items())
        ]
        if not rows:
            return False
        with plot(path, self.command, size=(6.0, 3.4)) as (axes,):
            plots.strength(axes, rows, "clip_t", "CLIP-T", found.get(NO_CHANGE, {}).get(0.0))
            axes.legend()
        return True

    def _distances(self, path: Path) -> bool:
        rows = [
            {**facts, "method": STYLES.get(method, TITLES[method])}
            for method, found in self.findings.distances.items()
            if method in STYLES
            for facts in found.values()
        ]
        if not rows:
            return False
        with plot(path, self.command, columns=2, size=(10, 3.9)) as (transforms, weights):
            plots.transforms_by_rate(transforms, [row for row in rows if row["method"] in DISTANCES])
            plots.weights_by_rate(weights, rows)
            transforms.set_xlim(right=max(*DISTANCE_RATES, *(row["learning_rate"] for row in rows)) * 1.6)
        return True

    def _rates(self, path: Path) -> bool:
        grid = self.findings.grids["controllable"]
        names = [name for name in MIOU_BY_RATE if len(miou_by_rate(grid, name)) > 0]
        if not names:
            return False
        with plot(path, self.command, columns=2, size=(10, 3.6)) as (ours, paper):
            for name in names:
                curve = miou_by_rate(grid, name)
                values = [100 * curve[rate] for rate in sorted(curve)]
                ours.plot(sorted(curve), values, label=TITLES[name], **line_style(STYLES[name]))
                paper.plot(RATES, MIOU_BY_RATE[name], label=TITLES[name], **line_style(STYLES[name]))
            alone = self.findings.chosen["controllable"].get(self.config.controllable.base)
            if alone is not None:
                ours.axhline(100 * alone.score, color=FAINT, linestyle=":", linewidth=1, label="encoder only")
            ours.set_ylim(bottom=0)
            _named(ours, "here, the scenes that rates are chosen on", "mIoU, %")
            _named(paper, "the paper, SD 1.5 on ADE20K", "mIoU, %")
        return True

    def _subject_rates(self, path: Path) -> bool:
        grid = [one for one in self.findings.grids["dreambooth"] if one.step is None and one.scored]
        names = [name for name in self.config.dreambooth.methods if name != self.config.dreambooth.base]
        if not grid:
            return False
        with plot(path, self.command, columns=2, size=(10, 3.6)) as panels:
            for panel, metric in zip(panels, (LIKENESS, FAITHFULNESS), strict=True):
                for name in names:
                    points = {float(one.at(RATE) or 0): one.values[metric].mean for one in grid if one.method == name}
                    values = [points[rate] for rate in sorted(points)]
                    panel.plot(sorted(points), values, label=TITLES.get(name, name), **_style(name))
                base = next((one for one in grid if one.method == self.config.dreambooth.base), None)
                if base is not None:
                    value = base.values[metric].mean
                    panel.axhline(value, color=FAINT, linestyle=":", linewidth=1, label="base, untrained")
                _named(panel, f"{metric}, the subject that rates are chosen on", metric)
        return True

    def _steps(self, path: Path) -> bool:
        last = steps_of(self.config, "controllable")
        curves = {name: miou_by_step(self.findings, name) for name in MIOU_BY_RATE}
        if not any(len(curve) > 1 for curve in curves.values()):
            return False
        with plot(path, self.command, size=(6.0, 3.4)) as (axes,):
            for name, curve in curves.items():
                points = sorted((step or last or 0, 100 * value) for step, value in curve.items())
                xs, ys = [step for step, _ in points], [value for _, value in points]
                rate = self.findings.chosen["controllable"][name].rate if curve else None
                axes.plot(xs, ys, label=f"{TITLES[name]} at {rate:g}" if curve else None, **line_style(STYLES[name]))
            axes.set(xlabel="training step", ylabel="mIoU, %", ylim=(0, None))
            axes.set_title("each at its best rate")
            axes.legend()
        return True

    def _energy(self, path: Path) -> bool:
        rows = [
            {"run": method, "method": STYLES[method], "step": step, "mean_change": change}
            for method, changes in self.findings.energies.items()
            if method in STYLES
            for step, change in sorted(changes.items())
        ]
        if not rows:
            return False
        with plot(path, self.command, size=(6.4, 3.8)) as (axes,):
            plots.energy(axes, rows)
            axes.set_ylabel("change")
        return True

    def _subjects(self, path: Path) -> bool:
        """A row a method, some prompts of each subject; first the photos."""
        plan = Plan(self.config.tables(_cells(self.findings)))
        part, protocol = plan.subjects or (None, None)
        if part is None or protocol is None or not self.findings.subjects.results:
            return False
        shown = 2
        rows: list[tuple[str, list[Image.Image]]] = []
        for method in self.findings.subjects.results:
            images: list[Image.Image] = []
            for name in plan.names():
                folder = images_folder(plan, Unit("dreambooth", method, name))
                found = read_subject(protocol, folder, (), protocol.identifier)
                images += [Image.open(files[0]) for files in list(found.drawn.values())[1 : 1 + shown] if files]
            rows.append((TITLES.get(method, method), images))
        photos = [photos_of(name, part.dataset_dir)[k].open() for name in plan.names() for k in range(shown)]
        return _save_sheet([("photos of the subjects", photos), *rows], path)

    def _scenes(self, path: Path) -> bool:
        """A row a method, the first scenes; first their maps and the real pictures."""
        plan = Plan(self.config.tables(_cells(self.findings)))
        if not self.findings.maps.results:
            return False
        assert plan.maps is not None
        sources = pair_sources(plan.scenes, plan.maps[1].resolution)[:8]
        opened = [source.open() for source in sources]
        rows = [("maps", [one.condition for one in opened]), ("scenes", [one.photo for one in opened if one.photo])]
        for method in self.findings.maps.results:
            folder = images_folder(plan, Unit("controllable", method))
            rows.append((TITLES.get(method, method), [Image.open(folder / f"{one.file}.png") for one in sources]))
        return _save_sheet(rows, path)

    def _perturbed_images(self, path: Path) -> bool:
        rows: list[tuple[str, list[Image.Image]]] = []
        for kind, distance in perturbations(self.config):
            folder = perturbation_file(self.config, kind, distance).with_suffix("")
            if distance in self.findings.perturbed.get(kind, {}):
                title = "the base as it is" if kind == NO_CHANGE else f"{TITLES_OF_KINDS[kind]} at {distance:.3g}"
                rows.append((title, [Image.open(file) for file in sorted(folder.glob("*.png"))[:10]]))
        return _save_sheet(rows, path) if rows else False


TITLES_OF_KINDS = {"oft": "OFT", "ether": "ETHER", "ether_plus": "ETHER+"}


def _cells(findings: Findings) -> Mapping[str, Mapping[str, Any]]:
    return {task: {name: one.cell for name, one in found.items()} for task, found in findings.chosen.items()}


def _style(name: str) -> dict[str, Any]:
    return line_style(STYLES.get(name, TITLES.get(name, name)))


def _named(axes: Axes, title: str, label: str) -> None:
    axes.set(xscale="log", xlabel="learning rate", ylabel=label)
    axes.set_title(title)
    axes.legend()


def _save_sheet(rows: Iterable[tuple[str, list[Image.Image]]], path: Path) -> bool:
    page = sheet(list(rows), cell=64)
    save_png(page.quantize(COLOURS_OF_SHEETS, dither=Image.Dither.NONE), path.with_name(f"{path.name}.png"))
    return True
