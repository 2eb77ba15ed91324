"""The console entry `ether-diffusion`: parses arguments, and only then imports what the command needs."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

TASKS = {"dreambooth": "a few photos of a subject -> an adapter that draws it"}


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
            help="a YAML file, or a shipped config's name: quickstart/dreambooth",
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
        "Complete files are kept on a rerun. No safety checker runs.",
    )
    draw.add_argument("--adapter", metavar="RUN", help="a run folder, RUN/checkpoints/step-…, or a PEFT folder")
    draw.add_argument("--base-model", metavar="NAME", help="default: the base that the adapter was trained on")
    draw.add_argument("--vae", metavar="NAME", help="default: the VAE that the adapter was trained with")
    draw.add_argument("--allow-pickle", action="store_true", help="let a .ckpt run code of its own while it is read")
    prompts = draw.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    draw.add_argument("--output", metavar="DIR", required=True, help="folder for the images")
    draw.add_argument("--num-images", type=_positive, default=1, metavar="N", help="images a prompt (default: 1)")
    draw.add_argument(
        "--seed", type=int, default=0, metavar="S", help="each image's seed is made of S, prompt and number"
    )
    draw.add_argument(
        "--scheduler", choices=("dpm++", "ddim", "ddpm", "euler", "euler_a", "pndm", "unipc"), default="dpm++"
    )
    draw.add_argument("--steps", type=_positive, default=25, metavar="N", help="sampling steps (default: 25)")
    draw.add_argument("--guidance", type=float, default=7.5, metavar="G", help="guidance scale (default: 7.5)")
    draw.add_argument("--negative-prompt", default="", metavar="TEXT")
    draw.add_argument("--resolution", type=_positive, metavar="PIXELS", help="default: the base's own")
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

    evaluate = commands.add_parser(
        "evaluate",
        help="score a run of the miniature",
        description="Score a run on the base `tiny` by the miniature's judges: draws ten prompts before and after "
        "training, prints subject and prompt fidelity, writes images, contact_sheet.png and scores.json.",
    )
    evaluate.add_argument("--adapter", metavar="RUN", required=True, help="a run folder, or RUN/checkpoints/step-…")
    evaluate.add_argument("--output", metavar="DIR", help="default: RUN/evaluation, beside the adapter")
    evaluate.add_argument("--num-images", type=_positive, default=2, metavar="N", help="images a prompt (default: 2)")
    evaluate.add_argument("--seed", type=int, default=0, metavar="S", help="of the images (default: 0)")

    inspect = commands.add_parser(
        "inspect", help="tell what a saved adapter is", description="Tell what a saved adapter is, without its base."
    )
    inspect.add_argument("adapter", metavar="RUN", help="a run folder, a checkpoint folder, or a PEFT folder")
    return parser


def main(argv: Sequence[str] | None = None, script: str | None = None) -> int:
    """Run a command. Exit codes: 0 done, 2 bad input, 1 failed, 130 / 143 interrupted after a checkpoint."""
    parser = build_parser(script)
    arguments, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if arguments.command == "train":
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

    from ether_diffusion import commands

    return commands.run(arguments)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return number


if __name__ == "__main__":
    sys.exit(main())
