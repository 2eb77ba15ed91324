"""The miniature paper's figures: curves next to the paper's, and sheets of images, as small files next to the page."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ether_diffusion.analysis import plots
from ether_diffusion.analysis.output import FAINT, line_style, plot
from ether_diffusion.analysis.published import DISTANCE_RATES, DISTANCES, MIOU_BY_RATE, MIOU_RATES, TABLE_3
from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.evaluation.intervals import Estimate
from ether_diffusion.evaluation.subject_images import photos_of, read_subject
from ether_diffusion.generation import pair_sources
from ether_diffusion.pictures import save_png, sheet

from .analyses import NO_CHANGE
from .best_rates import PROMPT, SUBJECT, cells_of
from .config import RATE, STYLES, TITLES, PaperConfig
from .gains import best_of
from .paper_findings import Findings, perturbation_file, perturbations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS_OF_SHEETS = 128
"""The size of a sheet's palette: small images lose little."""


class Figures:
    """Plots into `output_dir`/figures, and copies the files to the page's folder.

    Args:
        command: For the files' metadata.
    """

    def __init__(self, config: PaperConfig, findings: Findings, command: str) -> None:
        self.config, self.findings, self.command = config, findings, command
        self.folder = config.page.with_suffix("")

    def plot_all(self) -> dict[str, Path]:
        """Plot every figure that has data: the files in the page's folder, by name."""
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
                self.folder.mkdir(parents=True, exist_ok=True)
                found[name] = Path(shutil.copyfile(path.with_name(f"{name}.png"), self.folder / f"{name}.png"))
        return found

    def _strength(self, path: Path) -> bool:
        found = self.findings.perturbed
        rows = [
            {"method": STYLES[kind], "distance": distance, "clip_t": value}
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
        found = {name: self.findings.trainings.get(name, ()) for name in MIOU_BY_RATE}
        if not any(one.end is not None for trainings in found.values() for one in trainings):
            return False
        with plot(path, self.command, columns=2, size=(10, 3.6)) as (ours, paper):
            for name, trainings in found.items():
                points = {one.rate or 0: one.end for one in trainings if one.end is not None}
                _curve(ours, points, TITLES[name], line_style(STYLES[name]))
                lost = [one.rate or 0 for one in trainings if one.diverged]
                _crosses(ours, lost, STYLES[name], list(found).index(name))
                paper.plot(MIOU_RATES, MIOU_BY_RATE[name], label=TITLES[name], **line_style(STYLES[name]))
            if self.findings.alone is not None:
                _level(ours, 100 * self.findings.alone.value, "encoder only")
            _level(paper, TABLE_3["none"]["mIoU"], "encoder only")
            ours.set_ylim(bottom=0)
            _named(ours, "here, on the scenes that choose rates", "mIoU, %")
            _named(paper, "the paper, SD 1.5 on ADE20K", "mIoU, %")
        return True

    def _subject_rates(self, path: Path) -> bool:
        grid = [one for one in self.findings.grids["dreambooth"] if one.step is None]
        names = [name for name in self.config.dreambooth.methods if name != self.config.dreambooth.base]
        if not any(one.scored for one in grid):
            return False
        with plot(path, self.command, columns=2, size=(10, 3.6)) as panels:
            for panel, metric in zip(panels, (SUBJECT, PROMPT), strict=True):
                for name in names:
                    own = [one for one in grid if one.method == name]
                    points = {float(one.at(RATE) or 0): one.values[metric].mean for one in own if one.scored}
                    values = [points[rate] for rate in sorted(points)]
                    title = TITLES.get(name, name)
                    panel.plot(sorted(points), values, label=title, **line_style(STYLES.get(name, title)))
                    lost = [float(one.at(RATE) or 0) for one in own if one.diverged]
                    _crosses(panel, lost, STYLES.get(name, title), names.index(name))
                base = next((one for one in grid if one.method == self.config.dreambooth.base and one.scored), None)
                if base is not None:
                    _level(panel, base.values[metric].mean, "base, untrained")
                _named(panel, f"{metric} of the subject that chooses rates", metric)
        return True

    def _steps(self, path: Path) -> bool:
        last = self.findings.map_steps or 0
        found = {name: self.findings.trainings.get(name, ()) for name in MIOU_BY_RATE}
        if not any(len(one.miou) > 1 for trainings in found.values() for one in trainings):
            return False
        import matplotlib

        with plot(path, self.command, columns=2, size=(10, 3.6), sharey=True) as (best, plus):
            for name, trainings in found.items():
                chosen = best_of(trainings)
                if chosen is not None:
                    title = f"{TITLES[name]} at {chosen.rate or 0:g}"
                    _curve(best, chosen.by_step(last), title, line_style(STYLES[name]))
            trainings = found["ether_plus"]
            colours = matplotlib.colormaps["viridis"].resampled(max(len(trainings), 2) + 1)
            for number, one in enumerate(trainings):
                style = {"color": colours(number), "marker": "o"}
                if one.diverged:
                    plus.plot([], [], "x", label=f"{one.rate or 0:g}, diverged", color=style["color"])
                elif one.miou:
                    _curve(plus, one.by_step(last), f"{one.rate or 0:g}", style)
            for panel, title in ((best, "each at its best rate"), (plus, "ETHER+ at each rate")):
                if self.findings.alone is not None:
                    _level(panel, 100 * self.findings.alone.value, "encoder only, at its end")
                panel.set(xlabel="training step", ylabel="mIoU, %", ylim=(0, None))
                panel.set_title(title)
                panel.legend()
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
        """A row for each method with two prompts of each subject; first a row of photos."""
        if not self.findings.subjects.results:
            return False
        plan = Plan(self.config.tables(cells_of(self.findings.chosen)))
        assert plan.subjects is not None
        part, protocol = plan.subjects
        shown = 2
        rows: list[tuple[str, list[Image.Image]]] = []
        for method in self.findings.subjects.results:
            images: list[Image.Image] = []
            for name in plan.names():
                folder = plan.images_folder(Unit("dreambooth", method, name))
                found = read_subject(protocol, folder, (), protocol.identifier)
                images += [Image.open(files[0]) for files in list(found.files.values())[1 : 1 + shown] if files]
            rows.append((TITLES.get(method, method), images))
        photos = [photos_of(name, part.dataset_dir)[k].open() for name in plan.names() for k in range(shown)]
        return _save_sheet([("photos of the subjects", photos), *rows], path)

    def _scenes(self, path: Path) -> bool:
        """A row for each method with the first scenes; first rows of their maps and real images."""
        if not self.findings.maps.results:
            return False
        plan = Plan(self.config.tables(cells_of(self.findings.chosen)))
        assert plan.maps is not None
        sources = pair_sources(plan.scenes, plan.maps[1].resolution)[:8]
        opened = [source.open() for source in sources]
        rows = [("maps", [one.condition for one in opened]), ("scenes", [one.photo for one in opened if one.photo])]
        for method in self.findings.maps.results:
            folder = plan.images_folder(Unit("controllable", method))
            rows.append((TITLES.get(method, method), [Image.open(folder / f"{one.file}.png") for one in sources]))
        return _save_sheet(rows, path)

    def _perturbed_images(self, path: Path) -> bool:
        rows: list[tuple[str, list[Image.Image]]] = []
        for kind, distance in perturbations(self.config):
            folder = perturbation_file(self.config, kind, distance).with_suffix("")
            if distance in self.findings.perturbed.get(kind, {}):
                title = "the unperturbed base" if kind == NO_CHANGE else f"{STYLES[kind]} at {distance:.3g}"
                rows.append((title, [Image.open(file) for file in sorted(folder.glob("*.png"))[:10]]))
        return _save_sheet(rows, path) if rows else False


def _curve(
    axes: Axes, points: Mapping[float, Estimate] | Mapping[int, Estimate], label: str, style: Mapping[str, Any]
) -> None:
    """Plot a curve in percent, with the interval as a band."""
    found = sorted(points.items())
    xs, spans = [x for x, _ in found], [one.interval() for _, one in found]
    axes.plot(xs, [100 * span.value for span in spans], label=label, **style)
    low, high = [100 * span.low for span in spans], [100 * span.high for span in spans]
    axes.fill_between(xs, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _level(axes: Axes, value: float, label: str) -> None:
    """A dotted horizontal line."""
    axes.axhline(value, color=FAINT, linestyle=":", linewidth=1, label=label)


def _crosses(axes: Axes, rates: Sequence[float], title: str, place: int) -> None:
    """Mark the rates of diverged trainings at the bottom; methods one above the other."""
    colour, heights = line_style(title)["color"], [0.02 + 0.035 * place] * len(rates)
    axes.plot(rates, heights, "x", color=colour, transform=axes.get_xaxis_transform())


def _named(axes: Axes, title: str, label: str) -> None:
    axes.set(xscale="log", xlabel="learning rate", ylabel=label)
    axes.set_title(title)
    axes.legend()


def _save_sheet(rows: Iterable[tuple[str, list[Image.Image]]], path: Path) -> bool:
    page = sheet(list(rows), cell=64)
    save_png(page.quantize(COLOURS_OF_SHEETS, dither=Image.Dither.NONE), path.with_name(f"{path.name}.png"))
    return True
