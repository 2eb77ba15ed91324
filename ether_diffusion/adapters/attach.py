"""Attaches a method's adapter to a model, freezes the rest, counts parameters, and merges."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether.frozen import merge_problem
from ether_diffusion.randomness import derive_seed, seeded

from .method_settings import MethodSettings, peft_type_of
from .methods import method_of
from .peft_layers import at_least_single, keep_fp32, refuse_scales, replace_layers
from .targets import check_targets
from .undo import undone_on_failure


def attach(model: nn.Module, settings: MethodSettings, seed: int = 0, name: str = "default") -> list[str]:
    """Freeze `model`, put an adapter of this method into it, make it active and trainable in at least fp32.

    Args:
        model: A diffusers or transformers model; changed in place.
        seed: Seed of the adapter's initial values. The global generators stay as they are.

    Returns:
        Names of the adapted modules.

    Raises:
        UserError: nothing matches `settings.target`, or a layer cannot be adapted with these settings, or carries an
            adapter of another method; the model is then unchanged.
    """
    settings = settings.for_model(model)
    matched, config = check_layers(model, settings), settings.peft_config()
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with undone_on_failure(model):
        try:
            inject(model, config, name, derive_seed(seed, "adapter-init"))
        except ValueError as error:
            raise UserError(f"adapter: {error}") from error
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in trainable_parameters(model).values():
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        at_least_single(model)
        settings.after_attach(model, name)
        check_not_nested(model)
    return matched


def check_layers(model: nn.Module, settings: MethodSettings) -> list[str]:
    """Names of the layers that `settings` targets, all of which the method can adapt. Raises UserError as `attach`."""
    settings = settings.for_model(model)
    matched = check_targets(model, settings.peft_config(), settings.target)
    problems = {}
    for layer_name in matched:
        layer = model.get_submodule(layer_name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        problem = settings.weight_problem(base) or settings.layer_problem(base)
        if problem:
            problems[layer_name] = problem
    if problems:
        first, reason = next(iter(problems.items()))
        more = f" (and {len(problems) - 1} more layers likewise)" if len(problems) > 1 else ""
        raise UserError(f"adapter.method: {settings.method} cannot adapt {first}: {reason}{more}.")
    return matched


def inject(model: nn.Module, config: PeftConfig, name: str = "default", seed: int = 0) -> None:
    """Put an adapter's layers into a bare model, so that diffusers' and transformers' own methods know of it.

    Args:
        config: Is copied, for PEFT changes it.
        seed: Of the initial values. The global generators stay as they are.
    """
    with seeded(seed):
        replace_layers(model, copy.deepcopy(config), name)
    method = method_of(config)
    if method is not None and method.keeps_fp32:
        keep_fp32(model, name)
    shown = method.model_fields["method"].default if method else peft_type_of(config).lower()
    refuse_scales(model, name, shown, method is None or method.has_scale)
    activated: Any = model
    activated._hf_peft_config_loaded = True
    # A plain module has no `set_adapter`, but its layers do.
    for part in [activated] if hasattr(model, "set_adapter") else adapted_layers(model).values():
        part.set_adapter(name)
    for wrapper in saved_modules(model).values():  # diffusers does not switch these
        wrapper.set_adapter([name] if name in wrapper.modules_to_save else [])


def remove(model: nn.Module, name: str) -> None:
    """Remove one adapter from a model, if it is there; others stay.

    Raises:
        UserError: it is merged into the weights; the model is then unchanged.
    """
    configs: dict[str, PeftConfig] = getattr(model, "peft_config", {})
    if name not in configs:
        return
    layers = adapted_layers(model).values()
    if any(name in layer.merged_adapters for layer in layers):
        raise UserError(f"the adapter {name!r} is merged into this {type(model).__name__}; unmerge it first.")
    if len(configs) == 1:
        detach(model)
        return
    for layer in layers:
        layer.delete_adapter(name)
    for wrapper in saved_modules(model).values():
        wrapper.delete_adapter(name, [])
    del configs[name]


def detach(model: nn.Module) -> None:
    """Remove all adapters: the model has its own layers again."""
    for parent in list(model.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, child_name, child.get_base_layer())
            elif isinstance(child, ModulesToSaveWrapper):
                setattr(parent, child_name, child.original_module)
        # The guard that `WeightModel` puts before an attention's own method.
        parent.__dict__.pop("fuse_projections", None)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False  # pyright: ignore


def merge(model: nn.Module) -> None:
    """Write the active adapters into the base weights and remove the adapters: a plain model with the same outputs.

    Raises:
        UserError: a base weight is quantised or offloaded; or a merged weight is not finite. Weights and adapters
            are then as they were.
    """
    layers, wrappers = adapted_layers(model), saved_modules(model)
    check_not_nested(model)
    for name, layer in layers.items():
        problem = merge_problem(layer.get_base_layer())
        if problem:
            raise UserError(f"{name}: {problem}")
    weights = base_weights(model)
    with undone_on_failure(model):
        try:
            for layer in layers.values():
                layer.merge(safe_merge=True)
            trained = {name: one.unload_and_optionally_merge_module(True, True, None) for name, one in wrappers.items()}
            detach(model)
            for name, module in trained.items():
                model.set_submodule(name, module.requires_grad_(False))
        except BaseException as error:
            restore(weights)
            if isinstance(error, ValueError):
                raise UserError(f"merge: {error}") from error
            raise


def base_weights(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Copies of the parameters that merging may change, those of adapted layers."""
    layers = [layer.get_base_layer() for layer in adapted_layers(model).values()]
    return {weight: weight.detach().clone() for layer in layers for weight in layer.parameters(recurse=False)}


def restore(weights: dict[nn.Parameter, torch.Tensor]) -> None:
    """Copy saved values back into their parameters."""
    for parameter, weight in weights.items():
        parameter.data.copy_(weight)


def set_scale(model: nn.Module, scale: float, name: str = "default") -> None:
    """Set an adapter's strength in every layer: 0 the base, 1 as trained."""
    for layer in adapted_layers(model).values():
        layer.set_scale(name, scale)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def saved_modules(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrappers of the modules that are trained whole next to an adapter (`modules_to_save`), by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def check_not_nested(model: nn.Module) -> None:
    """Refuse a model in which one method's layer lies inside another's: it can be neither merged nor saved.

    Raises:
        UserError: names the layer.
    """
    layers = adapted_layers(model)
    for name, outer in layers.items():
        inner = layers.get(f"{name}.base_layer")
        if inner is not None:
            kinds = f"a {type(inner).__name__} lies inside a {type(outer).__name__}"
            raise UserError(f"{name}: {kinds}, and cannot be merged or saved. Merge or remove the inner adapter first.")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser should see, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_parameters(model: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of the model's modules with the same tensors: an adapter put into it leaves the model as it is."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())})


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of the model on the meta device, without memory for its weights, to try an adapter on."""
    memo: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        placeholder = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # `empty_like` is not torchao's
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(placeholder, requires_grad=False) if is_parameter else placeholder
        vars(memo[id(tensor)]).update(vars(tensor))  # bitsandbytes' state of a quantised weight, read by PEFT's LoRA
    return copy.deepcopy(model, memo)
