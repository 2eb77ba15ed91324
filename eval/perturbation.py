"""How much a frozen base bears: random transforms of growing distance, images and scores (paper, Fig. 3).

python eval/perturbation.py                                           # the miniature, scored by its judges
python eval/perturbation.py --base-model NAME --prompts FILE          # any base; the images' distance alone
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.adapters.targets import check_targets, target_modules  # noqa: E402
from ether_diffusion.analysis import plots  # noqa: E402
from ether_diffusion.analysis.output import check_matplotlib, command_line, plot, write_command, write_table  # noqa: E402
from ether_diffusion.analysis.perturbation import PERTURBATIONS  # noqa: E402
from ether_diffusion.analysis.sweep import plan, scores, sweep  # noqa: E402
from ether_diffusion.errors import exit_code  # noqa: E402
from ether_diffusion.ether import EtherConfig  # noqa: E402
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, read_prompts, sample_images  # noqa: E402
from ether_diffusion.models.bases import TINY  # noqa: E402
from ether_diffusion.progress import progress_bar  # noqa: E402
from ether_diffusion.tinyworld.figures import GUIDANCE, fresh_scenes, named  # noqa: E402
from ether_diffusion.tinyworld.scoring import load_scorers  # noqa: E402

DISTANCES = (0.5, 1.0, 2**0.5, 2.0, 4.0, 8.0, 16.0)
EXAMPLES = 2  # prompts in the grid


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-model", default=TINY, metavar="NAME", help=f"default: {TINY}")
    add("--prompts", type=Path, metavar="FILE", help="one a line (default: captions of the miniature's world)")
    add("--count", type=int, default=16, metavar="N", help="captions of the miniature's world (default: 16)")
    add("--methods", nargs="+", choices=list(PERTURBATIONS), default=list(PERTURBATIONS), metavar="METHOD")
    add("--distances", nargs="+", type=float, default=DISTANCES, metavar="X", help="those that a method can have")
    add("--draws", type=int, default=1, metavar="N", help="of random transforms, at every distance (default: 1)")
    add("--num-blocks", type=int, metavar="N", help="default: OFT's 4, ETHER's 1, as the paper has them")
    add("--target", nargs="+", default=["attention"], metavar="TARGET", help="a preset, or names of layers")
    add("--steps", type=int, default=20, metavar="N", help="of the sampler (default: 20)")
    add("--guidance", type=float, metavar="X", help=f"default: {GUIDANCE:g} for {TINY}, else 7.5")
    add("--batch-size", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--seed", type=int, default=0, metavar="N")
    add("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    add("--output", type=Path, default=Path("runs/perturbation"), metavar="DIR")
    arguments = parser.parse_args()
    if arguments.base_model != TINY and arguments.prompts is None:
        parser.error("a base other than the miniature needs --prompts")
    return arguments


def measure(arguments: argparse.Namespace, command: str) -> list[dict]:
    """Draw, score and write everything; the rows of the table, the base's own first."""
    check_matplotlib()
    if arguments.prompts is None:
        scenes, texts = fresh_scenes(arguments.count, "train")
        wanted = [named(scene, text) for scene, text in zip(scenes, texts, strict=True)]
        judges = load_scorers()
    else:
        texts, wanted, judges = read_prompts(arguments.prompts), [], None
    pipeline, _ = load_pipeline(base_model=arguments.base_model, device=arguments.device)
    target = arguments.target[0] if len(arguments.target) == 1 else arguments.target
    layers = check_targets(pipeline.unet, EtherConfig(target_modules=target_modules(target)), target)
    options = {"draws": arguments.draws, "num_blocks": arguments.num_blocks}
    trials = plan(pipeline.unet, layers, arguments.methods, arguments.distances, **options)
    guidance = arguments.guidance or (GUIDANCE if arguments.base_model == TINY else 7.5)
    sampling, jobs = Sampling(steps=arguments.steps, guidance=guidance), jobs_for(texts, 1)

    def images() -> list[Image.Image]:
        drawn = sample_images(pipeline, jobs, sampling, seed=arguments.seed, batch_size=arguments.batch_size)
        return [image for _, image in drawn]

    base = images()
    facts = {"method": "base", "num_blocks": 0, "distance": 0.0, "k": 0, "images": len(base)}
    rows: list[dict] = [{**facts, **scores(base, base, judges, wanted)}]
    shown: dict[tuple[int, str], dict[float, Image.Image]] = {}
    with progress_bar(len(trials), "perturbations", "trial") as bar:
        for trial, drawn in sweep(pipeline.unet, layers, trials, images, arguments.seed):
            facts = {"method": trial.title, "num_blocks": trial.num_blocks, "distance": trial.distance, "k": trial.k}
            rows.append({**facts, "images": len(drawn), **scores(drawn, base, judges, wanted)})
            for example in range(min(EXAMPLES, len(drawn)) if trial.k == 0 else 0):
                shown.setdefault((example, trial.title), {0.0: base[example]})[trial.distance] = drawn[example]
            bar.update()
    write_command(arguments.output, command)
    write_table(arguments.output / "perturbation.csv", rows)
    write(arguments.output, command, rows, shown)
    return rows


def write(output: Path, command: str, rows: list[dict], shown: dict[tuple[int, str], dict[float, Image.Image]]) -> None:
    """The grid of images and the plot of scores."""
    perturbations, base = rows[1:], rows[0]
    distances = sorted({row["distance"] for row in perturbations})
    labelled = [(title, images) for (_, title), images in sorted(shown.items(), key=lambda item: item[0][0])]
    cells = {"rows": len(labelled), "columns": len(distances) + 1}
    size = (0.5 + 1.05 * cells["columns"], 0.4 + 1.05 * cells["rows"])
    with plot(output / "grid", command, **cells, size=size) as axes:
        plots.grid(axes, labelled, distances)
    panels = {"recognised": "named things that the judges recognise, share", "pixels": "RMS difference of pixels"}
    panels = {name: label for name, label in panels.items() if name in base}
    with plot(output / "perturbation", command, columns=len(panels), size=(5 * len(panels), 4.4)) as axes:
        for one, (name, label) in zip(axes, panels.items(), strict=True):
            plots.strength(one, perturbations, name, label, base[name] if name == "recognised" else None)
            one.set_ylim(bottom=0)
        axes[0].set_title("What is left under random transforms" if "recognised" in base else "")
        axes[-1].set_title("How far images are from the base's own")
        plots.legend_below(axes[0])


def main() -> None:
    """Measure, write and print."""
    arguments = parse()
    rows = measure(arguments, command_line("eval/perturbation.py", sys.argv[1:]))
    for row in rows:
        recognised = f"   recognised {row['recognised']:.3f}" if "recognised" in row else ""
        print(f"{row['method']:<8} |T - I| {row['distance']:<8.4g} pixels {row['pixels']:.3f}{recognised}")
    print(f"Table, plot and images: {arguments.output}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/perturbation.py", main))
