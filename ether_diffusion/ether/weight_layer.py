"""A frozen Linear or Conv2d with adapters that change its weight: what the layers of all such methods share."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from . import transform as T
from .frozen import is_offloaded, layer_features, layer_problem, merge_problem


class WeightLayer(nn.Module, BaseTunerLayer):
    """Scales, active adapters and merging of adapters that change the weight W of a Linear or Conv2d to W'.

    An adapter of scale s gives the layer the weight W + s (W' - W), in the forward pass as in the merged weight.
    Several active adapters apply in their order: each one changes the layer as the ones before it left it.

    A method makes the modules that an adapter trains (`_make`); they are kept by adapter in the module dictionaries
    that `adapter_layer_names` lists, and every adapter is in the first one. The method defines W' twice: on activations
    (`_adapted`) and as a weight (`_weight_change`).
    """

    method: ClassVar[str]
    """The method's name for people."""
    narrowest_block: ClassVar[int] = 1
    """Least width of a block, where a method divides a layer's features into blocks."""
    other_param_names = ("r", "scaling")
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, module_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = layer_features(self.get_base_layer())
        # The dimension of the activations that holds features, or channels: (..., features), (C, H, W), (B, C, H, W).
        self.channel_dim = -3 if isinstance(self.get_base_layer(), nn.Conv2d) else -1
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
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    def _make(self, config: Any, module_name: str, dtype: torch.dtype) -> dict[str, nn.Module]:
        """Make the modules that an adapter of this config trains in this layer, by names in `adapter_layer_names`."""
        raise NotImplementedError

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x under these adapters, the last one outermost."""
        raise NotImplementedError

    def _weight_change(self, name: str, weight: Tensor) -> Tensor:
        """W' - W for a weight W (out, in) or (out, in, kh, kw), in at least single precision."""
        raise NotImplementedError

    @classmethod
    def divided_sides(cls, config: Any, module_name: str) -> int:
        """Number of sides that a config divides into `config.blocks_of(module_name)` blocks: 0, 1 (the input), or 2."""
        return 0

    @classmethod
    def divided_features(cls, layer: nn.Module, config: Any, module_name: str) -> tuple[int, ...]:
        """Numbers of features on those sides; empty for a layer that cannot be adapted."""
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            return ()
        return layer_features(layer)[: cls.divided_sides(config, module_name)]

    def update_layer(self, adapter_name: str, config: Any, module_name: str) -> None:
        """Add an adapter, or replace the one of this name.

        Raises:
            ValueError: this layer cannot be adapted with this config.
        """
        base_layer = self.get_base_layer()
        features = self.divided_features(base_layer, config, module_name)
        blocks = config.blocks_of(module_name) if features else 1
        problem = layer_problem(module_name, base_layer, self.method, features, blocks, self.narrowest_block)
        if problem:
            raise ValueError(problem)
        device, base_dtype = self._get_base_layer_device_and_dtype(base_layer)
        made = self._make(config, module_name, T.at_least_single(base_dtype))
        for kept, key in zip(self._dicts(), self.adapter_layer_names, strict=True):
            if key in made:
                here = device is not None and not any(parameter.is_meta for parameter in made[key].parameters())
                kept[adapter_name] = made[key].to(device) if here else made[key]
            elif adapter_name in kept:
                del kept[adapter_name]
        self.r[adapter_name] = blocks
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _dicts(self) -> list[nn.ModuleDict]:
        return [getattr(self, name) for name in self.adapter_layer_names]

    def store_in_base_dtype(self, adapter_name: str) -> None:
        """Round an adapter's parameters to the base weight's dtype, if that is a floating one."""
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
        """The base layer's bias; where that is a placeholder between calls, the layer's output for zeros."""
        base_layer: Any = self.get_base_layer()
        bias = base_layer.bias
        if bias is None or x.device.type == "meta":
            return bias
        if bias.device.type == "meta" or bias.numel() != self.out_features or is_offloaded(base_layer):
            at_zero = self.base_layer(x.new_zeros(self._zero_input_shape()))
            return at_zero.reshape(self.out_features, -1)[:, 0]
        return bias

    def _zero_input_shape(self) -> tuple[int, ...]:
        """Shape of the smallest input that gives one output position."""
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

    @property
    def in_use(self) -> bool:
        """Whether an adapter changes the output that the base layer alone would have."""
        return not self.disable_adapters and not self.merged and bool(self._active())

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base weight by this adapter alone, at its scale: (out, in) or (out, in, kh, kw)."""
        weight = self._float_weight()
        with torch.no_grad():
            return self.scaling[adapter] * self._weight_change(adapter, weight)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters (default: the active ones) into the base weight; the weight before is kept for `unmerge`.

        Raises:
            ValueError: `safe_merge` is set and the merged weight is not finite; or the base weight is quantised
                or offloaded.
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
