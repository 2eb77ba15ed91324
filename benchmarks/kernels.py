"""Kernels that an adapter adds to a training step of the frozen UNet, a layer: what batch 1 on a GPU pays for.

    python benchmarks/kernels.py [--base sd15] [--compiled | --triton] [--operations ether_plus]

Eager: the operations of one forward and backward pass that compute or copy, those of the frozen UNet taken off, divided
by the number of adapted layers. Views and allocations do not count. The counts are exact, and the same on every device
up to what a library does inside an operation. They depend neither on the values of the weights nor on the image's size.
`sd15` is on torch's meta device, `tiny` is the miniature's architecture with random weights.

Compiled (`--compiled`): one transformer block of `tiny` by Inductor for the CPU: the kernels that it generates and the
library calls that it leaves, which are matrix products for the most part.

Triton (`--triton`, on `tiny`): eager, with ETHER's Triton kernels as on CUDA, run by Triton's interpreter. Each launch
counts as one.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora r=4": ("lora", {}),
    "ether": ("ether", {}),
    "ether_plus": ("ether_plus", {}),
    "ether_plus, one side": ("ether_plus", {"sides": "in"}),
    "ether n=4": ("ether", {"num_blocks": 4}),
    "ether_plus n=4": ("ether_plus", {"num_blocks": 4}),
    "oft n=4": ("oft", {}),
    "hra r=8": ("hra", {}),
}
COMPILED = ("lora r=4", "ether", "ether_plus")
BASES = ("tiny", "sd15")
PRECISIONS = ("fp32", "bf16", "autocast")

# Operations that move no data: views, and allocations without a fill.
FREE = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "unsqueeze",
    "squeeze",
    "slice",
    "select",
    "split",
}
FREE |= {
    "as_strided",
    "detach",
    "alias",
    "reshape",
    "unbind",
    "unflatten",
    "_reshape_alias",
    "chunk",
    "movedim",
    "empty",
}
FREE |= {"empty_like", "new_empty", "split_with_sizes"}


LAUNCHES: collections.Counter[str] = collections.Counter()
"""Of Triton kernels, by name, within a `Kernels`."""


class Kernels(TorchDispatchMode):
    """Counts the operations that compute or copy, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        LAUNCHES.clear()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.counts += LAUNCHES

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def with_triton() -> Iterator[None]:
    """Within the block ETHER's Triton kernels run on the CPU, and their launches count. TRITON_INTERPRET is set."""
    from ether_diffusion.ether import kernels
    from ether_diffusion.ether import transform as T

    class Counted:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            def launch(*arguments: Any) -> None:
                LAUNCHES[self.name] += 1
                with _disable_current_modes():  # the interpreter computes by torch and NumPy
                    self.kernel[grid](*arguments)

            return launch

    chosen = T._kernels
    launched = {name: getattr(kernels, name) for name in ("_forward_kernel", "_backward_kernel", "_finish_kernel")}
    try:
        T._kernels = lambda u, x: None if torch.compiler.is_compiling() else kernels
        for name, kernel in launched.items():
            setattr(kernels, name, Counted(name, kernel))
        yield
    finally:
        T._kernels = chosen
        for name, kernel in launched.items():
            setattr(kernels, name, kernel)


def main() -> None:
    """Print the table."""
    # transformers would take this file for the package `kernels`, which it uses where it is installed.
    from performance_page import command, publish

    sys.path.remove(str(Path(__file__).resolve().parent))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", choices=BASES)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compiled", action="store_true", help="a transformer block of `tiny`, by Inductor")
    how.add_argument("--triton", action="store_true", help="`tiny`, with ETHER's Triton kernels, interpreted")
    parser.add_argument("--write", action="store_true", help="write the tables of all bases into docs/performance.md")
    parser.add_argument("--operations", choices=ADAPTERS, help="one adapter's operations by name, in fp32")
    arguments = parser.parse_args()
    if arguments.triton or arguments.write:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    if arguments.operations:
        with with_triton() if arguments.triton else contextlib.nullcontext():
            counts = added(arguments.operations, _unet(arguments.base))
        for name, count in counts.most_common():
            print(f"{count:8.2f} {name}")
        return
    if arguments.write:
        # In a process of its own, whose Triton is not the interpreter.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        compiling = [sys.executable, __file__, "--compiled"]
        compiled_table = subprocess.run(compiling, env=environment, check=True, capture_output=True, text=True).stdout
        text = "\n\n".join([table("tiny"), table("sd15"), table("tiny", "triton"), compiled_table.strip()])
        publish("kernels", f"`{command()} --write`\n\n{text}", True)
    else:
        how = "compiled" if arguments.compiled else "triton" if arguments.triton else "eager"
        print(table(arguments.base if how == "eager" else "tiny", how))


def table(base: str, how: str = "eager") -> str:
    """All adapters as Markdown."""
    count, precisions = (compiled, PRECISIONS[:1]) if how == "compiled" else (eager, PRECISIONS)
    if how == "triton":
        with with_triton():
            shown = [name for name in ADAPTERS if name.startswith(("lora", "ether"))]
            return _table(base, "eager with the Triton kernels", count, precisions, shown)
    if base == "sd15":
        precisions = PRECISIONS[:2]  # there is no autocast on the meta device
    title = "one block compiled" if how == "compiled" else "eager"
    return _table(base, title, count, precisions, COMPILED if how == "compiled" else ADAPTERS)


def _table(base: str, title: str, count: Any, precisions: tuple[str, ...], adapters: Iterable[str]) -> str:
    lora = {precision: count("lora r=4", base, precision) for precision in precisions}
    lines = [f"{base}, attention, {title}\n"]
    lines.append("| adapter |" + "".join(f" {p} | x LoRA |" for p in precisions))
    lines.append("|---|" + "---|---|" * len(precisions))
    for adapter in adapters:
        cells = [(count(adapter, base, p), lora[p]) for p in precisions]
        lines.append(f"| {adapter} |" + "".join(f" {number:.1f} | {number / of:.2f} |" for number, of in cells))
    return "\n".join(lines)


def eager(adapter: str, base: str, precision: str) -> float:
    """Kernels a layer and step."""
    return sum(added(adapter, _unet(base), precision).values())


def added(adapter: str, unet: Any, precision: str = "fp32") -> collections.Counter[str]:
    """Kernels a layer and step by operation: those with the adapter without those of the frozen UNet."""
    unet.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    frozen = step(unet, _inputs(unet, precision), precision)
    layers = _attach(unet, adapter)
    counts = step(unet, _inputs(unet, precision), precision)
    counts.subtract(frozen)
    return collections.Counter({name: count / layers for name, count in counts.items() if count})


def step(unet: nn.Module, inputs: dict[str, Any], precision: str = "fp32") -> collections.Counter[str]:
    """Kernels of a forward and a backward pass. A frozen UNet gets gradients to its input."""
    unet.train()
    if not any(parameter.requires_grad for parameter in unet.parameters()):
        inputs["sample"].requires_grad_()
    kernels = Kernels()
    for _ in range(2):  # the first step may allocate what later ones reuse
        with (kernels := Kernels()), _autocast(precision, inputs["sample"].device.type):
            unet(**inputs).sample.float().square().mean().backward()
    return kernels.counts


def compiled(adapter: str, base: str, precision: str) -> float:
    """Kernels a layer and step of one transformer block, compiled as `compile_repeated_blocks` does."""
    unet = _unet(base)
    frozen = _generated(unet)
    _attach(unet, adapter)
    return (_generated(unet) - frozen) / ATTENTION_LAYERS


ATTENTION_LAYERS = 8
"""Adapted layers of a transformer block: self- and cross-attention, four each."""


def _generated(unet: Any) -> int:
    """Kernels and library calls in the code that Inductor generates for the first transformer block."""
    from torch._inductor.utils import run_and_get_code

    block = next(module for name, module in unet.named_modules() if name.endswith("transformer_blocks.0")).train()
    torch.compiler.reset()
    run = torch.compile(block, fullgraph=True)
    x = torch.randn(1, 64, block.norm1.normalized_shape[0], requires_grad=True)
    hidden = torch.randn(1, 16, unet.config.cross_attention_dim)
    _, sources = run_and_get_code(lambda: run(x, encoder_hidden_states=hidden).square().mean().backward())
    call = re.compile(r"^\s+(?:\w+ = )?(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)
    return sum(len(call.findall(source[source.index("def call(") :])) for source in sources)


def _unet(base: str) -> Any:
    if base == "sd15":
        from ether_diffusion.models.families.stable_diffusion_v1 import build_unet

        with torch.device("meta"):
            return build_unet().requires_grad_(False)
    from ether_diffusion.tinyworld.pretrain.networks import random_network

    return random_network("denoiser").requires_grad_(False)


def _inputs(unet: Any, precision: str) -> dict[str, Any]:
    device = next(unet.parameters()).device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sample = torch.randn(1, unet.config.in_channels, 16, 16, device=device, dtype=dtype)
    hidden = torch.randn(1, 16, unet.config.cross_attention_dim, device=device, dtype=dtype)
    return {"sample": sample, "timestep": torch.full((1,), 5, device=device), "encoder_hidden_states": hidden}


def _attach(unet: Any, adapter: str) -> int:
    from peft.tuners.tuners_utils import BaseTunerLayer

    from ether_diffusion.adapters.attach import attach
    from ether_diffusion.adapters.methods import METHODS

    method, settings = ADAPTERS[adapter]
    attach(unet, METHODS[method](**settings))
    return sum(isinstance(module, BaseTunerLayer) for module in unet.modules())


def _autocast(precision: str, device: str) -> Any:
    on = precision == "autocast" and device != "meta"
    return torch.autocast(device, torch.bfloat16) if on else contextlib.nullcontext()


if __name__ == "__main__":
    main()
