"""Puts Naive or magnitude layers into a model: the methods' `BaseTuner`s."""

from __future__ import annotations

from ether_diffusion.ether.weight_model import WeightModel

from .layer import MagnitudeLayer, NaiveLayer


class NaiveModel(WeightModel):
    """A model whose target layers have their inputs multiplied by free blocks. Made from a `NaiveConfig`."""

    prefix: str = "naive_"
    tuner_layer_cls = NaiveLayer


class MagnitudeModel(WeightModel):
    """A model whose target layers have their weights' rows scaled. Made from a `MagnitudeConfig`."""

    prefix: str = "magnitude_"
    tuner_layer_cls = MagnitudeLayer
