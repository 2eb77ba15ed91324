"""A shelf of thousands of adapters: time to activate one, memory of the process, and what adding to the file costs.

    python benchmarks/shelf.py --write            # SD1.5 in bf16 (2 GB of memory), 10,000 adapters (4 GB of disk)
    python benchmarks/shelf.py --base tiny --adapters 1000

Random weights and vectors. Activation is `bank.select([name])`, from the name to coefficients that the layers read:
from the mapped file into the bank's table, and from there into the place of the batch. Warm: the file is in the
system's cache. RssAnon is the process's own memory, RssFile the pages of mapped files, which the system takes back when
it needs them (/proc/self/status).
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from performance_page import command, publish

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def main() -> None:
    """Write a shelf in a temporary folder, measure, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd15", choices=("tiny", "sd15"))
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--capacity", type=int, default=64)
    parser.add_argument("--folder", help="where the file is written meanwhile (default: the system's temporary folder)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps({"write": write, "activate": activate, "add": add}[arguments.one](arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found: dict[str, Any] = {}
        for part in ("write", "activate", "add"):  # each in a process of its own, whose memory is its own
            line = [sys.executable, __file__, *sys.argv[1:], "--one", part, "--file", f"{folder}/shelf.safetensors"]
            found |= json.loads(
                subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            )
    publish("shelf", f"`{command()}`\n\n{table(found, arguments)}", arguments.write)


def table(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    rows = {
        f"shelf of {arguments.adapters:,} adapters ({arguments.base}, ETHER), GB": f"{found['size'] / 1e9:.2f}",
        "an adapter, MB": f"{found['adapter'] / 1e6:.2f}",
        f"opening it, with a bank of {arguments.capacity}, s": f"{found['open']:.2f}",
        "activating one, warm: median, ms": f"{found['p50']:.3f}",
        "p99, ms": f"{found['p99']:.3f}",
        "RssAnon with the base alone, MB": f"{found['base_anon'] / 1e6:.0f}",
        f"RssAnon after {arguments.adapters:,} activations, MB": f"{found['anon'] / 1e6:.0f} "
        f"({found['anon'] / found['base_anon']:.3f} x)",
        "RssFile then, MB": f"{found['file'] / 1e6:.0f}",
        "`shelf add` of one adapter, s": f"{found['add_seconds']:.1f}",
        "the most RssAnon that it took, MB": f"{found['add_anon'] / 1e6:.0f}",
    }
    return "\n".join(["| what | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def write(arguments: argparse.Namespace) -> dict[str, Any]:
    """A shelf of random rows, and a run to add to it."""
    import torch

    from ether_diffusion.adapters.attach import attach
    from ether_diffusion.adapters.methods import METHODS
    from ether_diffusion.adapters.saving import save_adapter
    from ether_diffusion.adapters.shelf import build_shelf

    unet = base_unet(arguments)
    attach(unet, METHODS["ether"]())
    file = Path(arguments.file)
    run = save_adapter(unet, file.with_name("run"), base_model=arguments.base)
    contents = build_shelf(file, {"first": run})
    names = [f"adapter-{index:06d}" for index in range(arguments.adapters)]
    contents.digests.clear()
    contents.digests.update(dict.fromkeys(names, "0" * 64))
    with file.open("wb") as out:
        out.write(contents.header())
        for _ in names:
            out.write(torch.empty(contents.layout.size).uniform_(-0.1, 0.1).numpy().tobytes())
    return {"size": file.stat().st_size, "adapter": contents.row_bytes}


def activate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each activation, and memory before and after."""
    from ether_diffusion import AdapterBank

    unet = base_unet(arguments)
    base_anon = memory("RssAnon")
    began = time.perf_counter()
    bank = AdapterBank.open(arguments.file, unet, arguments.capacity)
    opened = time.perf_counter() - began
    names = bank.names
    for name in names:  # into the cache
        with bank.select([name]):
            pass
    random.Random(0).shuffle(names)
    seconds = []
    for name in names:
        began = time.perf_counter()
        with bank.select([name]):
            seconds.append(time.perf_counter() - began)
    seconds.sort()
    return {
        "open": opened,
        "p50": 1e3 * seconds[len(seconds) // 2],
        "p99": 1e3 * seconds[len(seconds) * 99 // 100],
        "base_anon": base_anon,
        "anon": memory("RssAnon"),
        "file": memory("RssFile"),
    }


def add(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of adding one adapter, and the memory that it took."""
    import threading

    from ether_diffusion.adapters.shelf import add_to_shelf

    before, most, done = memory("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    add_to_shelf(arguments.file, {"another": Path(arguments.file).with_name("run")})
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    return {"add_seconds": seconds, "add_anon": most - before}


def base_unet(arguments: argparse.Namespace) -> Any:
    import torch

    from ether_diffusion.models.bases import load_base
    from ether_diffusion.models.families.stable_diffusion_v1 import build_unet

    torch.set_num_threads(1)
    if arguments.base == "tiny":
        return load_base("tiny").unet
    torch.set_default_dtype(torch.bfloat16)
    unet = build_unet()
    torch.set_default_dtype(torch.float32)
    return unet.requires_grad_(False)


def memory(kind: str) -> int:
    """Bytes of this process's memory of a kind, of those that /proc/self/status lists."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{kind}:")))


if __name__ == "__main__":
    main()
