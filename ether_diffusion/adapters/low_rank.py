"""The change of each adapted weight, `W' - W`: in closed form as a LoRA, `up @ down`, or dense."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.errors import UserError

from .methods import facts_of
from .saved_adapter import SavedAdapter


class FullRankError(UserError):
    """No LoRA file holds what an adapter does."""


class LowRank(NamedTuple):
    """Factors of the change of one weight, which is (out, in) or (out, in, kh, kw)."""

    up: Tensor
    """(out, rank)"""
    down: Tensor
    """(rank, in) or (rank, in, kh, kw)"""

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """The change itself, in the shape of the weight."""
        return torch.tensordot(self.up, self.down, dims=1)

    def balanced(self) -> LowRank:
        """The same change with columns of `up` as long as rows of `down`, so that half precision has room for both."""
        out, into = self.up.norm(dim=0), self.down.flatten(1).norm(dim=1)
        both = (out > 0) & (into > 0)
        ratio = torch.where(both, (into / out.clamp_min(torch.finfo(out.dtype).tiny)).sqrt(), 0)
        back = torch.where(both, 1 / ratio.clamp_min(torch.finfo(out.dtype).tiny), 0)
        return LowRank(self.up * ratio, self.down * back.reshape(-1, *[1] * (self.down.ndim - 1)))

    def at_most_full(self) -> LowRank:
        """The same change with no more ranks than the smaller side of the matrix has entries."""
        out, into = self.up.shape[0], self.down[0].numel()
        if self.rank <= min(out, into):
            return self
        dense = self.dense()
        eye = torch.eye(min(out, into), dtype=dense.dtype, device=dense.device)
        return LowRank(eye, dense) if out <= into else LowRank(dense.flatten(1), eye.reshape(-1, *dense.shape[1:]))

    def truncated(self, rank: int) -> LowRank:
        """The nearest change of at most this rank, in the Frobenius norm."""
        if self.rank <= rank:
            return self
        q_up, r_up = torch.linalg.qr(self.up)
        q_down, r_down = torch.linalg.qr(self.down.flatten(1).T)
        u, s, vh = torch.linalg.svd(r_up @ r_down.T)
        up = q_up @ (u[:, :rank] * s[:rank])
        return LowRank(up, (vh[:rank] @ q_down.T).reshape(-1, *self.down.shape[1:]))


Change = LowRank | Tensor
"""The change of one weight: its factors, or itself, in the shape of the weight."""


@torch.no_grad()
def weight_changes(model: nn.Module, saved: SavedAdapter, name: str = "default") -> dict[str, Change]:
    """The change of each weight that a loaded adapter adapts, by the layer's name, at the adapter's scale.

    Args:
        model: Carries the adapter. Its weights are plain ones in single or double precision.
        saved: What was loaded.

    Returns:
        Factors where the method has a closed form; else the change as merging makes it.
    """
    facts, found = facts_of(saved.config), {}
    for path, layer in adapted_layers(model, name).items():
        factors = facts.low_rank(layer, name)
        if factors is None:
            found[path] = merged_change(layer)[0]
            continue
        up, down = (factor.detach().to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors)
        found[path] = LowRank(up, down).at_most_full().balanced()
    return found


def low_rank_changes(model: nn.Module, saved: SavedAdapter, name: str = "default") -> dict[str, LowRank]:
    """As `weight_changes`, as factors alone.

    Raises:
        FullRankError: the method's changes have no low rank; says which rank they have.
    """
    found = weight_changes(model, saved, name)
    full = [min(change.shape[0], change[0].numel()) for change in found.values() if isinstance(change, Tensor)]
    if full:
        raise full_rank(saved, max(full))
    return {path: change for path, change in found.items() if isinstance(change, LowRank)}


def full_rank(saved: SavedAdapter, rank: int) -> FullRankError:
    """The error of an adapter whose changes have at most this rank."""
    return FullRankError(
        f"{saved.folder}: the changes that {saved.method} makes to weights have full rank, here up to {rank}, and "
        "no LoRA file of a low rank holds them. Take --format merged."
    )


def adapted_layers(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The layers that an adapter of this name adapts, by their names."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        and any(name in getattr(module, key) for key in module.adapter_layer_names)
    }


@torch.no_grad()
def merged_change(layer: Any) -> tuple[Tensor, Tensor]:
    """What merging does to an adapted layer's weight, and the weight; the layer is then as it was."""
    weight = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge(safe_merge=True)
    change = layer.get_base_layer().weight.detach() - before
    layer.merged_adapters.clear()
    layer.get_base_layer().weight.data = before
    return change, before
