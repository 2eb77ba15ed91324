"""Puts ETHER layers into a model: the method's `BaseTuner`."""

from __future__ import annotations

from .layer import EtherLayer
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
