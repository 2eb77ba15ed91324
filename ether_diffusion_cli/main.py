"""The console entry `ether-diffusion`: parses arguments, and only then imports what the command needs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

TASKS = {
    "dreambooth": "a few photos of a subject -> an adapter that draws it",
    "controllable": "pairs of image and condition -> an encoder and an adapter that follow the condition",
}

DATA_SETS = {
    "dreambooth": "DreamBooth's 30 subjects (158 photos, 112 MB)",
    "ade20k": "ADE20K's scene parsing set (22,210 images with label maps, 1 GB)",
}


def build_parser(script: str | None = None) -> argparse.ArgumentParser:
    """All commands and their options. Cheap: no import beyond the standard library.

    Args:
        script: The name to show in the usage of `train`, where a script stands for it.
    """
    parser = argparse.ArgumentParser(
        prog="ether-diffusion", description="Fine-tune Stable Diffusion with ETHER and ETHER+ adapters."
    )
    parser.add_argument("--version", action="store_true", help="print the version and leave")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    train = commands.add_parser("train", help="train an adapter", description="Train an adapter.")
    tasks = train.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, summary in TASKS.items():
        task = tasks.add_parser(name, prog=script, help=summary, description=f"{name}: {summary}.")
        task.add_argument(
            "--config",
            required=True,
            metavar="FILE",
            help=f"a YAML file, or a shipped config's name: quickstart/{name}",
        )
        task.add_argument("--print-config", action="store_true", help="print the resolved config and leave")
        task.add_argument(
            "--dry-run", action="store_true", help="check config and data, train one step, report memory, write nothing"
        )
        task.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="settings that replace the file's: training.steps=800",
        )

    draw = commands.add_parser(
        "generate",
        help="draw images from a saved adapter",
        description="Draw images from a saved adapter: PNGs with their settings inside, grid.png and images.jsonl. "
        "Complete files are kept on a rerun. No safety checker runs. A controllable run draws under conditions: of a "
        "data set (--dataset DIR --split validation), or your own (--condition FILE --prompt TEXT).",
    )
    draw.add_argument(
        "--adapter",
        metavar="RUN",
        help="a run folder, RUN/checkpoints/step-…, or a PEFT folder (default: none, with --base-model)",
    )
    draw.add_argument(
        "--base-model",
        metavar="NAME",
        help="default: the base that the adapter was trained on; without --adapter, the base alone draws",
    )
    draw.add_argument("--vae", metavar="NAME", help="default: the VAE that the adapter was trained with")
    draw.add_argument("--allow-pickle", action="store_true", help="let a .ckpt run code of its own while it is read")
    prompts = draw.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    draw.add_argument("--output", metavar="DIR", required=True, help="folder for the images")
    draw.add_argument("--num-images", type=_positive, default=1, metavar="N", help="images a prompt (default: 1)")
    draw.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="each image's seed is made of S, its prompt or condition, and its number (default: 0)",
    )
    draw.add_argument(
        "--scheduler",
        choices=("dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"),
        help="default: dpm++; ddim under conditions",
    )
    draw.add_argument("--steps", type=_positive, metavar="N", help="sampling steps (default: 25; 50 under conditions)")
    draw.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: 7.5; 9 under conditions)")
    draw.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the empty prompt)"
    )
    draw.add_argument(
        "--resolution",
        type=_positive,
        metavar="PIXELS",
        help="of a square's side, of a condition's short side (default: the base's own)",
    )
    draw.add_argument("--scale", type=float, default=1.0, metavar="X", help="strength of the adapter (default: 1)")
    draw.add_argument("--merge", action="store_true", help="write the adapter into the base's weights before drawing")
    draw.add_argument("--batch-size", type=_positive, default=1, metavar="N", help="images at a time (default: 1)")
    draw.add_argument("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    draw.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on cuda, else fp32")
    draw.add_argument(
        "--quantization",
        choices=("bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"),
        help="keep the UNet's linear layers in four or eight bits (default: no)",
    )
    draw.add_argument(
        "--offload",
        choices=("none", "model", "sequential"),
        default="none",
        help="keep what does not run on the CPU: whole models, or layers, which is slow (default: none)",
    )
    draw.add_argument(
        "--compare", action="store_true", help="draw each image from the base alone too: contact_sheet.png shows both"
    )

    under = draw.add_argument_group("under conditions", "What the images of a controllable run follow.")
    under.add_argument("--dataset", metavar="DIR", help="the conditions and captions of a data set, or builtin:scenes")
    under.add_argument("--split", metavar="NAME", help="of the data set (default: validation)")
    under.add_argument("--captions", metavar="PATH", help="JSON lines or text files (default: what the data set has)")
    under.add_argument("--caption-template", metavar="TEXT", help='for pairs without a caption: "a photo of a {scene}"')
    under.add_argument("--limit", type=_positive, metavar="N", help="so many pairs, the first by name (default: all)")
    under.add_argument(
        "--condition", metavar="PATH", help="a label map, a painted map or a photo, or a folder of them; with prompts"
    )
    under.add_argument(
        "--preprocessor",
        metavar="NAME",
        help="makes conditions of photos: canny, hed, …; none: they are conditions (default: as the run was trained)",
    )
    under.add_argument("--height", type=_positive, metavar="PIXELS", help="default: in the condition's proportions")
    under.add_argument("--width", type=_positive, metavar="PIXELS", help="default: in the condition's proportions")
    under.add_argument("--condition-scale", type=float, metavar="X", help="strength of the condition (default: 1)")
    under.add_argument(
        "--condition-start", type=float, metavar="X", help="share of the steps after which it is seen (default: 0)"
    )
    under.add_argument(
        "--condition-end",
        type=float,
        metavar="X",
        help="share of the steps after which it is seen no more (default: 1)",
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="score a run of the miniature",
        description="Score a run on the base `tiny` by the miniature's judges: draws ten prompts, or a hundred maps of "
        "a controllable run, before and after training; prints subject and prompt fidelity, or mIoU; writes images, "
        "contact_sheet.png and scores.json.",
    )
    evaluate.add_argument("--adapter", metavar="RUN", required=True, help="a run folder, or RUN/checkpoints/step-…")
    evaluate.add_argument("--output", metavar="DIR", help="default: RUN/evaluation, beside the adapter")
    evaluate.add_argument("--num-images", type=_positive, metavar="N", help="images a prompt (default: 2)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="of the images (default: 0)")

    report = commands.add_parser(
        "report",
        help="put runs and their scores into one file to look at",
        description="Write one HTML file that needs nothing but itself: settings, losses, images beside the real ones, "
        "scores with their intervals; several runs side by side. Or the tables of scores alone.",
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a results.json")
    report.add_argument(
        "--output",
        required=True,
        action="append",
        metavar="FILE",
        help="report.html; a name that ends in .csv, .md or .tex gets the tables alone; may be given several times",
    )

    _add_benchmark(commands, script)
    _add_data(commands)

    inspect = commands.add_parser(
        "inspect", help="tell what a saved adapter is", description="Tell what a saved adapter is, without its base."
    )
    inspect.add_argument("adapter", metavar="RUN", help="a run folder, a checkpoint folder, or a PEFT folder")
    return parser


def _add_benchmark(commands: Any, script: str | None) -> None:
    benchmark = commands.add_parser(
        "benchmark",
        prog=script,
        help="train, draw and score methods on subjects or maps: a table",
        description="For each method and subject train, draw and score, then put the methods into a table. What is "
        "done is kept: the same command goes on with what was stopped. Any number of workers gives the same numbers.",
    )
    grid = commands.add_parser(
        "grid",
        prog=script,
        help="a benchmark along learning rates, blocks or other settings, and seeds: tables and plots",
        description="Train, draw and score methods at every point of a grid, with several seeds; then write tables and "
        "plots. As `benchmark`, it goes on with what was stopped and can be shared out.",
    )
    _add_runner(benchmark, "benchmark/tinyworld")
    _add_runner(grid, "benchmark/rates_tinyworld")


def _add_runner(command: argparse.ArgumentParser, example: str) -> None:
    add = command.add_argument
    add("--config", required=True, metavar="FILE", help=f"a YAML file, or a shipped config's name: {example}")
    add("--shard", type=_share, default=(1, 1), metavar="I/N", help="do the I-th of N shares, as in a SLURM array")
    add("--executor", choices=("local", "ray"), default="local", help="one after another here (default), or by Ray")
    add("--ray-address", metavar="ADDRESS", help="of a cluster; auto: this machine's (default: this machine alone)")
    add("--workers", type=_positive, metavar="N", help="of Ray, at once (default: one a GPU, or one a core)")
    add("--retries", type=_positive, default=3, metavar="N", help="of a unit whose workers were lost (default: 3)")
    add("--status", action="store_true", help="tell how far everything is, and leave")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")


def _add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="check a folder of images and conditions, caption its images, fetch the paper's data sets",
        description="What belongs to the data that is trained on.",
    )
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="count what a training would stumble over",
        description="Read every file of a data set: missing pairs, damaged files, labels out of range, colours off the "
        "palette, maps as JPEG, sizes that differ, empty captions. Exit code: 0 clean, 2 faults.",
    )
    caption = actions.add_parser(
        "caption",
        help="caption images with a BLIP model",
        description="Write FOLDER/captions/SPLIT.jsonl, a line an image. An interrupted call is resumed by the next.",
    )
    for name, what in DATA_SETS.items():
        fetch = actions.add_parser(
            name,
            help=f"fetch {what}",
            description=f"Fetch {what}, and unpack it into DIR. A call that was interrupted is resumed by the next; "
            "what is there already is kept. Without a network it says what to fetch by hand, and where to put it.",
        )
        fetch.add_argument("--to", required=True, metavar="DIR", help="the folder that holds the data set's own folder")
    for action in (check, caption):
        action.add_argument("folder", metavar="FOLDER", help="as data.dataset_dir of a config; or builtin:scenes")
    check.add_argument("--split", metavar="NAME", help="default: all")
    check.add_argument(
        "--condition", metavar="KIND", default="auto", help="auto, labels, image, or a preprocessor (default: auto)"
    )
    check.add_argument("--captions", metavar="PATH", help="JSON lines or text files (default: what the data set has)")
    check.add_argument("--sheet", metavar="FILE", help="a PNG of a few pairs: image, condition, one over the other")
    caption.add_argument("--split", metavar="NAME", default="training", help="default: training")
    caption.add_argument("--model", metavar="NAME", help="a BLIP captioning model of the hub, or a folder")
    caption.add_argument("--start", metavar="TEXT", default="", help="words that each caption begins with")
    caption.add_argument("--output", metavar="FILE", help="default: FOLDER/captions/SPLIT.jsonl")
    caption.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at a time (default: 8)")
    caption.add_argument("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    caption.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: fp16 on cuda, else fp32")


def main(argv: Sequence[str] | None = None, script: str | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 bad input, 1 failed, 130 / 143 interrupted after a checkpoint."""
    parser = build_parser(script)
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if arguments.command in ("train", "benchmark", "grid"):
        # Overrides may stand between options, and other programs' flags get an answer from the config's own checks.
        arguments.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if arguments.version:
        from importlib.metadata import version

        print(f"ether-diffusion {version('ether-diffusion')}")
        return 0
    if arguments.command is None:
        parser.print_help()
        return 0

    if os.environ.get("ETHER_DIFFUSION_VERBOSE") != "1":
        # PEFT, which the next import imports, imports these where they are installed, and they warn while they load.
        for name in ("bitsandbytes", "torch.utils._pytree", "torchao"):
            logging.getLogger(name).setLevel(logging.ERROR)

    from ether_diffusion_cli import commands

    return commands.run(arguments)


def _share(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with I from 1 to N, such as 3/30")
    return int(number), int(count)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
