"""A server of the miniature under load: requests a second and latencies, with batches across adapters and without.

    python benchmarks/serving.py --write             # minutes on two cores
    python benchmarks/serving.py --replicas 2        # Ray Serve

Random ETHER adapters. The server is `ether-diffusion serve` in a process of its own, with one thread for torch; clients
are threads of this one, each of which sends a request, waits for its image, and sends the next one. Requests go round
the adapters, so that neighbours have different ones. Without batches (`--batch-size 1`) each image is a pass.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

from performance_page import command, publish


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--method", default="ether", choices=("ether", "ether_plus"))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96, help="of each row (default: 96)")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps (default: 25)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--replicas", type=int, help="processes of Ray Serve (default: uvicorn in one process)")
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(Path(folder), max(arguments.adapters), arguments.method)
        for batch_size in arguments.batch_sizes:
            with server(Path(folder), batch_size, arguments.replicas) as port:
                load(port, arguments, adapters=1, requests=2 * arguments.clients)  # not counted
                for adapters in arguments.adapters:
                    rows.append(measured(port, arguments, adapters, batch_size))
                    print(rows[-1], flush=True)
    host = "uvicorn, one process" if arguments.replicas is None else f"Ray Serve, {arguments.replicas} replicas"
    where = f"tiny, {arguments.method}, {arguments.steps} steps, {arguments.clients} clients, {host}"
    head = "| adapters | most images a pass | requests/s | p50, s | p95, s | images a pass |\n|---|---|---|---|---|---|"
    publish("serving", "\n".join([f"`{command()}`: {where}\n", head, *rows]), arguments.write)


def measured(port: int, arguments: argparse.Namespace, adapters: int, batch_size: int) -> str:
    """A row of the table."""
    before = passes(port)
    began = time.perf_counter()
    seconds = sorted(load(port, arguments, adapters, arguments.requests))
    rate = len(seconds) / (time.perf_counter() - began)
    p50, p95 = (seconds[min(len(seconds) - 1, int(len(seconds) * share))] for share in (0.5, 0.95))
    images = len(seconds) / (passes(port) - before)
    return f"| {adapters} | {batch_size} | {rate:.2f} | {p50:.2f} | {p95:.2f} | {images:.1f} |"


def load(port: int, arguments: argparse.Namespace, adapters: int, requests: int) -> list[float]:
    """Seconds that each request takes."""

    def ask(number: int) -> float:
        body = {
            "model": f"adapter-{number % adapters}",
            "prompt": "a red ball on grass",
            "seed": number,
            "num_inference_steps": arguments.steps,
        }
        began = time.perf_counter()
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=600)) as connection:
            connection.request("POST", "/v1/images/generations", json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise SystemExit(f"the server answers {answer.status}: {content[:300]!r}")
        return time.perf_counter() - began

    with ThreadPoolExecutor(arguments.clients) as pool:
        return list(pool.map(ask, range(requests)))


def passes(port: int) -> float:
    """Passes so far, as the server counts them."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
    found = re.search(r"^ether_diffusion_pass_images_count (\S+)$", page, re.M)
    assert found
    return float(found[1])


@contextmanager
def server(adapters: Path, batch_size: int, replicas: int | None) -> Iterator[int]:
    """Within the block a server runs; yields its port."""
    line = [sys.executable, "-m", "ether_diffusion_cli", "serve", "--base", "tiny", "--adapters", str(adapters)]
    line += ["--port", "0", "--device", "cpu", "--batch-size", str(batch_size)]
    line += [] if replicas is None else ["--replicas", str(replicas)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("ETHER_DIFFUSION_API_KEY", None)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        found = next((found for text in process.stdout if (found := re.search(r":(\d+)/v1", text))), None)
        if found is None:
            raise SystemExit("the server ended before it answered")
        yield int(found[1])
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def save_adapters(folder: Path, count: int, method: str) -> None:
    import torch

    from ether_diffusion.adapters.attach import attach, sharing_copy, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS
    from ether_diffusion.adapters.saving import save_adapter
    from ether_diffusion.models.bases import load_base

    torch.manual_seed(0)
    base = load_base("tiny").unet
    for number in range(count):
        unet = sharing_copy(base)
        attach(unet, METHODS[method]())
        for parameter in trainable_parameters(unet).values():
            parameter.data += 0.1 * torch.randn_like(parameter)
        save_adapter(unet, folder / f"adapter-{number}", base_model="tiny")


if __name__ == "__main__":
    main()
