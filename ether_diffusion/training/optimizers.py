"""The table of optimisers. Packages other than torch are imported where they are used."""

from __future__ import annotations

import importlib
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ether_diffusion.errors import UserError

from .config import TrainingSettings

FUSED = ("cuda",)
"""Devices whose AdamW is fused and takes the mask of a refused step: one kernel for all weights, or a group of them.
The CPU, which reads without a wait whether a step is refused, keeps torch's plain AdamW: it rounds in another order."""

OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("torch", "optim.AdamW", {}),
    "adamw_8bit": ("bitsandbytes", "optim.AdamW8bit", {}),
    "prodigy": ("prodigyopt", "Prodigy", {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}),
}
"""By name: the package, the class in it, and options besides those of the settings."""


class MaskedAdamW(torch.optim.AdamW):
    """Fused AdamW that refuses a step on the device: weights, moments and counts stay as they are."""

    refused: Tensor | None = None
    """1 where the next step is refused, else 0: a scalar in fp32. A gradient scaler's own refusal counts as well."""
    whole: MaskedAdamW | None = None
    """Takes the steps of all weights as one tensor."""

    def step(self, closure: Any = None) -> Any:
        scalers: Tensor | None = getattr(self, "found_inf", None)
        if self.refused is not None:
            self.found_inf = self.refused if scalers is None else torch.maximum(self.refused, scalers.to(self.refused))
        if self.whole is None:
            result = super().step(closure)
        else:
            for name in ("found_inf", "grad_scale"):
                setattr(self.whole, name, getattr(self, name, None))
            self.whole.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            result = self.whole.step(closure)
        self.found_inf, self.refused = scalers, None
        return result

    def use_whole(self, weights: Tensor) -> None:
        """Take further steps on one tensor, with its gradient, of which the weights of the one group are views.

        The moments become views too, so that the state is what it is without this.
        """
        (group,) = self.param_groups
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
        self.whole = MaskedAdamW([weights], **options)
        step = torch.zeros((), device=weights.device)
        moments = {key: torch.zeros_like(weights) for key in ("exp_avg", "exp_avg_sq")}
        for parameter in group["params"]:
            known = self.state[parameter]
            views = {key: view_like(moment, parameter, weights) for key, moment in moments.items()}
            if known:
                step.copy_(known["step"])
                for key, view in views.items():
                    view.copy_(known[key])
            self.state[parameter] = {"step": step, **views}
        self.whole.state[weights] = {"step": step, **moments}


def view_like(whole: Tensor, part: Tensor, of: Tensor) -> Tensor:
    """The place in a flat tensor that a part has in another one, of which it is a view."""
    start = part.storage_offset() - of.storage_offset()
    return whole[start : start + part.numel()].view_as(part)


def make_optimizer(
    settings: TrainingSettings, groups: list[dict[str, Any]], device: torch.device | None = None
) -> torch.optim.Optimizer:
    """The optimiser of the settings for parameter groups with their `lr`.

    Args:
        device: Where it will run; default: the CPU.

    Raises:
        UserError: it is not installed.
    """
    package, name, options = OPTIMIZERS[settings.optimizer]
    try:
        optimizer = attrgetter(name)(importlib.import_module(package))
    except ImportError:
        missing = f"{settings.optimizer} needs a package that is not installed: pip install {package}"
        raise UserError(f"training.optimizer: {missing}") from None
    if optimizer is torch.optim.AdamW and (device or torch.device("cpu")).type in FUSED:
        optimizer, options = MaskedAdamW, {"fused": True}
    return optimizer(groups, betas=settings.betas, weight_decay=settings.weight_decay, eps=settings.epsilon, **options)
