"""`ether-diffusion export`: a run's adapter as a file of other programs."""

from __future__ import annotations

from argparse import Namespace

from .arguments import Commands, add_parts, positive, strength, with_strength


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "export",
        run,
        "write an adapter for ComfyUI, A1111, InvokeAI, diffusers or PEFT",
        "Write an adapter for programs that do not know its method: as a LoRA, which ETHER and ETHER+ are "
        "exactly, or merged into the whole model. What was written is read back and compared. Of several adapters and "
        "LoRA files, each with its strength, the changes of the base's weights add up.",
    )
    parser.add_argument(
        "runs",
        nargs="*",
        type=with_strength,
        metavar="RUN[:S]",
        help="a run folder, a checkpoint folder, a PEFT folder, or USER/NAME of the hub, and its strength (default: 1)",
    )
    add_parts(parser, "the same as RUN")
    parser.add_argument(
        "--format",
        choices=("kohya", "diffusers", "peft", "merged"),
        help="kohya: one file that ComfyUI, A1111, InvokeAI and diffusers load (default for a file). diffusers: a "
        "folder for load_lora_weights (default for a folder). peft: a LoRA folder of PEFT. merged: the whole model, a "
        "folder of diffusers, or one file in the original Stable Diffusion layout",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE|DIR",
        help="NAME.safetensors for kohya, a new folder for diffusers and peft, either for merged",
    )
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16", help="default: fp16")
    parser.add_argument("--max-rank", type=positive, metavar="R", help="truncate each change to rank R")
    parser.add_argument("--scale", type=strength, default=1.0, metavar="S", help="factor of all strengths (default: 1)")
    parser.add_argument("--base", metavar="NAME|DIR|FILE", help="default: the base that the run was trained on")
    parser.add_argument(
        "--force-base", action="store_true", help="take --base although it is not what the run was trained on"
    )
    parser.add_argument(
        "--uncertified", action="store_true", help="export a run that failed its certificate, and may do nothing"
    )
    parser.add_argument("--allow-pickle", action="store_true", help="let a .ckpt base run code of its own")


def run(arguments: Namespace) -> None:
    """Write the files, and print what they hold.

    Raises:
        UserError, OSError: as `export`.
    """
    from ether_diffusion.errors import UserError
    from ether_diffusion.exporting import export

    parts = [*arguments.runs, *arguments.adapter, *arguments.lora]
    if not parts:
        raise UserError("export: give RUN, or --lora FILE.")
    alone, strength = parts[0] if len(parts) == 1 and not arguments.lora else (None, 1.0)
    done = export(
        alone or parts,
        arguments.format or ("kohya" if arguments.output.endswith(".safetensors") else "diffusers"),
        arguments.output,
        dtype=arguments.dtype,
        max_rank=arguments.max_rank,
        scale=arguments.scale * strength,
        base_model=arguments.base,
        allow_pickle=arguments.allow_pickle,
        force_base=arguments.force_base,
        uncertified=arguments.uncertified,
    )
    if done.ranks:
        ranks = f"rank {done.ranks[0]}" if len(done.ranks) == 1 else f"ranks {done.ranks[0]} to {done.ranks[-1]}"
        print(f"{done.layers} layers of {ranks}; they change the weights by {done.strength:.2g} of their norm")
        print(f"read back and compared: {done.error:.1e} off, relative")
    for note in done.notes:
        print(f"note: {note}")
    for file in done.files:
        print(file)
