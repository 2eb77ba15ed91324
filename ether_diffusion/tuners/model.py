"""Puts Naive or magnitude layers into a model: the methods' `BaseTuner`s."""

from __future__ import annotations

from torch import nn

from ether_diffusion.ether.weight_model import WeightModel

from .config import MagnitudeConfig, NaiveConfig
from .layer import MagnitudeLayer, NaiveLayer, divided_features


class NaiveModel(WeightModel):
    """A model whose target layers have their inputs multiplied by free blocks. Made from a `NaiveConfig`."""

    prefix: str = "naive_"
    tuner_layer_cls = NaiveLayer

    def _make_layer(self, target: nn.Module, adapter_name: str, config: NaiveConfig, name: str) -> NaiveLayer:
        return NaiveLayer(target, adapter_name, config, name)

    def _divided(self, config: NaiveConfig, name: str, layer: nn.Module) -> tuple[int, ...]:
        return divided_features(layer)


class MagnitudeModel(WeightModel):
    """A model whose target layers have their weights' rows scaled. Made from a `MagnitudeConfig`."""

    prefix: str = "magnitude_"
    tuner_layer_cls = MagnitudeLayer

    def _make_layer(self, target: nn.Module, adapter_name: str, config: MagnitudeConfig, name: str) -> MagnitudeLayer:
        return MagnitudeLayer(target, adapter_name, config, name)
