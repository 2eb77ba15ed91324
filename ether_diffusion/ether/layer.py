"""A frozen Linear or Conv2d whose input (and output) channels are transformed by ETHER or ETHER+."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from . import transform as T
from .config import EtherConfig


class Hyperplanes(nn.Module):
    """Trainable normals of one transform: u and, for ETHER+, v, each (num_blocks, features / num_blocks).

    A module and not bare parameters, so that hooks that load weights before `forward` (accelerate's offloading) fire.
    """

    def __init__(self, variant: str, features: int, num_blocks: int, init_weights: bool, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (num_blocks, features // num_blocks)
        self.u = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.v = nn.Parameter(torch.empty(shape, dtype=dtype)) if variant == "ether_plus" else None
        self.reset(init_weights)

    @torch.no_grad()
    def reset(self, init_weights: bool) -> None:
        """u uniform in ±1/sqrt(b); v = -u, so that H+ = I, or independent of u if not `init_weights`."""
        bound = 1 / math.sqrt(self.u.shape[1])
        self.u.uniform_(-bound, bound)
        if self.v is not None:
            self.v.copy_(-self.u) if init_weights else self.v.uniform_(-bound, bound)

    def forward(self) -> T.Change:
        """The transform's change of the identity, in at least single precision."""
        u = self.u.to(T.at_least_single(self.u.dtype))
        return T.ether(u) if self.v is None else T.ether_plus(u, self.v.to(u.dtype))


class EtherLayer(BaseTunerLayer):
    """What Linear and Conv2d share: the adapters' vectors, their scales, merging.

    With W' = H_out W H_in, an adapter of scale s gives the layer the weight W + s (W' - W), in the forward pass as in
    the merged weight. Several active adapters apply in their order: each one transforms the layer that the ones before
    it have made. They do not commute.
    """

    adapter_layer_names = ("ether_in", "ether_out")
    other_param_names = ("r", "scaling")

    # Dimension of the activations that the transforms act on.
    channel_dim: int
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.in_features, self.out_features = layer_features(self.get_base_layer())
        self.ether_in = nn.ModuleDict()
        self.ether_out = nn.ModuleDict()
        self.scaling: dict[str, float] = {}
        # diffusers names unnamed adapters by the length of `r`, which is a rank in LoRA and the number of blocks here.
        self.r: dict[str, int] = {}
        # PEFT's `disable_input_dtype_casting`, in diffusers' layerwise casting, sets this on every layer. Nothing here
        # casts the base layer's input.
        self.cast_input_dtype_enabled = True
        self._disable_adapters = False
        self.merged_adapters = []
        self._unmerged_weight: Tensor | None = None

    def update_layer(self, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        """Add an adapter, or replace the one of this name."""
        base_layer = self.get_base_layer()
        blocks, sides = config.blocks_of(module_name), config.sides_of(module_name)
        problem = layer_problem(module_name, base_layer, blocks, sides)
        if problem:
            raise ValueError(problem)
        device, dtype = self._get_base_layer_device_and_dtype(base_layer)
        dtype = T.at_least_single(dtype)
        for side, features in (("in", self.in_features), ("out", self.out_features)):
            if side == "out" and sides != "both":
                if adapter_name in self.ether_out:
                    del self.ether_out[adapter_name]
                continue
            planes = Hyperplanes(config.variant, features, blocks, config.init_weights, dtype)
            if device is not None and planes.u.device.type != "meta":
                planes.to(device)
            (self.ether_in if side == "in" else self.ether_out)[adapter_name] = planes
        self.r[adapter_name] = blocks
        self.scaling[adapter_name] = 1.0
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def store_in_base_dtype(self, adapter_name: str) -> None:
        """Round the adapter's vectors to the base weight's dtype, where that is a floating one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for side in (self.ether_in, self.ether_out):
            if adapter_name in side and dtype is not None and dtype.is_floating_point:
                side[adapter_name].to(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output for the transformed input, transformed. Same shapes and dtypes as the base layer."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        names = [] if self.merged else [name for name in self.active_adapters if name in self.ether_in]
        return self._adapted(x, names, *args, **kwargs)

    def _adapted(self, x: Tensor, names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if not names:
            return self.base_layer(x, *args, **kwargs)
        *before, name = names  # the last adapter is the outermost: first on the input, last on the output
        scale = self.scaling[name]
        h_in = self.ether_in[name]()
        if name not in self.ether_out:
            return self._adapted(T.transform(h_in, x, self.channel_dim, scale), before, *args, **kwargs)
        z = self._adapted(T.transform(h_in, x, self.channel_dim), before, *args, **kwargs)
        y = T.transform(self.ether_out[name](), z, self.channel_dim, fixed=self._bias(x))
        if scale == 1:
            return y
        return torch.lerp(self._adapted(x, before, *args, **kwargs), y, scale)

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
        raise NotImplementedError

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
            return self.scaling[adapter] * T.weight_change(weight, *self._changes(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters (default: the active ones) into the base weight; the weight before is kept for `unmerge`.

        Raises:
            ValueError: `safe_merge` is set and the merged weight is not finite; or the base weight is quantised, or
                offloaded and not here.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.ether_in]
        if not names:
            return
        base_weight = self._float_weight()
        merged = base_weight
        with torch.no_grad():
            for name in names:
                merged = T.transform_weight(merged, *self._changes(name), scale=self.scaling[name])
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

    def _changes(self, name: str) -> tuple[T.Change, T.Change | None]:
        return self.ether_in[name](), self.ether_out[name]() if name in self.ether_out else None

    def _float_weight(self) -> Tensor:
        problem = merge_problem(self.get_base_layer())
        if problem:
            raise ValueError(problem)
        return self.get_base_layer().weight.data  # pyright: ignore[reportReturnType]


class EtherLinear(nn.Module, EtherLayer):
    """ETHER on `nn.Linear`: x (..., in_features) -> (..., out_features)."""

    channel_dim = -1

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        super().__init__()
        EtherLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    forward = EtherLayer.forward

    def _zero_input_shape(self) -> tuple[int, ...]:
        return (1, self.in_features)


class EtherConv2d(nn.Module, EtherLayer):
    """ETHER on `nn.Conv2d` with one group, over channels: x (B, in_channels, H, W) -> (B, out_channels, H', W')."""

    channel_dim = 1

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: EtherConfig, module_name: str) -> None:
        super().__init__()
        EtherLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, module_name)

    forward = EtherLayer.forward

    def _zero_input_shape(self) -> tuple[int, ...]:
        layer: Any = self.get_base_layer()
        reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (1, self.in_features, *reach)


def layer_features(layer: nn.Module) -> tuple[int, int]:
    """Numbers of input and output features (channels of a convolution) of a layer that can be adapted."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    raise TypeError(f"ETHER adapts nn.Linear and nn.Conv2d, not {type(layer).__name__}.")


def layer_problem(name: str, layer: nn.Module, num_blocks: int, sides: str) -> str | None:
    """Why a layer cannot be adapted with these settings, or None if it can."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return f"{name}: ETHER adapts nn.Linear and nn.Conv2d, not {type(layer).__name__}."
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{name}: ETHER does not adapt grouped convolutions (groups = {layer.groups})."
    if is_offloaded(layer):
        return f"{name} is offloaded: {ATTACH_FIRST}"
    for features in layer_features(layer)[: 2 if sides == "both" else 1]:
        if features % num_blocks or features // num_blocks < 2:
            return f"{name}: {features} features do not divide into {num_blocks} blocks at least two wide."
    return None


def merge_problem(layer: nn.Module) -> str | None:
    """Why no adapter can be written into this layer's weight, or None if it can."""
    weight: Any = layer.weight
    kind, shape = type(weight).__name__, tuple(weight.shape[:2])
    if is_offloaded(layer):
        return f"Cannot merge into an offloaded {type(layer).__name__}: its weight is not here. Merge, then offload."
    # Quantised weights are packed into integers (bitsandbytes), sometimes called floats (its `quant_storage`), or claim
    # dtype and shape of what they stand for (torchao).
    stands_for_itself = type(weight.data) is Tensor and weight.is_floating_point()
    if stands_for_itself and shape == layer_features(layer)[::-1]:
        return None
    kind = str(weight.dtype) if kind == "Parameter" else f"{kind}, {weight.dtype}"
    return (
        f"Cannot merge into a weight of type {kind}: this {type(layer).__name__} is quantised. Draw without merging; "
        "or load the base unquantised and the same adapter into it, and merge there."
    )


ATTACH_FIRST = "what offloads it would not know of the adapter. Attach first, offload after."


def is_offloaded(layer: nn.Module) -> bool:
    """Whether a module's own weights are elsewhere between its calls, so that only calling it tells them.

    accelerate leaves placeholders without memory. diffusers' group offloading to disk leaves memory of the right shape
    with anything in it.
    """
    if hasattr(layer, "_hf_hook") and any(parameter.is_meta for parameter in layer.parameters(recurse=False)):
        return True
    return is_on_disk(layer)


def is_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading keeps on the disk what this module leads."""
    hook = group_hook(module)
    return hook is not None and hook.group.offload_to_disk_path is not None


def group_hook(module: nn.Module) -> Any:
    """What diffusers' group offloading hangs on the modules, or blocks of modules, that it moves; or None."""
    hooks: Any = getattr(module, "_diffusers_hook", None)
    return None if hooks is None else hooks.get_hook("group_offloading")
