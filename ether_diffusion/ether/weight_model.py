"""Puts adapted layers into a model: what the `BaseTuner`s of all methods that change weights share."""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.config import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .frozen import ATTACH_FIRST, at_least, group_hook, layer_problem
from .weight_layer import WeightLayer


class WeightModel(BaseTuner):
    """Checks all target layers before it replaces the first one; refuses layers where an adapter has no effect."""

    tuner_layer_cls: type[WeightLayer]  # pyright: ignore[reportIncompatibleVariableOverride] - it is never set
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        # Runs before the first layer is replaced, so a refused configuration leaves the model as it was.
        _maybe_include_all_linear_layers(peft_config, model)
        try:
            _check_targets(self, peft_config, model)
        except ValueError:
            if getattr(model, "_hf_peft_config_loaded", False) and not hasattr(model, "peft_config"):
                # diffusers' `add_adapter` has marked the model already, and would fail over that when called again.
                mark: Any = model
                mark._hf_peft_config_loaded = False
            raise

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            adapted: Any = target
            adapted.update_layer(adapter_name, peft_config, current_key)
            return
        if isinstance(target, BaseTunerLayer):
            raise ValueError(_foreign_tuner(current_key, target, self.tuner_layer_cls))
        layer: Any = self.tuner_layer_cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)
        if hasattr(parent, "fuse_projections"):
            # Not a bound method: pickle would look for a method of this name in the parent.
            parent.fuse_projections = functools.partial(_fuse_projections, parent)  # pyright: ignore

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        # `PeftModel` calls this around its forward pass, and drops `adapter_names` where a method has no such thing:
        # every sample of the batch would get the active adapters, in silence.
        if kwargs.get("adapter_names") is not None:
            kind = self.tuner_layer_cls.method
            raise ValueError(f"adapter_names: {kind} has the same active adapters for a whole batch; call set_adapter.")
        return nullcontext()

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # PEFT's `save_pretrained` and diffusers' `save_lora_adapter` take an adapter's tensors from here. Inside
        # another method's layer they have names of that nesting, which no other model has.
        for name, outer in model.named_modules():
            inner = getattr(outer, "base_layer", None)
            if isinstance(outer, BaseTunerLayer) and isinstance(inner, WeightLayer):
                raise ValueError(f"{name}: {_lies_around(outer, inner)}, and what it holds cannot be saved. {_REMEDY}")
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Vectors are made in at least single precision, also where this is not called (diffusers' `add_adapter`). With
        # `autocast_adapter_dtype=False` they are stored in the base's dtype, but still computed with in fp32.
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, WeightLayer):
                    module.store_in_base_dtype(adapter_name)


def _check_targets(tuner: WeightModel, config: Any, model: nn.Module) -> None:
    """Refuse at once every target layer that cannot be adapted, with the block counts that would fit all of them.

    Raises:
        ValueError: names the layers, their sizes and, where blocks are at fault, the counts that fit.
    """
    kind, narrowest = tuner.tuner_layer_cls, tuner.tuner_layer_cls.narrowest_block
    problems, misfits, widths = [], [], set()
    if any(group_hook(module) is not None for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is offloaded in groups: {ATTACH_FIRST}")
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name or (inside and name.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (name + ".",)
        if not check_target_module_exists(config, name):
            continue
        if isinstance(module, BaseTunerLayer) and not isinstance(module, kind):
            problems.append(_foreign_tuner(name, module, kind))
            continue
        layer: Any = module.get_base_layer() if isinstance(module, kind) else module
        features = kind.divided_features(layer, config, name)
        problem = layer_problem(name, layer, kind.method, features, 1, narrowest) or _fused_problem(name, model)
        if problem:
            problems.append(problem)
            continue
        if not features:
            continue
        blocks = config.blocks_of(name)
        if blocks == config.num_blocks:
            widths.update(features)
        if layer_problem(name, layer, kind.method, features, blocks, narrowest):
            misfits.append(f"{name} ({' -> '.join(map(str, features))} features, {blocks} blocks)")
    if misfits:
        fit = [n for n in range(1, min(widths) // narrowest + 1) if math.gcd(*widths) % n == 0] if widths else []
        counts = f" These counts fit all target layers: {', '.join(map(str, fit))}." if fit else ""
        problems.append(
            f"num_blocks = {config.num_blocks} does not divide {_first(misfits)} into equal "
            f"blocks{at_least(narrowest)}.{counts}"
        )
    if problems:
        raise ValueError(_first(problems))


def _refuse_nested_merge(outer: Any, name: str, inner: Any) -> None:
    """Make the two layers refuse merging where another method's layer is put around one of ours.

    They work together, but PEFT would write the outer adapter into the innermost weight, and then either drop the inner
    one or apply it to a weight that it was not trained for. Called for each module that any module gets as a child.
    """
    if name == "base_layer" and isinstance(inner, WeightLayer) and isinstance(outer, BaseTunerLayer):
        message = f"{_lies_around(outer, inner)}: neither can be merged. {_REMEDY}"
        for layer in (outer, inner):
            merging: Any = layer
            merging.merge = functools.partial(_refuse_merge, message)


register_module_module_registration_hook(_refuse_nested_merge)
_REMEDY = "Merge or remove the inner adapter before the outer one is attached."


def _lies_around(outer: object, inner: WeightLayer) -> str:
    return f"{type(outer).__module__}.{type(outer).__name__} lies around a layer with {inner.method}"


def _refuse_merge(message: str, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    raise ValueError(message)


def _first(items: list[str], limit: int = 8) -> str:
    more = len(items) - limit
    return "; ".join(items[:limit]) + (f"; and {more} more" if more > 0 else "")


def _foreign_tuner(name: str, layer: object, kind: type[WeightLayer]) -> str:
    return (
        f"{name} already carries an adapter of another method ({type(layer).__module__}.{type(layer).__name__}); "
        f"{kind.method} does not wrap it. Merge and unload that adapter first."
    )


def _fused_problem(name: str, model: nn.Module) -> str | None:
    """Why an adapter on this layer would do nothing: its attention runs on a fused copy of it."""
    parent_name, _, child = name.rpartition(".")
    parent: Any = model.get_submodule(parent_name)
    idle = ("to_q", "to_k", "to_v") if hasattr(parent, "to_qkv") else ("to_k", "to_v")
    # diffusers' older attention class keeps the mark after unfusing; only its processor shows it.
    fused = "Fused" in type(getattr(parent, "processor", None)).__name__ or hasattr(parent, "unfuse_projections")
    if not getattr(parent, "fused_projections", False) or not fused or child not in idle:
        return None
    return f"{name} is not run while its projections are fused. Call unet.unfuse_qkv_projections() first."


def _fuse_projections(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stands before an attention's own `fuse_projections`, which would copy the base weights and drop the adapters."""
    for name, layer in self.named_children():
        if isinstance(layer, WeightLayer) and layer.in_use:
            raise ValueError(
                f"fuse_projections would silently drop the {layer.method} adapter on {name}, which is not merged. "
                "Merge it first: unet.fuse_lora(), or merge_and_unload() on a PeftModel."
            )
    return type(self).fuse_projections(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
