"""Time and memory of a training step on Stable Diffusion v1.5's UNet: ETHER, ETHER+ and others, as ratios.

    python benchmarks/training_step.py [--cells plain batch4 bf16 checkpointing compiled] [--rounds 3] [--write]
    python benchmarks/training_step.py --latents 64 --device cuda --dtype bf16 --methods base lora ether ether_plus

Each method runs in a process of its own, one after another in every round. There its steps take turns with those of
the bare frozen UNet (with gradients to its input), whose weights it shares; a ratio is the median over these pairs, so
that a slow minute of the machine affects both. `base` is such a pair of two bare UNets: how far its ratios are from 1
is the error of the others. A cell is one setting: `plain` is what the other options say, every other cell differs from
it in one thing. CPU seconds are those of the process. Random weights: the numbers do not depend on their values.
`dense` multiplies the weight by the transform as a matrix, as the authors' language-model code does. `diag_oft` is
LyCORIS', of the extra `benchmarks`. Peak memory is that of tensors on a GPU, and of the whole process on a CPU, before
the bare UNet has run there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from typing import Any

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("", {}),
    "lora": ("lora", {"rank": 4}),
    "ether": ("ether", {}),
    "ether n=4": ("ether", {"num_blocks": 4}),
    "ether n=16": ("ether", {"num_blocks": 16}),
    "ether_plus in": ("ether_plus", {"sides": "in"}),
    "ether_plus": ("ether_plus", {}),
    "ether_plus n=4": ("ether_plus", {"num_blocks": 4}),
    "ether_plus n=16": ("ether_plus", {"num_blocks": 16}),
    "oft n=4": ("oft", {"num_blocks": 4}),
    "boft": ("boft", {}),
    "hra r=8": ("hra", {"rank": 8}),
    "dora r=4": ("dora", {"rank": 4}),
    "diag_oft": ("", {}),
    "ether dense": ("ether", {}),
    "ether_plus dense": ("ether_plus", {}),
}
CELLS: dict[str, list[str]] = {
    "plain": [],
    "batch4": ["--batch", "4"],
    "bf16": ["--dtype", "bf16"],
    "checkpointing": ["--checkpointing"],
    "compiled": ["--compiled"],
}
ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0)"


def main() -> None:
    """Measure in rounds, and print a table for each cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=32, help="side of the latents (64 for 512 pixels; default: 32)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compiled", action="store_true", help="compile the UNet's repeated blocks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=4, help="timed pairs of steps a round, after two that are not timed"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--cells", nargs="+", default=["plain"], choices=CELLS, metavar="CELL")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    from performance_page import command, publish

    tables = [table(cell, arguments) for cell in arguments.cells]
    publish("training_step", "\n\n".join([f"`{command()}`", *tables]), arguments.write)


def table(cell: str, arguments: argparse.Namespace) -> str:
    """Run one cell's methods in rounds. Returns its Markdown."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in arguments.methods}
    for number in range(arguments.rounds):
        for method in arguments.methods:
            # The cell's own options come last, and so count.
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], *CELLS[cell], "--one", method], capture_output=True, text=True
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{cell}, {method}: {last}", file=sys.stderr)
                continue
            found[method].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{cell}, round {number + 1}: {method}", file=sys.stderr)
    options = " ".join(CELLS[cell]) or f"{arguments.dtype}, batch {arguments.batch}, {arguments.device}"
    lines = [f"{cell}: latents {arguments.latents} x {arguments.latents}, {options}, {arguments.rounds} rounds\n"]
    lines.append("| method | seconds a step | x base | CPU seconds | x base | peak memory, GB | x base |")
    lines.append("|---|---|---|---|---|---|---|")
    base_memory: float | None = None
    for method, results in found.items():
        if not results:
            lines.append(f"| {method} | failed | | | | | |")
            continue
        memory = statistics.median([r["memory"] for r in results]) / 1e9
        base_memory = base_memory or memory
        cells = []
        for clock in (0, 1):
            pairs = [(own[clock], bare[clock]) for r in results for own, bare in r["pairs"]]
            cells.append(statistics.median([own for own, _ in pairs]))
            cells.append(statistics.median([own / bare for own, bare in pairs]))
        cells += [memory, memory / base_memory]
        lines.append(f"| {method} | {' | '.join(f'{value:.3f}' for value in cells)} |")
    return "\n".join(lines)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Wall-clock and CPU seconds of pairs of steps, the method's and the bare UNet's, and the method's peak bytes."""
    import torch

    from ether_diffusion.adapters.attach import sharing_copy
    from ether_diffusion.models.families.stable_diffusion_v1 import build_unet
    from ether_diffusion.training.environment import peak_memory

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[arguments.dtype]
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    with device:
        bare: Any = build_unet()
        x = torch.randn(arguments.batch, 4, arguments.latents, arguments.latents, dtype=dtype)
        hidden = torch.randn(arguments.batch, 77, 768, dtype=dtype)
        target, timesteps = torch.randn_like(x), torch.full((arguments.batch,), 500)
    bare.to(dtype).requires_grad_(False)
    unet: Any = sharing_copy(bare)
    network, trained = adapt(unet, name)
    inputs = {unet: x.clone().requires_grad_(name == "base"), bare: x.clone().requires_grad_()}
    optimizers = {
        unet: torch.optim.AdamW(trained or [inputs[unet]], lr=1e-4),
        bare: torch.optim.AdamW([inputs[bare]], lr=1e-4),
    }
    for model in (unet, bare):
        model.train()
        if arguments.checkpointing:
            model.enable_gradient_checkpointing()
        if arguments.compiled:
            model.compile_repeated_blocks()

    def step(model: Any) -> tuple[float, float]:
        began, began_cpu = time.perf_counter(), time.process_time()
        prediction = model(inputs[model], timesteps, hidden).sample
        torch.nn.functional.mse_loss(prediction.float(), target.float()).backward()
        optimizers[model].step()
        optimizers[model].zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, time.process_time() - began_cpu

    for _ in range(2):
        step(unet)
    memory = peak_memory(device)
    step(bare)
    pairs = []
    for number in range(arguments.steps):
        first, second = (unet, bare) if number % 2 else (bare, unet)
        times = {first: step(first), second: step(second)}
        pairs.append((times[unet], times[bare]))
    del network
    return {"pairs": pairs, "memory": memory}


def adapt(unet: Any, name: str) -> tuple[Any, list[Any]]:
    """Put the adapter of this name into the UNet. Returns what has to live as long as it, and what is trained."""
    from ether_diffusion.adapters.attach import attach, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS as TABLE

    if name == "diag_oft":
        if importlib.util.find_spec("lycoris") is None:
            raise SystemExit("diag_oft: LyCORIS is not installed: pip install -e '.[benchmarks]'")
        from lycoris import LycorisNetwork, create_lycoris  # pyright: ignore[reportMissingImports]

        LycorisNetwork.apply_preset({"target_module": [], "target_name": [ATTENTION], "use_fnmatch": False})
        network = create_lycoris(unet, 1.0, linear_dim=4, algo="diag-oft")
        network.apply_to()
        network.to(next(unet.parameters()).device).requires_grad_(True)
        return network, [parameter for parameter in network.parameters() if parameter.requires_grad]
    method, settings = METHODS[name]
    if method:
        attach(unet, TABLE[method](**settings))
    if name.endswith("dense"):
        make_dense(unet)
    return None, list(trainable_parameters(unet).values())


def make_dense(unet: Any) -> None:
    """Replace the forward of every ETHER layer by the product of its weight with the transforms as matrices."""
    import torch
    import torch.nn.functional as F

    from ether_diffusion.ether.layer import EtherLayer

    def matrix(planes: Any) -> Any:
        change = planes()
        return torch.block_diag(
            *(torch.eye(a.shape[1], device=a.device) + a.T @ b for a, b in zip(change.left, change.right, strict=True))
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
