"""What a run folder or a checkpoint holds, and whether two of them hold the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ether_diffusion.files import list_checkpoints, step_of

Tensors = Mapping[str, Tensor] | Path
"""Named tensors, or the safetensors file that holds them."""


def weights(folder: Path, part: str = "adapter") -> dict[str, Tensor]:
    """The adapter's weights; `part="adapter/text_encoder"` reads the text encoder's adapter."""
    return load_file(folder / part / "adapter_model.safetensors")


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """All that was trained (adapters, condition encoder, whole modules) in a run or a checkpoint, keys by file."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*.safetensors"))}
    parts = {name: path for name, path in files.items() if len(name.parts) > 1 and name.parts[0] != "checkpoints"}
    assert parts, f"{folder} holds no weights"
    return {f"{name.parent}/{key}": tensor for name, path in parts.items() for key, tensor in load_file(path).items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without their wall-clock times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


def same(left: Tensors, right: Tensors) -> bool:
    """Whether both have the same keys and, bit for bit, the same tensors."""
    one, two = _read(left), _read(right)
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def assert_same_run(left: Path, right: Path, checkpoint: str | None = None) -> None:
    """Both have the same weights and metrics, and the same state of training in this checkpoint, bit for bit."""
    assert same(trained_weights(left), trained_weights(right))
    assert metrics(left) == metrics(right)
    if checkpoint is not None:
        states = [sorted((run / "checkpoints" / checkpoint).glob("*.safetensors")) for run in (left, right)]
        assert [file.name for file in states[0]] == [file.name for file in states[1]]
        assert "optimizer.safetensors" in [file.name for file in states[0]]
        assert all(same(*pair) for pair in zip(*states, strict=True))


def stopped_after(run: Path, step: int, folder: Path) -> Path:
    """A copy of the run as it would be if it had been killed after this checkpoint. Returns the folder."""
    shutil.copytree(run, folder)
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if (step_of(checkpoint) or 0) > step:
            shutil.rmtree(checkpoint)
    return folder


def difference(left: Tensors, right: Tensors) -> float:
    """The largest absolute difference of two sets of tensors with the same keys and dtypes."""
    one, two = _read(left), _read(right)
    assert one.keys() == two.keys()
    assert all(one[key].dtype == two[key].dtype for key in one)
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def _read(tensors: Tensors) -> Mapping[str, Tensor]:
    return load_file(tensors) if isinstance(tensors, Path) else tensors
