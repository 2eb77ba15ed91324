"""A frozen Linear or Conv2d under adapters, each of which makes another weight of the one it finds: what they share."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from . import transform as T
from .frozen import is_offloaded, layer_features, merge_problem


class WeightLayer(BaseTunerLayer):
    """Strengths, active adapters and merging of adapters that turn a weight W into W'.

    An adapter of scale s gives the layer the weight W + s (W' - W), in the forward pass as in the merged weight.
    Several active adapters apply in their order: each one transforms the layer that the ones before it have made.

    A method says what W' is, once on activations (`_adapted`) and once as a weight (`_weight_change`), and keeps what
    it trains in module dictionaries by adapter, which `adapter_layer_names` lists. Every adapter is in the first one.
    """

    method: ClassVar[str]
    """The method's name for people."""
    other_param_names = ("r", "scaling")

    # Dimension of the activations that holds features, or channels.
    channel_dim: int
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = layer_features(self.get_base_layer())
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.scaling: dict[str, float] = {}
        # diffusers names unnamed adapters by the length of `r`, which is a rank in LoRA and the number of blocks here.
        self.r: dict[str, int] = {}
        # PEFT's `disable_input_dtype_casting`, in diffusers' layerwise casting, sets this on every layer. Nothing here
        # casts the base layer's input.
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged_weight: Tensor | None = None

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x under these adapters, the last one outermost."""
        raise NotImplementedError

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        """W' - W for a weight W (out, in) or (out, in, kh, kw), in at least single precision."""
        raise NotImplementedError

    def _dicts(self) -> list[nn.ModuleDict]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def _place(self, adapter_name: str, trained: nn.Module, into: nn.ModuleDict) -> None:
        """Take up what an adapter trains, where the base layer is."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is not None and not any(parameter.is_meta for parameter in trained.parameters()):
            trained.to(device)
        into[adapter_name] = trained

    def _vector_dtype(self) -> torch.dtype:
        """Of what an adapter trains: at least single precision."""
        return T.at_least_single(self._get_base_layer_device_and_dtype(self.get_base_layer())[1])

    def store_in_base_dtype(self, adapter_name: str) -> None:
        """Round what the adapter trains to the base weight's dtype, where that is a floating one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for trained in self._dicts():
            if adapter_name in trained and dtype is not None and dtype.is_floating_point:
                trained[adapter_name].to(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the layer with the adapted weight. Same shapes and dtypes as the base layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [] if self.merged else self._active()
        return self._adapted(x, names, *args, **kwargs) if names else self.base_layer(x, *args, **kwargs)

    def _bias(self, x: Tensor) -> Tensor | None:
        """The base layer's bias; where that is a placeholder between calls, what the layer makes of zeros."""
        base_layer: Any = self.get_base_layer()
        bias = base_layer.bias
        if bias is None or x.device.type == "meta":
            return bias
        if bias.device.type == "meta" or bias.numel() != self.out_features or is_offloaded(base_layer):
            at_zero = self.base_layer(x.new_zeros(self._zero_input_shape()))
            return at_zero.reshape(self.out_features, -1)[:, 0]
        return bias

    def _zero_input_shape(self) -> tuple[int, ...]:
        """Of the smallest input that gives one output position."""
        layer: Any = self.get_base_layer()
        if isinstance(layer, nn.Linear):
            return (1, self.in_features)
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (1, self.in_features, *reach)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the adapter's strength: 0 is the base layer, 1 the adapter as trained. Other names are ignored."""
        if adapter in self.scaling:
            self.scaling[adapter] = float(scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for name in self._active():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strength of the active adapters, or reset it to 1 if no scale is given."""
        for name in self._active():
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What this adapter alone adds to the base weight at its scale: (out, in) or (out, in, kh, kw)."""
        weight = self._float_weight()
        with torch.no_grad():
            return self.scaling[adapter] * self._weight_change(adapter, weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters (default: the active ones) into the base weight; the weight before is kept for `unmerge`.

        Raises:
            ValueError: `safe_merge` is set and the merged weight is not finite; or the base weight is quantised, or
                offloaded and not here.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self._dicts()[0]]
        if not names:
            return
        base_weight = self._float_weight()
        merged = base_weight
        with torch.no_grad():
            for name in names:
                change = self._weight_change(name, merged)
                merged = merged.to(change.dtype) + self.scaling[name] * change
        merged = merged.to(base_weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"The merged weight is not finite: adapter {', '.join(names)} seems to be broken.")
        if not self.merged:
            self._unmerged_weight = base_weight
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        merged, kept = self.get_base_weight(), self._unmerged_weight
        assert kept is not None
        self.set_base_weight(kept.to(device=merged.device, dtype=merged.dtype))
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def _float_weight(self) -> Tensor:
        problem = merge_problem(self.get_base_layer())
        if problem:
            raise ValueError(problem)
        return self.get_base_layer().weight.data  # pyright: ignore[reportReturnType]
