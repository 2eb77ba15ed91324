"""Puts ETHER layers into a model: the method's `BaseTuner`."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from .config import EtherConfig
from .layer import NARROWEST, EtherConv2d, EtherLayer, EtherLinear, transformed_features
from .weight_model import WeightModel


class EtherModel(WeightModel):
    """A model whose target layers are adapted by ETHER or ETHER+.

    Made by `get_peft_model`, `inject_adapter_in_model` or diffusers' `add_adapter` from an `EtherConfig`.

    Example:
        >>> import ether_diffusion
        >>> unet.add_adapter(ether_diffusion.EtherConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    """

    prefix: str = "ether_"
    tuner_layer_cls = EtherLayer
    narrowest_block: ClassVar[int] = NARROWEST

    def _make_layer(self, target: nn.Module, adapter_name: str, config: EtherConfig, name: str) -> EtherLayer:
        wrapper = EtherConv2d if isinstance(target, nn.Conv2d) else EtherLinear
        return wrapper(target, adapter_name, config, name)

    def _divided(self, config: EtherConfig, name: str, layer: nn.Module) -> tuple[int, ...]:
        return transformed_features(layer, config.sides_of(name))
