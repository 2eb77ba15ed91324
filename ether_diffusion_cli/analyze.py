"""`ether-diffusion analyze`: what adapters do to a base, and what they cost: the tables and plots of the paper."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from .arguments import Commands, add_batch_size, add_device, amount, count, positive, seed

CHUNK = 512
TOKENS, LATENTS = 512, 64
TINY, GUIDANCE = "tiny", 6.0
METHODS = ("oft", "ether", "ether_plus", "ether_authors", "ether_plus_authors")
DEFAULT_METHODS = METHODS[:3]
DISTANCES = (0.5, 1.0, 2**0.5, 2.0, 4.0, 8.0, 16.0)


def add_parser(commands: Commands) -> None:
    analyses = commands.group(
        "analyze",
        "ANALYSIS",
        "measure what adapters do to a base: tables and plots of the paper's figures",
        "Measure what adapters do to a base, and what they cost. Each analysis writes tables (CSV), plots (PNG and "
        "SVG) and the command that makes them again.",
    )
    for add_analysis in (_add_geometry, _add_energy, _add_perturbation, _add_cost):
        add_analysis(analyses)


def _add_geometry(analyses: Commands) -> None:
    parser = analyses.add(
        "geometry",
        run_geometry,
        "distances of transforms from the identity, and of weights from the base's (Fig. 4)",
        "Measure |T - I| of every transform and |W' - W| of every layer of trained adapters (paper, Fig. 4). Writes a "
        "row a run and a row a layer, plots, and the command.",
    )
    _add_output(parser, "geometry")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run, checkpoint or PEFT folders")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the double precision (default: cpu)")


def _add_energy(analyses: Commands) -> None:
    parser = analyses.add(
        "energy",
        run_energy,
        "change of the hyperspherical energy over a training (Fig. 7)",
        "Measure the hyperspherical energy of the adapted layers at every checkpoint of runs (paper, Fig. 7). Writes a "
        "row a checkpoint and a row a layer of each, a plot, and the command.",
    )
    _add_output(parser, "energy")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders with checkpoints")
    parser.add_argument("--chunk", type=positive, default=CHUNK, metavar="N", help=f"rows at a time (default: {CHUNK})")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="of the double precision (default: cpu)")


def _add_perturbation(analyses: Commands) -> None:
    parser = analyses.add(
        "perturbation",
        run_perturbation,
        "images of a frozen base under random transforms (Fig. 3)",
        "Put random transforms of growing distance from the identity on a frozen base, and measure what they do to its "
        "images (paper, Fig. 3). The miniature's images are scored by its scorers; of any other base (--base-model "
        "NAME --prompts FILE), only the images' distance is measured. Writes a table, plots, images and the command.",
    )
    _add_output(parser, "perturbation")
    distances, methods = " ".join(f"{x:.4g}" for x in DISTANCES), " ".join(DEFAULT_METHODS)
    add = parser.add_argument
    add("--base-model", default=TINY, metavar="NAME", help=f"default: {TINY}")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: captions of the miniature's world)")
    add("--count", type=positive, default=16, metavar="N", help="captions of the miniature's world (default: 16)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"also ether_authors, ether_plus_authors: several blocks as in the authors' code (default: {methods})",
    )
    add(
        "--distances",
        nargs="+",
        type=amount,
        default=DISTANCES,
        metavar="X",
        help=f"those a method cannot have are left out (default: {distances})",
    )
    add("--draws", type=positive, default=1, metavar="N", help="of random transforms, at each distance (default: 1)")
    blocks = "default: the paper's, 4 for OFT, 1 for ETHER and ETHER+; 4 for the authors' code"
    add("--num-blocks", type=positive, metavar="N", help=blocks)
    target = "a preset, or names of layers (default: attention)"
    add("--target", nargs="+", default=["attention"], metavar="TARGET", help=target)
    add("--steps", type=count, default=20, metavar="N", help="sampling steps (default: 20)")
    add("--guidance", type=amount, metavar="X", help=f"default: {GUIDANCE:g} for {TINY}, else 7.5")
    add("--seed", type=seed, default=0, metavar="N", help="of transforms and images (default: 0)")
    add_batch_size(parser, 8)
    add_device(parser)


def _add_cost(analyses: Commands) -> None:
    parser = analyses.add(
        "cost",
        run_cost,
        "FLOPs of a forward and a backward pass with each method (Table 1)",
        "Count the FLOPs of a forward and a backward pass with each method (paper, Table 1), on tensors without "
        "memory. Writes a table, a plot and the command.",
    )
    _add_output(parser, "cost")
    tokens = f"in the language models' input (default: {TOKENS})"
    latents = f"side of the UNet's latents, a multiple of 8 (default: {LATENTS}, for 512 pixels)"
    parser.add_argument("models", nargs="*", metavar="MODEL", help="phi, llama, unet (default: all)")
    parser.add_argument("--tokens", type=positive, default=TOKENS, metavar="N", help=tokens)
    parser.add_argument("--latents", type=positive, default=LATENTS, metavar="N", help=latents)


def _add_output(parser: ArgumentParser, name: str) -> None:
    folder = Path("runs") / name
    parser.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"default: {folder}")


def run_geometry(arguments: Namespace) -> None:
    """Measure, write and print. Raises UserError as `write_distances`."""
    from ether_diffusion.analysis.analysed_run import labels
    from ether_diffusion.analysis.geometry import write_distances
    from ether_diffusion.generation import pick_device

    device = str(pick_device(arguments.device))
    rows = write_distances(arguments.runs, arguments.output, arguments.typed, device)
    names = labels(rows)
    width = max(map(len, names))
    for row, name in zip(rows, names, strict=True):
        print(f"{row['run']:<32} {name:<{width}} |T - I| {row['transform']:8.4g}   |W' - W| {row['weight']:8.4g}")
    print(f"Table and plots: {arguments.output}")


def run_energy(arguments: Namespace) -> None:
    """Measure, write and print. Raises UserError as `write_energies`."""
    from ether_diffusion.analysis.energy import write_energies
    from ether_diffusion.generation import pick_device

    device = str(pick_device(arguments.device))
    rows = write_energies(arguments.runs, arguments.output, arguments.typed, arguments.chunk, device)
    for row in rows:
        print(f"{row['run']:<32} {row['method']:<8} step {row['step']:<6} change {row['mean_change']:+.3e}")
    print(f"Table and plot: {arguments.output}")


def run_perturbation(arguments: Namespace) -> None:
    """Generate, score, write and print.

    Raises:
        UserError: another base than the miniature without prompts; or as `write_perturbations`.
    """
    import dataclasses

    from ether_diffusion.analysis.perturbation_report import Perturbations, write_perturbations
    from ether_diffusion.errors import UserError
    from ether_diffusion.generation import read_prompts

    if arguments.base_model != TINY and arguments.prompts is None:
        raise UserError(f"--base-model {arguments.base_model}: a base other than {TINY} needs --prompts FILE.")
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Perturbations)}
    given["prompts"] = read_prompts(arguments.prompts) if arguments.prompts is not None else None
    rows = write_perturbations(Perturbations(**given), arguments.output, arguments.typed)
    for row in rows:
        recognised = f"   recognised {row['recognised']:.3f}" if "recognised" in row else ""
        print(f"{row['method']:<8} |T - I| {row['distance']:<8.4g} pixels {row['pixels']:.3f}{recognised}")
    print(f"Table, plot and images: {arguments.output}")


def run_cost(arguments: Namespace) -> None:
    """Count, write and print. Raises UserError: an unknown model, or a size that the UNet does not halve evenly."""
    from ether_diffusion.analysis.cost_report import subjects, write_costs
    from ether_diffusion.errors import UserError, did_you_mean

    if arguments.latents % 8 or arguments.latents > 4096:
        raise UserError(f"--latents {arguments.latents}: expected a multiple of 8, at most 4,096.")
    known = subjects(arguments.tokens, arguments.latents)
    for name in arguments.models:
        if name not in known:
            raise UserError(f"{name!r}: no such model.{did_you_mean(name, known)} Expected {', '.join(known)}.")
    chosen = {key: subject for key, subject in known.items() if not arguments.models or key in arguments.models}
    print(write_costs(chosen, arguments.output, arguments.typed), end="")
    print(f"Table and plots: {arguments.output}")
