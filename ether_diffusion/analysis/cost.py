"""The cost of a forward and a backward pass (paper, Table 1): FLOPs counted on meta tensors, which need no memory.

`torch.utils.flop_counter` counts matrix products, convolutions and attention, two FLOPs per multiply-add, and no
elementwise operations. Base weights are frozen: the backward pass computes gradients of activations, down to the first
adapted layer, and of trained parameters.

Two ways to apply the same transform H are counted:

    on activations   weight @ (H x), from H's vectors: what this package runs
    dense            (weight @ H) @ x, with H built as a matrix: what the authors' language-model code runs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ether_diffusion.ether import transform as T

Variant = Literal["ether", "ether_plus"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward and one backward pass."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Subject:
    """A model whose passes are counted.

    Attributes:
        build: Builds it on the current default device.
        inputs: Arguments of its forward, on the current default device. Without an adapter, gradients flow to the
            first.
        layers: Endings of the names of adapted linear layers.
        fused: Those of them whose weights the authors' code keeps as one, stacked by rows, under one transform.
        note: The size of the input.
    """

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    layers: tuple[str, ...]
    fused: tuple[str, ...] = ()
    note: str = ""


def count_passes(subject: Subject, config: PeftConfig | None = None) -> Flops:
    """Count the model with any tuner of PEFT; without one, the frozen model with gradients to its input."""
    model = _frozen(subject)
    if config is not None:
        with torch.device("meta"):
            inject_adapter_in_model(config, model)
    return _count(model, subject, {})


def count_dense(subject: Subject, variant: Variant, num_blocks: int) -> Flops:
    """Count ETHER or ETHER+ with transforms that are built as matrices and multiplied with the weights."""
    model, vectors = _frozen(subject), 1 + (variant == "ether_plus")  # of a transform; as many as sides
    with torch.device("meta"):
        normals = {
            group: [
                [torch.empty(num_blocks, width // num_blocks, requires_grad=True) for _ in range(vectors)]
                for width in (columns, rows)[:vectors]
            ]
            for group, (rows, columns) in group_shapes(model, subject).items()
        }
    return _count(model, subject, normals)


def dense_weight(weight: Tensor, normals: Sequence[Sequence[Tensor]]) -> Tensor:
    """`H_out @ weight @ H_in`, with both as matrices.

    Args:
        weight: (rows, columns).
        normals: For the input's transform and, if there is one, the output's: u, or u and v, each (n, width / n).
    """
    for side, vectors in enumerate(normals):
        change = T.ether(*vectors) if len(vectors) == 1 else T.ether_plus(*vectors)
        n, _, b = change.left.shape
        # Elementwise, so that only the product with the weight is counted.
        blocks = torch.eye(b, device=weight.device) + (change.left.unsqueeze(-1) * change.right.unsqueeze(-2)).sum(1)
        weight = weight if side == 0 else weight.T  # transforms are symmetric
        weight = torch.bmm(weight.reshape(-1, n, b).transpose(0, 1), blocks).transpose(0, 1).flatten(1)
        weight = weight if side == 0 else weight.T
    return weight


def dense_products(shapes: Sequence[tuple[int, int]], num_blocks: int, inner: bool = True, outer: bool = False) -> int:
    """FLOPs of the dense products with weights of these shapes (rows f, columns d), in closed form.

    `weight @ H_in` costs 2 f d^2 / n and `H_out @ weight` 2 f^2 d / n, in the forward pass, and again in the backward
    pass for the gradients of H_in and H_out. With both sides, the backward pass has 2 f^2 d / n once more, for the
    gradient of `weight @ H_in`.

    Args:
        inner: Count the input's side.
        outer: Count the output's side.
    """
    return sum(2 * f * d * (d * inner + f * outer) // num_blocks for f, d in shapes)


def group_shapes(model: nn.Module, subject: Subject) -> dict[tuple[str, ...], tuple[int, int]]:
    """Shapes (rows, columns) of the weights that dense transforms multiply, by the names of their layers."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, module in model.named_modules():
        ending = next((one for one in subject.layers if name == one or name.endswith(f".{one}")), None)
        if ending is not None and isinstance(module, nn.Linear):
            parent = name.removesuffix(ending)
            groups.setdefault((parent, "" if ending in subject.fused else ending), []).append(name)
    weights = {tuple(names): [_weight(model, name) for name in names] for names in groups.values()}
    return {names: (sum(w.shape[0] for w in found), found[0].shape[1]) for names, found in weights.items()}


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _frozen(subject: Subject) -> nn.Module:
    with torch.device("meta"):
        return subject.build().requires_grad_(False)


def _count(model: nn.Module, subject: Subject, normals: Mapping[tuple[str, ...], Sequence[Sequence[Tensor]]]) -> Flops:
    """Count a pass, with dense transforms of these groups of weights if there are any."""
    with torch.device("meta"):
        inputs = dict(subject.inputs())
    if not normals and not any(parameter.requires_grad for parameter in model.parameters()):
        next(iter(inputs.values())).requires_grad_(True)
    # The plain form of attention: every device has it, and its products are counted.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            weights: dict[str, Tensor] = {}
            for names, sides in normals.items():
                parts = [_weight(model, name) for name in names]
                made = dense_weight(torch.cat(parts), sides).split([len(part) for part in parts])
                weights |= {f"{name}.weight": part for name, part in zip(names, made, strict=True)}
            output: Any = torch.func.functional_call(model, weights, kwargs=inputs)
            loss = output[0].float().square().sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return Flops(forward.get_total_flops(), backward.get_total_flops())
