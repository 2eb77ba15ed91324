"""`ether-diffusion analyze perturbation`: a frozen base under random transforms of growing distance (paper, Fig. 3)."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from .arguments import Commands, add_batch_size, add_command, add_device, positive

TINY, GUIDANCE = "tiny", 6.0
METHODS = ("oft", "ether", "ether_plus")
DISTANCES = (0.5, 1.0, 2**0.5, 2.0, 4.0, 8.0, 16.0)


def add_parser(commands: Commands, prog: str | None = None) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "perturbation",
        run,
        summary="images of a frozen base under random transforms (Fig. 3)",
        description="Put random transforms of growing distance from the identity on a frozen base, and measure what "
        "they do to its images (paper, Fig. 3). The miniature's images are scored by its scorers; of any other base "
        "(--base-model NAME --prompts FILE), only the images' distance is measured. Writes a table, plots, images and "
        "the command.",
        prog=prog,
    )
    add = parser.add_argument
    add("--base-model", default=TINY, metavar="NAME", help=f"default: {TINY}")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: captions of the miniature's world)")
    add("--count", type=positive, default=16, metavar="N", help="captions of the miniature's world (default: 16)")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        metavar="METHOD",
        help=f"default: {' '.join(METHODS)}",
    )
    add(
        "--distances",
        nargs="+",
        type=float,
        default=DISTANCES,
        metavar="X",
        help=f"those a method cannot have are left out (default: {' '.join(f'{x:.4g}' for x in DISTANCES)})",
    )
    add("--draws", type=positive, default=1, metavar="N", help="of random transforms, at each distance (default: 1)")
    add("--num-blocks", type=positive, metavar="N", help="default: the paper's: 4 for OFT, 1 for ETHER and ETHER+")
    add(
        "--target",
        nargs="+",
        default=["attention"],
        metavar="TARGET",
        help="a preset, or names of layers (default: attention)",
    )
    add("--steps", type=positive, default=20, metavar="N", help="sampling steps (default: 20)")
    add("--guidance", type=float, metavar="X", help=f"default: {GUIDANCE:g} for {TINY}, else 7.5")
    add_batch_size(parser, 8)
    add("--seed", type=int, default=0, metavar="N", help="of transforms and images (default: 0)")
    add_device(parser)
    add(
        "--output",
        type=Path,
        default=Path("runs/perturbation"),
        metavar="DIR",
        help="default: runs/perturbation",
    )


def run(arguments: Namespace) -> None:
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
