"""`ether-diffusion evaluate`: a quick look at a run of the miniature, before and after training."""

from __future__ import annotations

from argparse import Namespace

from .arguments import Commands, add_run, positive, seed


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "evaluate",
        run,
        "take a quick look at a run of the miniature, before and after training",
        "Score a run on the base `tiny` with the miniature's scorers: generates images of ten prompts, or "
        "of a hundred label maps of a controllable run, before and after training; prints subject and prompt fidelity, "
        "or mIoU; writes images, contact_sheet.png and scores.json. To compare methods, see `score`.",
    )
    add_run(parser, "a run folder, or RUN/checkpoints/step-…")
    parser.add_argument("--output", metavar="DIR", help="default: RUN/evaluation, beside the adapter")
    parser.add_argument("--num-images", type=positive, metavar="N", help="images per prompt (default: 2)")
    parser.add_argument("--split", metavar="NAME", help="of a controllable run's data set (default: validation)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="of the images (default: 0)")


def run(arguments: Namespace) -> None:
    """Generate, score, write and print. Raises UserError as `evaluate` and `evaluate_maps`."""
    from ether_diffusion.errors import UserError
    from ether_diffusion.evaluation.quick_look import IMAGES_PER_PROMPT, SPLIT, evaluate, evaluate_maps
    from ether_diffusion.generation import read_run

    saved = read_run(arguments.adapter)
    if saved.condition_encoder is None:
        if arguments.split is not None:
            raise UserError(f"--split {arguments.split}: a run of a subject has no splits.")
        output = arguments.output or saved.trained.folder.parent / "evaluation"
        number = arguments.num_images or IMAGES_PER_PROMPT
        result = evaluate(saved, output, images_per_prompt=number, seed=arguments.seed)
    else:
        if arguments.num_images is not None:
            raise UserError(f"--num-images {arguments.num_images}: a controllable run gets one image per map.")
        split = arguments.split or SPLIT
        name = "evaluation" if split == SPLIT else f"evaluation-{split}"
        output = arguments.output or saved.condition_encoder.parent / name
        result = evaluate_maps(saved, output, seed=arguments.seed, split=split)
    print(result.table())
    print(f"Contact sheet: {result.contact_sheet}\nScores: {result.contact_sheet.with_name('scores.json')}")
