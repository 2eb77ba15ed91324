"""`ether-diffusion doctor`: whether this machine can train, and which optional parts work, one line each."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from .arguments import Commands

OPTIONAL = {
    "bitsandbytes": "8-bit AdamW, 4-bit and 8-bit bases",
    "torchao": "int8 bases",
    "prodigyopt": "the optimiser Prodigy",
    "wandb": "training.tracker=wandb",
    "tensorboard": "training.tracker=tensorboard",
    "ray": "benchmarks on several machines",
    "matplotlib": "plots of analyze",
    "controlnet_aux": "conditions made from photos",
    "pillow_heif": "HEIC photos",
    "deepspeed": "ZeRO over several GPUs",
}
"""Packages that training does not need, and what they are for."""


BASE_FILES = (
    "model_index.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
"""Of a base on the hub, what training reads of it."""


@dataclass(frozen=True)
class Finding:
    """One line of the answer."""

    name: str
    state: str
    """`ok`, `note` (it works without), or `fault` (training could not start)."""
    text: str


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "doctor",
        run,
        "check this machine",
        "Say which versions, devices, memory and optional parts are here, and whether a base is in the cache, one line "
        "each. Exit code 2 if training could not start.",
    )
    parser.add_argument("--base", metavar="NAME|DIR|FILE", help="the base to look for (default: Stable Diffusion v1.5)")
    parser.add_argument("--json", action="store_true", help="print a JSON list of name, state and text")


def run(arguments: Namespace) -> None:
    """Print the findings. Raises UserError, after them, if one is a fault."""
    from ether_diffusion.errors import UserError

    findings = [*_versions(), *_devices(), *_room(), *_optional(), _base(arguments.base)]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.state:<5} {finding.name:<{width}}  {finding.text}")
    faults = [finding.name for finding in findings if finding.state == "fault"]
    if faults:
        raise UserError(f"training could not start here: {', '.join(faults)}.")


def _versions() -> list[Finding]:
    """Python, and the packages that this one needs, against the ranges that it states."""
    from packaging.requirements import Requirement

    found = [Finding("Python", "ok", f"{platform.python_version()} on {platform.platform(terse=True)}")]
    for text in importlib.metadata.requires("ether-diffusion") or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(needed.name, "fault", f"not installed; expected {needed.specifier}"))
            continue
        fits = needed.specifier.contains(version, prereleases=True)
        found.append(
            Finding(
                needed.name, "ok" if fits else "fault", version if fits else f"{version}; expected {needed.specifier}"
            )
        )
    return found


def _devices() -> list[Finding]:
    import torch

    from ether_diffusion.training.environment import gpu_problem

    found = []
    for k in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts, (free, total) = torch.cuda.get_device_properties(k), torch.cuda.mem_get_info(k)
        half = "bf16 and fp16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16, no bf16"
        text = f"{facts.name}, {_gib(free)} of {_gib(total)} free, {half}"
        found.append(Finding(f"cuda:{k}", "ok", text))
    if torch.backends.mps.is_available():
        found.append(Finding("mps", "ok", "Apple's GPU"))
    if not found:
        found.append(Finding("GPU", "note", f"none can be used: {gpu_problem()}. Training on the CPU takes hours"))
    return [*found, Finding("CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]


def _room() -> list[Finding]:
    """Memory, and the disk of this folder and of the hub's cache."""
    import psutil
    from huggingface_hub.constants import HF_HUB_CACHE

    memory = psutil.virtual_memory()
    found = [Finding("memory", "ok", f"{_gib(memory.available)} of {_gib(memory.total)} available")]
    for name, folder in (("this folder", Path.cwd()), ("the hub's cache", Path(HF_HUB_CACHE))):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
        state = "ok" if writable else "fault" if folder == Path.cwd() else "note"
        text = f"{folder}: {_gib(free)} free" + ("" if writable else "; it cannot be written")
        found.append(Finding(name, state, text))
    return found


def _optional() -> list[Finding]:
    """The packages that can be imported, which takes seconds: one that is only installed may lack a library."""
    found = []
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            found.append(Finding(module, "note", f"not installed: no {purpose}"))
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                importlib.import_module(module)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            found.append(Finding(module, "note", f"installed, but cannot be imported ({reason}): no {purpose}"))
        else:
            found.append(Finding(module, "ok", purpose))
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    text = compiler or "not found: no training.compile"
    return [*found, Finding("C++ compiler", "ok" if compiler else "note", text)]


def _base(name: str | None) -> Finding:
    """Whether a base can be loaded without the network; no weight is read."""
    from huggingface_hub import constants, try_to_load_from_cache

    from ether_diffusion.errors import UserError
    from ether_diffusion.models.bases import DEFAULT_BASE, check_base

    name = name or DEFAULT_BASE
    try:
        check_base(name)
    except UserError as error:
        return Finding("base", "fault", str(error))
    if Path(name).exists() or name == "tiny":
        return Finding("base", "ok", name)
    missing = [file for file in BASE_FILES if not isinstance(try_to_load_from_cache(name, file), str)]
    if not missing:
        return Finding("base", "ok", f"{name} is in the cache")
    where = "is not in the cache" if missing == list(BASE_FILES) else f"is in the cache without {missing[0]}"
    if constants.HF_HUB_OFFLINE:
        return Finding("base", "fault", f"{name} {where}, and HF_HUB_OFFLINE is set: `hf download {name}` first")
    return Finding("base", "note", f"{name} {where}: the first training downloads it, or `hf download {name}`")


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"
