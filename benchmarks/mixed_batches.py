"""Passes of a UNet over batches in which samples have different adapters: a bank against switching, merging and peers.

    python benchmarks/mixed_batches.py --write               # `tiny`: minutes
    python benchmarks/mixed_batches.py --base sd15 --batches 8 --adapters 8 --latents 16 --write

Every way computes the same batch. `bank` chooses the adapters of each pass anew. `switching` makes one adapter of
several active at a time, and passes its samples alone; `merged` writes it into the weights for that, and takes it out
again. `LoRA` and `RoAd` are PEFT's, with `adapter_names`. With more adapters than samples, each pass takes other ones.
CPU seconds of this process on one thread, which other work on the machine hardly changes; the ways take turns, and each
number is the median over the rounds of the ratio to the base's pass of that round. Random weights.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from performance_page import command, publish

from ether_diffusion.adapters.attach import sharing_copy

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
VARIANTS = {"ETHER": "ether", "ETHER+": "ether_plus"}
MOST_PEERS = 64
"""PEFT's layers hold their adapters as modules, of which a thousand take minutes to make."""
BARS = {"ETHER": 1.15, "ETHER+": 1.3}
"""Most of the base's time that a bank's batch of 8 adapters may take on `tiny`."""
Pass = Callable[[list[str]], Any]
COLUMNS = ("bank", "switching", "merged", "LoRA r=4", "RoAd")


def main() -> None:
    """Measure, print the tables, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", choices=("tiny", "sd15"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 1000, 10000])
    parser.add_argument("--latents", type=int, default=16, help="side of the latents (default: 16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/performance.md too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    unet = base_unet(arguments)
    tables, notes = [], []
    for title in VARIANTS:
        cells = {}
        for batch, adapters in itertools.product(arguments.batches, arguments.adapters):
            cells[batch, adapters] = measure(unet, title, batch, adapters, arguments)
            print(f"{title}, batch {batch}, {adapters} adapters: {cells[batch, adapters]}", flush=True)
        tables.append(table(title, cells))
        notes += bars(title, cells) if arguments.base == "tiny" else []
    where = f"{arguments.base}, {arguments.dtype}, latents {arguments.latents} x {arguments.latents}, one thread"
    publish(
        f"mixed_batches_{arguments.base}", "\n\n".join([f"`{command()}`: {where}", *tables, *notes]), arguments.write
    )


def base_unet(arguments: argparse.Namespace) -> Any:
    from ether_diffusion.models.bases import load_base
    from ether_diffusion.models.families.stable_diffusion_v1 import build_unet

    torch.manual_seed(0)
    unet: Any = load_base("tiny").unet if arguments.base == "tiny" else build_unet()
    return unet.to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32).requires_grad_(False).eval()


def measure(unet: Any, title: str, batch: int, adapters: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of the base's pass over the batch, and of each way as a multiple of it."""
    generator = torch.Generator().manual_seed(0)
    width, channels = unet.config.cross_attention_dim, unet.config.in_channels
    latents = torch.randn(batch, channels, arguments.latents, arguments.latents, generator=generator).to(unet.dtype)
    text = torch.randn(batch, 77 if arguments.base == "sd15" else 40, width, generator=generator).to(unet.dtype)
    inputs = latents, torch.full((batch,), 500), text
    ways = dict(made(unet, title, inputs, adapters, min(adapters, batch)))
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(arguments.rounds + 1):
        names = [str((number * batch + sample) % adapters) for sample in range(batch)]
        for name, way in ways.items():
            with torch.no_grad():
                began = time.process_time()
                way(names)
                if number:  # the first round is not timed
                    seconds[name].append(time.process_time() - began)
    found = {"base": statistics.median(seconds["base"])}
    for name in ways.keys() - {"base"}:
        found[name] = statistics.median(own / base for own, base in zip(seconds[name], seconds["base"], strict=True))
    return found


def made(unet: Any, title: str, inputs: tuple, adapters: int, together: int) -> Iterator[tuple[str, Pass]]:
    """The ways to pass a batch. All share the base's weights."""
    from peft import LoraConfig, RoadConfig

    from ether_diffusion import EtherConfig
    from ether_diffusion.ether import Bank

    own: Any = {"variant": VARIANTS[title]}
    config = EtherConfig(target_modules=TARGETS, init_weights=False, **own)
    yield "base", lambda names: unet(*inputs)

    banked: Any = sharing_copy(unet)
    bank = Bank(banked, config, adapters)
    bank.table.uniform_(-0.01, 0.01)
    bank.rows = {str(index): index for index in range(adapters)}

    def mixed(names: list[str]) -> None:
        with bank.select(names):
            banked(*inputs)

    yield "bank", mixed
    switched: Any = sharing_copy(unet)
    for index in range(together):
        switched.add_adapter(config, str(index))
    layers = [module for module in switched.modules() if hasattr(module, "ether_in")]
    yield "switching", lambda names: one_by_one(switched, inputs, names, together, activated(layers))
    yield "merged", lambda names: one_by_one(switched, inputs, names, together, merged(layers))
    if adapters <= MOST_PEERS:
        lora = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
        yield "LoRA r=4", peer(unet, inputs, lora, adapters)
        widths = [module.out_features for name, module in unet.named_modules() if name.endswith(tuple(TARGETS))]
        road = RoadConfig(target_modules=TARGETS, init_weights=False, group_size=math.gcd(64, *widths))
        yield "RoAd", peer(unet, inputs, road, adapters)


def peer(unet: Any, inputs: tuple, config: Any, adapters: int) -> Pass:
    from peft import get_peft_model

    model: Any = get_peft_model(sharing_copy(unet), config, adapter_name="0")
    for index in range(1, adapters):
        model.add_adapter(str(index), config)
    model.eval()
    return lambda names: model(*inputs, adapter_names=names)


def one_by_one(unet: Any, inputs: tuple, names: list[str], together: int, using: Any) -> None:
    """Pass the samples of each adapter alone. As many adapters are loaded as the batch has."""
    slots = {name: str(index % together) for index, name in enumerate(dict.fromkeys(names))}
    for name, slot in slots.items():
        chosen = [index for index, other in enumerate(names) if other == name]
        with using(slot):
            unet(*(part[chosen] for part in inputs))


def activated(layers: list[Any]) -> Any:
    @contextmanager
    def using(name: str) -> Iterator[None]:
        for layer in layers:
            layer.set_adapter(name)
        yield

    return using


def merged(layers: list[Any]) -> Any:
    @contextmanager
    def using(name: str) -> Iterator[None]:
        for layer in layers:
            layer.merge(adapter_names=[name])
        yield
        for layer in layers:
            layer.unmerge()

    return using


def table(title: str, cells: dict[tuple[int, int], dict[str, float]]) -> str:
    lines = [f"{title}: images a CPU second of the base, and CPU time as a multiple of the base's\n"]
    lines.append(f"| batch | adapters | base, images/s | {' | '.join(COLUMNS)} |")
    lines.append("|---|---|---|" + "---|" * len(COLUMNS))
    for (batch, adapters), found in cells.items():
        ratios = " | ".join(f"{found[name]:.2f}" if name in found else "" for name in COLUMNS)
        lines.append(f"| {batch} | {adapters:,} | {batch / found['base']:.2f} | {ratios} |")
    return "\n".join(lines)


def bars(title: str, cells: dict[tuple[int, int], dict[str, float]]) -> list[str]:
    """What is required on `tiny` of 8 adapters in a batch of 8, and what was found."""
    found = cells.get((8, 8))
    if found is None:
        return []
    others = {name: found[name] / found["bank"] for name in COLUMNS[1:]}
    most = max((cells[8, n]["bank"] / found["bank"], n) for batch, n in cells if batch == 8)
    return [
        f"{title}, batch 8 of 8 adapters: {found['bank']:.2f} x the base's batch (bar: {BARS[title]}). Switching takes "
        f"{others['switching']:.1f} x as long as the bank (bar: 3), LoRA's `adapter_names` {others['LoRA r=4']:.2f} x, "
        f"RoAd's {others['RoAd']:.2f} x (bar: 1). With {most[1]:,} adapters in the bank a pass takes {most[0]:.2f} x "
        "as long as with 8 (bar: 1)."
    ]


if __name__ == "__main__":
    main()
