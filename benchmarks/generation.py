"""Images a second with an adapter, merged and unmerged, as ratios over the base's.

    python benchmarks/generation.py [--base tiny] [--steps 20] [--batches 1 4] [--rounds 3] [--write]
    python benchmarks/generation.py --base sd15 --device cuda --dtype bf16 --size 512

One process holds all pipelines and takes them in turn, so that a slow minute of the machine affects all of them. CPU
seconds are those of the process, which other work hardly changes. `sd15` has random weights: the numbers do not depend
on their values. One prompt, guidance on; text encoder and decoder are included. Ratios
are medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

ADAPTERS = ("ether", "ether_plus", "lora")


def main() -> None:
    """Print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", choices=("tiny", "sd15"))
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default: 64)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md too")
    arguments = parser.parse_args()
    from performance_page import command, publish

    pipeline, unets = networks(arguments)
    tables = [table(pipeline, unets, batch, arguments) for batch in arguments.batches]
    publish("generation", "\n\n".join([f"`{command()}`", *tables]), arguments.write)


def networks(arguments: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and its UNet plain, with each adapter, and with ETHER+ merged; adapters away from their start."""
    import torch
    from diffusers import StableDiffusionPipeline
    from full_size_base import random_pipeline

    from ether_diffusion.adapters.attach import attach, merge, sharing_copy, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS
    from ether_diffusion.models.bases import WEIGHTS
    from ether_diffusion.models.families.stable_diffusion_v1 import UNCHECKED

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    if arguments.base == "tiny":
        pipeline: Any = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=dtype, **UNCHECKED)
    else:
        pipeline = random_pipeline().to(dtype)
    pipeline.to(arguments.device).set_progress_bar_config(disable=True)
    pipeline.safety_checker = None
    unets = {"base": pipeline.unet}
    for name in (*ADAPTERS, "ether_plus, merged"):
        make_copy: Any = copy.deepcopy if name.endswith("merged") else sharing_copy  # merging changes the weights
        unet = make_copy(pipeline.unet)
        attach(unet, METHODS[name.split(",")[0]]())
        with torch.no_grad():
            for parameter in trainable_parameters(unet).values():
                parameter.add_(0.01 * torch.randn_like(parameter))
        if name.endswith("merged"):
            merge(unet)
        unets[name] = unet.requires_grad_(False).eval()
    return pipeline, unets


def table(pipeline: Any, unets: dict[str, Any], batch: int, arguments: argparse.Namespace) -> str:
    """Time one batch size in rounds. Returns its Markdown."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in unets}
    cpu: dict[str, list[float]] = {name: [] for name in unets}
    for number in range(arguments.rounds + 1):
        for name, unet in unets.items():
            pipeline.unet = unet
            began, began_cpu = time.perf_counter(), time.process_time()
            pipeline(
                ["a red mug"] * batch,
                num_inference_steps=arguments.steps,
                height=arguments.size,
                width=arguments.size,
                generator=torch.Generator().manual_seed(0),
            )
            if number:  # the first round is not timed
                seconds[name].append((time.perf_counter() - began) / batch)
                cpu[name].append((time.process_time() - began_cpu) / batch)
    heading = f"{arguments.base}, {arguments.size} x {arguments.size}, {arguments.steps} steps, batch {batch}, "
    heading += f"{arguments.dtype}, {arguments.device}, {arguments.rounds} rounds\n"
    lines = [
        heading,
        "| | images a second | x base | CPU seconds an image | speed by them, x base |",
        "|---|---|---|---|---|",
    ]
    for name in unets:
        cells = []
        for clock in (seconds, cpu):
            ratio = statistics.median(base / own for base, own in zip(clock["base"], clock[name], strict=True))
            cells.append((statistics.median(clock[name]), ratio))
        (wall, speed), (busy, by_cpu) = cells
        lines.append(f"| {name} | {1 / wall:.3f} | {speed:.3f} | {busy:.3f} | {by_cpu:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
