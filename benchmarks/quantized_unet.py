"""Memory of Stable Diffusion v1.5's frozen UNet, plain and quantised, and seconds per training step on each.

    python benchmarks/quantized_unet.py [--latents 32] [--device cuda] [--dtype bf16]

Random weights: sizes and times do not depend on their values. The bytes of the weights include the quantisation's
scales and are the same on every device; the seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
from ether_diffusion.models.quantized import QUANTIZERS, number_of_weights, quantize
from ether_diffusion.quiet import quiet_dependencies


def main() -> None:
    """Print a row a form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=32, help="side of the latents (64 for 512 pixels; default: 32)")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one that is not timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--forms", nargs="+", default=("plain", *QUANTIZERS), choices=("plain", *QUANTIZERS))
    arguments = parser.parse_args()
    quiet_dependencies()
    print(f"latents {arguments.latents}, batch 1, {arguments.dtype}, {arguments.device}\n")
    print("| form | weights, GB | of which linear layers | seconds a step |\n|---|---|---|---|")
    for form in arguments.forms:
        unet = build(form, arguments)
        linear = sum(size_of(module) for module in unet.modules() if isinstance(module, torch.nn.Linear))
        row = f"| {form} | {size_of(unet) / 1e9:.2f} | {linear / 1e9:.2f} |"
        print(f"{row} {seconds_a_step(unet, arguments):.2f} |", flush=True)


def build(form: str, arguments: argparse.Namespace) -> Any:
    """A UNet with its linear layers in this form, on the device."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    torch.manual_seed(0)
    unet: Any = build_unet()
    unet.to(dtype).requires_grad_(False)
    count = number_of_weights(unet)
    if form != "plain":
        quantize(unet, form, torch.device(arguments.device))
    assert number_of_weights(unet) == count
    return unet.to(arguments.device)


def size_of(module: torch.nn.Module) -> int:
    """Bytes of a module's state: weights, and the scales and tables of quantised ones."""
    return sum(_bytes(tensor) for tensor in module.state_dict().values())


def _bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors hold their parts as attributes
        names, _ = tensor.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        return sum(_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()


def seconds_a_step(unet: Any, arguments: argparse.Namespace) -> float:
    """Forward and backward through a UNet with ETHER+ on its attention: the median."""
    attach(unet, EtherPlusSettings())
    unet.train()
    device, dtype, side = torch.device(arguments.device), unet.dtype, arguments.latents
    x = torch.randn(1, 4, side, side, dtype=dtype, device=device)
    hidden = torch.randn(1, 77, 768, dtype=dtype, device=device)
    timestep = torch.full((1,), 500, device=device)
    seconds = []
    for _ in range(arguments.steps + 1):
        start = time.perf_counter()
        unet(x, timestep, hidden).sample.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
