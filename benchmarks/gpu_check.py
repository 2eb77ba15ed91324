"""One script that checks and measures everything that needs a GPU, in at most 8 minutes, and prints one Markdown table.

    python benchmarks/gpu_check.py [--minutes 8] [--latents 64] [--write]

Kernels against the plain version (variants, dtypes, shapes of Stable Diffusion v1.5); kernels a step by the profiler;
seconds and memory of a step, in bf16 and fp16, batch 1 and 4, eager and compiled; fp16 gradient scaling for 50 steps;
bitwise resume with deterministic algorithms; images a second, merged and unmerged. Random weights, no downloads. A part
that fails is a row that says so, and the others run; parts that the time does not reach are named.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

Row = tuple[str, str]
WIDTHS = ((4096, 320), (1024, 640), (256, 1280), (77, 768))
"""Positions and features of SD1.5's attention at 512 pixels."""
METHODS = ("base", "lora", "ether", "ether_plus")


def main() -> int:
    """Run all parts. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("No CUDA device: nothing was checked.")
        return 2
    from performance_page import command, publish

    torch.cuda.init()
    began, rows, failed = time.perf_counter(), [], False
    for part in (kernels, launches, gradient_scaling, resume, step_times, generation):
        left = 60 * arguments.minutes - (time.perf_counter() - began)
        title = (part.__doc__ or part.__name__).splitlines()[0].rstrip(".")
        if left < 20:
            rows.append((title, "not reached in the time given"))
            continue
        try:
            # Each part yields rows and stops after the first one that ends past its time.
            for row in part(arguments):
                rows.append(row)
                print(f"{row[0]}: {row[1]}", flush=True)
                if time.perf_counter() - began > 60 * arguments.minutes - 10:
                    rows.append((title, "cut short: the time given is over"))
                    break
        except Exception as error:
            failed = True
            rows.append((title, f"FAILED: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"))
            print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    lines = [f"`{command()}` on {card}, {time.perf_counter() - began:.0f} s\n", "| check | result |", "|---|---|"]
    publish("gpu", "\n".join([*lines, *(f"| {name} | {result} |" for name, result in rows)]), arguments.write)
    return int(failed)


def kernels(arguments: argparse.Namespace) -> Iterator[Row]:
    """Kernels against the plain version."""
    from ether_diffusion.ether import transform as T

    if T._load_kernels(torch.cuda.current_device()) is None:
        raise RuntimeError("the Triton kernels do not work here; the warning above says why")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        worst = 0.0
        for (positions, features), plus, n, fixed in itertools.product(WIDTHS, (0, 1), (1, 4), (False, True)):
            torch.manual_seed(0)
            vectors = [torch.randn(n, features // n, device="cuda", requires_grad=True) for _ in range(1 + plus)]
            x = torch.randn(2, positions, features, device="cuda", dtype=dtype, requires_grad=True)
            bias = torch.randn(features, device="cuda", dtype=dtype) if fixed else None
            g = torch.randn_like(x)

            def run(x=x, vectors=vectors, bias=bias, g=g) -> list[torch.Tensor]:
                y = T.transform(T.ether_plus(*vectors) if len(vectors) > 1 else T.ether(*vectors), x, fixed=bias)
                return [y, *torch.autograd.grad(y, [x, *vectors], g)]

            fused = run()
            with without_kernels():
                plain = run()
            worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fused, plain, strict=True)))
        yield f"kernels, {dtype}", f"largest difference {worst:.1e} (allowed {tolerance:.0e})"
        if not worst <= tolerance:
            raise RuntimeError(f"{dtype}: off by {worst:.1e}")


def launches(arguments: argparse.Namespace) -> Iterator[Row]:
    """Launches of a step, by the profiler."""
    counts = {}
    for method in METHODS:
        one = stepper(method, torch.bfloat16, 1, 16)
        one()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            one()
            torch.cuda.synchronize()
        counts[method] = sum(event.count for event in profile.key_averages() if event.device_type.name == "CUDA")
        added = (counts[method] - counts["base"]) / 128
        yield f"launches a step, bf16, {method}", f"{counts[method]}" + (f", {added:.1f} a layer" if added else "")


def step_times(arguments: argparse.Namespace) -> Iterator[Row]:
    """Seconds and memory of a step."""
    for compiled, dtype, batch in itertools.product((False, True), (torch.bfloat16, torch.float16), (1, 4)):
        first = None
        for method in METHODS:
            one = stepper(method, dtype, batch, arguments.latents, compiled)
            for _ in range(3):
                one()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            seconds = []
            for _ in range(10):
                began = time.perf_counter()
                one()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
            found = statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9
            first = first or found
            how = "compiled" if compiled else "eager"
            yield (
                f"step, {str(dtype)[6:]}, batch {batch}, {how}, {method}",
                f"{1000 * found[0]:.1f} ms ({found[0] / first[0]:.3f} x base), "
                f"{found[1]:.2f} GB ({found[1] / first[1]:.3f} x base)",
            )
            del one
            torch.cuda.empty_cache()


def gradient_scaling(arguments: argparse.Namespace) -> Iterator[Row]:
    """50 steps in fp16 with gradient scaling."""
    unet, trained = network("ether_plus", torch.float16)
    optimizer, scaler = torch.optim.AdamW(trained, lr=1e-3), torch.amp.GradScaler("cuda")
    x, hidden, target = inputs(torch.float16, 1, 32)
    losses = []
    for _ in range(50):
        loss = F.mse_loss(unet(x, torch.tensor([500], device="cuda"), hidden).sample.float(), target.float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    finite = all(parameter.isfinite().all() for parameter in trained)
    yield "fp16, 50 steps", f"loss {losses[0].item():.4f} -> {losses[-1].item():.4f}, scale {scaler.get_scale():.0f}"
    if not finite or not losses[-1] < losses[0]:
        raise RuntimeError("the vectors are not finite, or the loss did not fall")


def resume(arguments: argparse.Namespace) -> Iterator[Row]:
    """Bitwise resume with deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        unet, trained = network("ether_plus", torch.float32)
        optimizer = torch.optim.AdamW(trained, lr=1e-3)

        def steps(numbers: range) -> None:
            for number in numbers:
                torch.manual_seed(number)
                x, hidden, target = inputs(torch.float32, 1, 16)
                F.mse_loss(unet(x, torch.tensor([500], device="cuda"), hidden).sample, target).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        steps(range(2))
        kept, state = [p.detach().clone() for p in trained], copy.deepcopy(optimizer.state_dict())
        steps(range(2, 4))
        whole = [p.detach().clone() for p in trained]
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state)
        steps(range(2, 4))
        different = sum(int((p != w).sum()) for p, w in zip(trained, whole, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    yield "resume, fp32", "bitwise equal" if not different else f"{different} entries differ"
    if different:
        raise RuntimeError(f"{different} entries differ after a resume")


def generation(arguments: argparse.Namespace) -> Iterator[Row]:
    """Denoising steps a second, merged and unmerged."""
    from ether_diffusion.adapters.attach import merge

    x, hidden, _ = inputs(torch.bfloat16, 2, arguments.latents)
    first = None
    for name in ("base", "ether_plus, merged", "ether_plus", "ether", "lora"):
        unet, _ = network(name.split(",")[0], torch.bfloat16)
        if name.endswith("merged"):
            merge(unet)

        def one(unet: Any = unet) -> None:
            with torch.no_grad():
                unet(x, torch.tensor([500], device="cuda"), hidden)

        seconds = timed(one, 20)
        first = first or seconds
        yield f"generation, bf16, {name}", f"{1 / seconds:.1f} UNet calls a second ({first / seconds:.3f} x base)"
        del unet


def timed(one: Callable[[], None], count: int) -> float:
    """Median seconds of a call, after three that are not timed."""
    seconds = []
    for number in range(count + 3):
        began = time.perf_counter()
        one()
        torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def stepper(method: str, dtype: torch.dtype, batch: int, latents: int, compiled: bool = False) -> Callable[[], None]:
    """A function that runs one training step."""
    unet, trained = network(method, dtype)
    if compiled:
        torch.compiler.reset()
        unet.compile_repeated_blocks(fullgraph=True)
    x, hidden, target = inputs(dtype, batch, latents)
    x.requires_grad_(method == "base")
    timesteps = torch.full((batch,), 500, device="cuda")
    optimizer = torch.optim.AdamW(trained or [x], lr=1e-4, fused=True)

    def one() -> None:
        F.mse_loss(unet(x, timesteps, hidden).sample.float(), target.float()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return one


def network(method: str, dtype: torch.dtype) -> tuple[Any, list[Any]]:
    """The UNet with random weights and an adapter, and what is trained."""
    from ether_diffusion.adapters.attach import attach, trainable_parameters
    from ether_diffusion.adapters.methods import METHODS as TABLE
    from ether_diffusion.models.stable_diffusion_v1 import build_unet

    torch.manual_seed(0)
    with torch.device("cuda"):
        unet: Any = build_unet()
    unet.to(dtype).requires_grad_(False)
    if method != "base":
        attach(unet, TABLE[method]())
    return unet.train(), list(trainable_parameters(unet).values())


def inputs(dtype: torch.dtype, batch: int, latents: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, text features and a target."""
    x = torch.randn(batch, 4, latents, latents, device="cuda", dtype=dtype)
    return x, torch.randn(batch, 77, 768, device="cuda", dtype=dtype), torch.randn_like(x)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The plain version in this block."""
    from ether_diffusion.ether import transform as T

    chosen, T._kernels = T._kernels, lambda *_: None
    try:
        yield
    finally:
        T._kernels = chosen


if __name__ == "__main__":
    raise SystemExit(main())
