"""Time and memory of a training step on Stable Diffusion v1.5's UNet: ETHER, ETHER+ and others, as ratios.

    python benchmarks/training_step.py [--latents 32] [--rounds 3] [--device cuda --dtype bf16]

Each method runs in a process of its own, one after another in every round, so that a slow minute of the machine affects
all of them. Random weights: the numbers do not depend on their values. `base` is the frozen UNet with gradients to its
input. `_dense` multiplies the weight by the transform as a matrix, as the authors' language-model code does. Peak
memory is that of tensors on a GPU, and of the whole process on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

METHODS = ("base", "ether", "ether_plus", "lora", "ether_dense", "ether_plus_dense")


def main() -> None:
    """Measure in rounds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=32, help="side of the latents (64 for 512 pixels; default: 32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps a round, after one that is not timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    seconds: dict[str, list[float]] = {method: [] for method in arguments.methods}
    memory: dict[str, list[float]] = {method: [] for method in arguments.methods}
    for number in range(arguments.rounds):
        for method in arguments.methods:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            seconds[method] += result["seconds"]
            memory[method].append(result["memory"])
            print(f"round {number + 1}: {method}", file=sys.stderr)
    first = arguments.methods[0]
    print(f"latents {arguments.latents}, batch {arguments.batch}, {arguments.dtype}, {arguments.device}\n")
    print(f"| method | seconds a step | x {first} | peak memory, GB | x {first} |\n|---|---|---|---|---|")
    for method in arguments.methods:
        pace, peak = statistics.median(seconds[method]), statistics.median(memory[method])
        ratios = pace / statistics.median(seconds[first]), peak / statistics.median(memory[first])
        print(f"| {method} | {pace:.3f} | {ratios[0]:.2f} | {peak / 1e9:.2f} | {ratios[1]:.2f} |")


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each timed step, and peak bytes."""
    import torch

    from ether_diffusion.adapters.attach import attach, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS as TABLE
    from ether_diffusion.models.stable_diffusion_v1 import build_unet
    from ether_diffusion.training.environment import peak_memory

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with device:
        unet = build_unet()
    unet.to(dtype).requires_grad_(False)  # pyright: ignore
    if method != "base":
        attach(unet, TABLE[method.removesuffix("_dense")]())
    if method.endswith("_dense"):
        make_dense(unet)
    unet.train()
    with device:
        x = torch.randn(arguments.batch, 4, arguments.latents, arguments.latents, dtype=dtype)
        hidden = torch.randn(arguments.batch, 77, 768, dtype=dtype)
        target, timesteps = torch.randn_like(x), torch.full((arguments.batch,), 500)
    x.requires_grad_(method == "base")
    trained = list(trainable_parameters(unet).values())
    optimizer = torch.optim.AdamW(trained or [x], lr=1e-4)
    seconds = []
    for step in range(arguments.steps + 1):
        began = time.perf_counter()
        loss = torch.nn.functional.mse_loss(unet(x, timesteps, hidden).sample.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step:
            seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "memory": peak_memory(device)}


def make_dense(unet: Any) -> None:
    """Replace the forward of every ETHER layer by the product of its weight with the transforms as matrices."""
    import torch
    import torch.nn.functional as F

    from ether_diffusion.ether.layer import EtherLayer

    def matrix(planes: Any) -> Any:
        left, right = planes()
        return torch.block_diag(
            *(torch.eye(a.shape[1], device=a.device) + a.T @ b for a, b in zip(left, right, strict=True))
        )

    def dense(layer: Any) -> Any:
        def forward(x: Any) -> Any:
            base = layer.get_base_layer()
            weight = base.weight @ matrix(layer.ether_in["default"]).to(base.weight.dtype)
            if "default" in layer.ether_out:
                weight = matrix(layer.ether_out["default"]).to(base.weight.dtype) @ weight
            return F.linear(x, weight, base.bias)

        return forward

    for layer in unet.modules():
        if isinstance(layer, EtherLayer):
            layer.forward = dense(layer)


if __name__ == "__main__":
    main()
