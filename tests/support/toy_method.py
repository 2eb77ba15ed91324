"""A method that the package does not know: gains, W' = (1 + g) W with one trained number g a layer.

All of it is here: the tuner, which PEFT learns about when this module is imported, and the settings class, an entry of
the table of methods. `gain_method` adds the entry by one call and takes it out again.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ether_diffusion.adapters.method_settings import MethodSettings
from ether_diffusion.adapters.methods import METHODS, register_method
from ether_diffusion.ether.registry import register
from ether_diffusion.ether.weight_config import WeightConfig
from ether_diffusion.ether.weight_layer import WeightLayer
from ether_diffusion.ether.weight_model import WeightModel


class GainPeftType(str, enum.Enum):
    GAIN = "GAIN"


@dataclass
class GainConfig(WeightConfig):
    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = GainPeftType.GAIN  # pyright: ignore[reportAttributeAccessIssue]


class Gain(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros((), dtype=dtype))

    def forward(self) -> Tensor:
        return self.value


class GainLayer(WeightLayer):
    method: ClassVar[str] = "Gain"
    adapter_layer_names = ("gain_values",)
    gain_values: nn.ModuleDict

    def _make(self, config: GainConfig, module_name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        return {"gain_values": Gain(dtype)}

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        z, bias = self.base_layer(x, *args, **kwargs), self._bias(x)
        fixed = 0 if bias is None else bias.reshape(-1, *(1 for _ in range(z.ndim - 1 - self.channel_dim % z.ndim)))
        for name in names:
            z = z + (self.scaling[name] * self.gain_values[name]() * (z - fixed)).to(z.dtype)
        return z

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        return self.gain_values[name]() * weight


class GainModel(WeightModel):
    prefix: str = "gain_"
    tuner_layer_cls = GainLayer


register(GainPeftType.GAIN, GainConfig, GainModel)


class GainSettings(MethodSettings):
    title = "Gain"
    peft_type = GainPeftType.GAIN.value
    paper = "https://example.org/gain"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 1e-2, "controllable": 1e-2}
    method: Literal["gain"] = "gain"


@contextlib.contextmanager
def gain_method() -> Iterator[type[GainSettings]]:
    """Add the method to the table, for as long as the block runs: other tests go through the table as it ships."""
    register_method(GainSettings)
    try:
        yield GainSettings
    finally:
        METHODS.pop("gain", None)
