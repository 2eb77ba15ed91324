"""One script that checks and measures everything that needs a GPU, in at most 8 minutes, and prints one Markdown table.

    python benchmarks/gpu_check.py [--minutes 8] [--latents 64] [--write]
    python benchmarks/gpu_check.py --rehearse

Kernels against the plain version (variants, dtypes, shapes of Stable Diffusion v1.5); kernels a step by the profiler;
the training loop on the miniature: no step waits for the GPU, a gradient that is not finite changes nothing, a resumed
run is the same bit for bit with deterministic algorithms; fp16 gradient scaling for 50 steps; seconds and memory of a
step, in bf16 and fp16, batch 1 and 4, eager and compiled, of the methods of `training_step.py`; images a second, merged
and unmerged. Random weights, no downloads. A part that fails is a row that says so, and the others run; parts that the
time does not reach are named.

`--rehearse` runs the same code on a CPU, with a small UNet and interpreted kernels: it shows that the script works, and
its times mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# For products that are the same in every run; read before the first one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from training_step import METHODS, adapt

Row = tuple[str, str]
ROOT = Path(__file__).resolve().parents[1]
SHAPES = ((4096, 320), (1024, 640), (256, 1280), (77, 768))
"""Positions and features of SD1.5's attention at 512 pixels."""
SMALL_SHAPES = ((70, 48), (9, 64))
MAIN = ("base", "lora", "ether", "ether_plus")


class Machine:
    """What the parts run on: a GPU with SD1.5's UNet, or a CPU with a small one."""

    def __init__(self, rehearses: bool, latents: int) -> None:
        self.rehearses = rehearses
        self.device = torch.device("cpu" if rehearses else "cuda")
        self.latents = 8 if rehearses else latents
        self.small_latents = 8 if rehearses else 16
        self.shapes = SMALL_SHAPES if rehearses else SHAPES
        self.dtypes = (torch.bfloat16,) if rehearses else (torch.bfloat16, torch.float16)
        self.repeats, self.warmups = (1, 1) if rehearses else (10, 3)
        self.scaled_steps = 4 if rehearses else 50

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def network(self, method: str, dtype: torch.dtype) -> tuple[Any, list[Any], Any]:
        """The UNet with random weights and an adapter; what is trained; what has to live as long."""
        from ether_diffusion.models.families.stable_diffusion_v1 import build_unet

        torch.manual_seed(0)
        with self.device:
            unet: Any = small_unet() if self.rehearses else build_unet()
        unet.to(self.device, dtype).requires_grad_(False)
        kept, trained = adapt(unet, method)
        return unet.train(), trained, kept

    def inputs(
        self, unet: Any, dtype: torch.dtype, batch: int, latents: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, text features and a target."""
        x = torch.randn(batch, unet.config.in_channels, latents, latents, device=self.device, dtype=dtype)
        hidden = torch.randn(batch, 77, unet.config.cross_attention_dim, device=self.device, dtype=dtype)
        return x, hidden, torch.randn_like(x)

    def timesteps(self, batch: int) -> torch.Tensor:
        return torch.full((batch,), 500, device=self.device)

    def stepper(self, method: str, dtype: torch.dtype, batch: int, latents: int, compiled: bool = False) -> Any:
        """A function that runs one training step."""
        unet, trained, kept = self.network(method, dtype)
        if compiled:
            torch.compiler.reset()
            unet.compile_repeated_blocks(fullgraph=True, backend="eager" if self.rehearses else "inductor")
        x, hidden, target = self.inputs(unet, dtype, batch, latents)
        x.requires_grad_(method == "base")
        timesteps = self.timesteps(batch)
        optimizer = torch.optim.AdamW(trained or [x], lr=1e-4, fused=True)

        def one(_: Any = kept) -> None:
            F.mse_loss(unet(x, timesteps, hidden).sample.float(), target.float()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return one


def small_unet() -> Any:
    """Two blocks, one with attention, for interpreted kernels."""
    from diffusers import UNet2DConditionModel

    blocks: Any = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    sizes: Any = {"block_out_channels": (32,), "cross_attention_dim": 32, "attention_head_dim": 8}
    return UNet2DConditionModel(sample_size=8, layers_per_block=1, norm_num_groups=8, **blocks, **sizes)


def main() -> int:
    """Run all parts. Returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--latents", type=int, default=64)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rehearse", action="store_true", help="run on a CPU, to see whether the script works")
    how.add_argument("--write", action="store_true", help="write the table into docs/performance.md too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    elif not torch.cuda.is_available():
        print("No CUDA device: nothing was checked.")
        return 2
    from kernels import with_triton
    from performance_page import command, publish

    # transformers would take kernels.py for the package `kernels`, which it uses where it is installed.
    sys.modules.pop("kernels")
    sys.path.remove(str(Path(__file__).resolve().parent))
    machine = Machine(arguments.rehearse, arguments.latents)
    with with_triton() if arguments.rehearse else contextlib.nullcontext():
        rows, failed, seconds = run(machine, arguments)
    card = "a CPU, rehearsed" if arguments.rehearse else f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = [
        f"`{command()}` on {card}, torch {torch.__version__}, {seconds:.0f} s\n",
        "| check | result |",
        "|---|---|",
    ]
    publish("gpu", "\n".join([*lines, *(f"| {name} | {result} |" for name, result in rows)]), arguments.write)
    return int(failed)


def run(machine: Machine, arguments: argparse.Namespace) -> tuple[list[Row], bool, float]:
    """All rows, whether a check failed, and the seconds that it took."""
    began, rows, failed = time.perf_counter(), [], False
    for name in arguments.parts:
        part = PARTS[name]
        left = 60 * arguments.minutes - (time.perf_counter() - began)
        title = (part.__doc__ or part.__name__).splitlines()[0].rstrip(".")
        if left < 20:
            rows.append((title, "not reached in the time given"))
            continue
        try:
            # Each part yields rows and stops after the first one that ends past its time.
            for row in part(machine):
                rows.append(row)
                print(f"{row[0]}: {row[1]}", flush=True)
                if time.perf_counter() - began > 60 * arguments.minutes - 10:
                    rows.append((title, "cut short: the time given is over"))
                    break
        except Exception as error:
            failed = True
            rows.append((title, f"FAILED: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"))
            print(rows[-1], flush=True)
        machine.free()
    return rows, failed, time.perf_counter() - began


def kernels(machine: Machine) -> Iterator[Row]:
    """Kernels against the plain version."""
    from ether_diffusion.ether import transform as T

    if not machine.rehearses and T._load_kernels(torch.cuda.current_device()) is None:
        raise RuntimeError("the Triton kernels do not work here; the warning above says why")
    options: Any = {"device": machine.device}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
        worst = 0.0
        for (positions, features), plus, n, fixed in itertools.product(machine.shapes, (0, 1), (1, 4), (False, True)):
            torch.manual_seed(0)
            vectors = [torch.randn(n, features // n, **options, requires_grad=True) for _ in range(1 + plus)]
            x = torch.randn(2, positions, features, **options, dtype=dtype, requires_grad=True)
            bias = torch.randn(features, **options, dtype=dtype) if fixed else None
            g = torch.randn_like(x)

            def run(x=x, vectors=vectors, bias=bias, g=g) -> list[torch.Tensor]:
                y = T.transform(T.ether_plus(*vectors) if len(vectors) > 1 else T.ether(*vectors), x, fixed=bias)
                return [y, *torch.autograd.grad(y, [x, *vectors], g)]

            fused = run()
            with without_kernels():
                plain = run()
            worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fused, plain, strict=True)))
        yield f"kernels, {str(dtype)[6:]}", f"largest difference {worst:.1e} (allowed {tolerance:.0e})"
        if not worst <= tolerance:
            raise RuntimeError(f"{dtype}: off by {worst:.1e}")


def launches(machine: Machine) -> Iterator[Row]:
    """Launches of a step, by the profiler."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    activity, base = torch.profiler.ProfilerActivity, 0
    activities = [activity.CPU] if machine.rehearses else [activity.CUDA]
    adapted, *_ = machine.network("lora", torch.bfloat16)
    layers = sum(isinstance(module, BaseTunerLayer) for module in adapted.modules())
    for method in MAIN:
        one = machine.stepper(method, torch.bfloat16, 1, machine.small_latents)
        one()
        with torch.profiler.profile(activities=activities) as profile:
            one()
            machine.wait()
        kind = "CPU" if machine.rehearses else "CUDA"
        count = sum(event.count for event in profile.key_averages() if event.device_type.name == kind)
        base = base or count
        added = f", {(count - base) / layers:.1f} a layer" if method != "base" else ""
        yield f"launches a step, bf16, {method}", f"{count}{added}"


def loop(machine: Machine) -> Iterator[Row]:
    """The training loop on the miniature."""
    from ether_diffusion.config import load_config
    from ether_diffusion.errors import TrainingFailed
    from ether_diffusion.training import dreambooth
    from ether_diffusion.training.loop import Trainer
    from ether_diffusion.training.sharding import Copies

    plain = without_kernels() if machine.rehearses else contextlib.nullcontext()  # the interpreter takes minutes
    with tempfile.TemporaryDirectory() as folder, plain:

        def train(name: str, *overrides: str) -> Path:
            small = ["validation.prompts=[]", "training.tracker=none", f"data.cache_dir={folder}/encoded"]
            small += [f"output_dir={folder}/{name}", "training.checkpoint_every=4", "training.schedule=constant"]
            small += ["training.batch_size=1", "data.prior=null"] if machine.rehearses else []
            file = ROOT / "configs" / "quickstart" / "dreambooth.yaml"
            dreambooth.run(load_config(dreambooth.DreamBoothConfig, file, [*small, "training.log_every=4", *overrides]))
            return Path(folder) / name

        # From the second step on, an operation that makes the host wait is an error.
        step, gradients, update = Trainer._step, Copies.gradients, Trainer._update

        def strict_step(self: Trainer, number: int, batches: Any) -> Any:
            watched = number > self.start + 1 and machine.device.type == "cuda"
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                return step(self, number, batches)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        with patched(Trainer, _step=strict_step if machine.device.type == "cuda" else step):
            train("strict", "training.steps=8")
        yield "loop: steps between two reads", "not watched" if machine.rehearses else "none waits for the GPU"

        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                whole = train("whole", "training.steps=8")
                train("parts", "training.steps=4")
                parts = train("parts", "training.steps=8", "training.resume=true")
        finally:
            torch.use_deterministic_algorithms(False)
        different = differences(whole / "checkpoints" / "step-000008", parts / "checkpoints" / "step-000008")
        yield "loop: resumed run, fp32", "bitwise equal" if not different else f"{different} entries differ"
        if different:
            raise RuntimeError(f"{different} entries differ after a resume")

        # A NaN in the gradient of step 3, noticed after step 4.
        seen: list[list[torch.Tensor]] = []

        def poisoned(self: Copies, *arguments: Any, **options: Any) -> Any:
            losses = gradients(self, *arguments, **options)
            if len(seen) == 2:
                next(p for p in self.module.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan
            return losses

        def recorded(self: Trainer, accepted: torch.Tensor) -> None:
            update(self, accepted)
            average: Any = self.average
            states = [self.optimizer.optimizer.state[p] for p in self.trained.values()]
            tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
            seen.append([t.detach().clone() for t in (*self.trained.values(), *tensors, *average.shadow_params)])

        message = "no error"
        with patched(Copies, gradients=poisoned), patched(Trainer, _update=recorded):
            try:
                train("poisoned", "training.steps=8")
            except TrainingFailed as error:
                message = str(error)
        unchanged = all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
        yield (
            "loop: NaN in the gradient of step 3",
            f"{'changes nothing' if unchanged else 'CHANGES WEIGHTS'}; {message}",
        )
        if not unchanged or "at step 3" not in message:
            raise RuntimeError("a gradient that is not finite is not refused, or not reported")


def differences(one: Path, two: Path) -> int:
    """How many entries of two checkpoints' tensors differ."""
    from safetensors.torch import load_file

    count = 0
    for file in sorted(one.rglob("*.safetensors")):
        left, right = load_file(file), load_file(two / file.relative_to(one))
        count += sum(int((left[key] != right[key]).sum()) for key in left)
    return count


def gradient_scaling(machine: Machine) -> Iterator[Row]:
    """50 steps in fp16 with gradient scaling."""
    from ether_diffusion.training.config import TrainingSettings
    from ether_diffusion.training.optimizers import make_optimizer

    unet, trained, _ = machine.network("ether_plus", torch.float16)
    settings = TrainingSettings(steps=50)
    optimizer = make_optimizer(settings, [{"params": trained, "lr": 1e-3}], machine.device)
    scaler = torch.amp.GradScaler(machine.device.type)
    x, hidden, target = machine.inputs(unet, torch.float16, 1, 8 if machine.rehearses else 32)
    losses, refused = [], torch.zeros((), device=machine.device)
    for _ in range(machine.scaled_steps):
        loss = F.mse_loss(unet(x, machine.timesteps(1), hidden).sample.float(), target.float())
        scaler.scale(loss).backward()
        optimizer.refused = refused  # pyright: ignore[reportAttributeAccessIssue]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    finite = all(parameter.isfinite().all() for parameter in trained)
    first, last = losses[0].item(), losses[-1].item()
    yield f"fp16, {machine.scaled_steps} steps", f"loss {first:.4f} -> {last:.4f}, scale {scaler.get_scale():.0f}"
    if not finite or not (last < first or machine.rehearses):
        raise RuntimeError("the vectors are not finite, or the loss did not fall")


def step_times(machine: Machine) -> Iterator[Row]:
    """Seconds and memory of a step."""
    yield from measured(machine, MAIN, False, (1, 4))


def compiled_step_times(machine: Machine) -> Iterator[Row]:
    """Seconds and memory of a compiled step."""
    yield from measured(machine, MAIN, True, (1, 4))


def other_step_times(machine: Machine) -> Iterator[Row]:
    """Seconds and memory of a step with other methods."""
    others = [name for name in METHODS if name not in MAIN and name != "diag_oft"]  # of a package that is optional
    yield from measured(machine, ("base", *others), False, (1,))


def measured(machine: Machine, methods: tuple[str, ...], compiled: bool, batches: tuple[int, ...]) -> Iterator[Row]:
    """A row for each dtype, batch and method, with ratios over the first method."""
    from ether_diffusion.training.environment import peak_memory

    batches = batches[:1] if machine.rehearses else batches
    for dtype, batch in itertools.product(machine.dtypes, batches):
        first = None
        for method in methods:
            one = machine.stepper(method, dtype, batch, machine.latents, compiled)
            for _ in range(machine.warmups):
                one()
            machine.wait()
            machine.free()
            seconds = timed(machine, one, machine.repeats)
            found = seconds, peak_memory(machine.device) / 1e9
            first = first or found
            how = "compiled" if compiled else "eager"
            yield (
                f"step, {str(dtype)[6:]}, batch {batch}, {how}, {method}",
                f"{1000 * found[0]:.1f} ms ({found[0] / first[0]:.3f} x base), "
                f"{found[1]:.2f} GB ({found[1] / first[1]:.3f} x base)",
            )
            del one
            machine.free()


def generation(machine: Machine) -> Iterator[Row]:
    """Denoising steps a second, merged and unmerged."""
    from ether_diffusion.adapters.attach import merge

    first = None
    for name in ("base", "ether_plus, merged", "ether_plus", "ether", "lora"):
        unet, _, _ = machine.network(name.split(",")[0], torch.bfloat16)
        if name.endswith("merged"):
            merge(unet)
        x, hidden, _ = machine.inputs(unet, torch.bfloat16, 2, machine.latents)

        def one(unet: Any = unet, x: Any = x, hidden: Any = hidden) -> None:
            with torch.no_grad():
                unet(x, machine.timesteps(2), hidden)

        for _ in range(machine.warmups):
            one()
        seconds = timed(machine, one, 2 * machine.repeats)
        first = first or seconds
        yield f"generation, bf16, {name}", f"{1 / seconds:.1f} UNet calls a second ({first / seconds:.3f} x base)"
        del unet


PARTS: dict[str, Callable[[Machine], Iterator[Row]]] = {
    part.__name__: part
    for part in (
        kernels,
        launches,
        loop,
        gradient_scaling,
        step_times,
        generation,
        compiled_step_times,
        other_step_times,
    )
}


def timed(machine: Machine, one: Callable[[], None], count: int) -> float:
    """Median seconds of a call."""
    seconds = []
    machine.wait()
    for _ in range(count):
        began = time.perf_counter()
        one()
        machine.wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """The plain version in this block."""
    from ether_diffusion.ether import transform as T

    with patched(T, _kernels=lambda *_: None):
        yield


@contextlib.contextmanager
def patched(owner: Any, **replacements: Any) -> Iterator[None]:
    """Attributes of a module or class replaced in this block."""
    before = {name: getattr(owner, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


if __name__ == "__main__":
    raise SystemExit(main())
