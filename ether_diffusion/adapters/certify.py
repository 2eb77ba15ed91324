"""Finds adapters that do nothing, or not what was trained, when they are saved. Each fault has a name.

`nothing`: no layer is adapted or trained. `start`: the initial vectors are not those that the run's seed gives.
`frozen`, `disabled`, `inactive`: layers got no gradient, because they do not require any, their adapters are switched
off, or another adapter is the active one. `gradient`: they got none for another reason, such as a detached input.
`unmoved`: they got gradients, and stayed as they were; `underflow`: the same for want of precision. `wrapper`, `keys`:
names in the file are those of a wrapper of the model, or no layer's. `file`: what was read back changes a layer by
another amount than the adapter in memory. `effect`: the adapter changes nothing measurable.

`Watch` sees a run: it reads tensors at its start, looks at gradients on their device in each step without waiting for
them, and compares when something is saved. `certify` reads a file back into the bare layers of the model.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ether_diffusion.errors import first_line
from ether_diffusion.randomness import derive_seed
from ether_diffusion.weight_files import sampled

from .attach import inject
from .layer_outputs import NOTHING, is_here, layers_with, outputs, spread
from .loading import check_same_tensors, fill
from .method_settings import MethodSettings
from .methods import facts_of, method_of
from .saved_adapter import PREFIX, SavedAdapter

UNMOVED = 1e-7
"""A tensor none of whose numbers has changed by more than this has not moved."""
SAMPLES = 256
"""Numbers of each tensor that are compared with those at the start, so that a checkpoint can keep these."""
OFTEN = 16
"""Steps in which every gradient is looked at."""
WRAPPERS = ("_orig_mod", "module", "base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""The names that torch.compile, data parallelism, PEFT's layers, FSDP and checkpointing put into tensors' names."""

Faults = dict[str, str]


class Watch:
    """What a run does to the tensors that it trains: how far they move, and whether they get gradients.

    An adapter's tensors are watched whether or not they require gradients, layer by layer. What else is trained (a
    condition encoder, a whole UNet) is watched as one: behind a convolution that starts at zero, layers rightly get no
    gradient in a first step.

    Args:
        module: All that is trained, before it is placed on devices.
        name: The adapter's name in its layers.
        start_faults: What `start_fault` returned.
    """

    def __init__(self, module: nn.Module, name: str = "default", start_faults: Mapping[str, str] = {}) -> None:
        self.name, self.start_faults = name, start_faults
        self.layers = layers_with(module, name)
        self.groups = _groups(module, self.layers, name)
        self.tensors = [tensor for group in self.groups.values() for tensor in group]
        self.start = self._samples()
        self.steps = 0
        self.is_whole = True
        """Whether the start is that of the run: not if it resumes from a checkpoint of an earlier version."""
        self._before = torch.zeros(len(self.tensors))
        """The largest gradient of each tensor in the steps before the run resumed."""
        self._gradients: dict[tuple[int, ...], Tensor] = {}
        """The largest gradient so far of each tensor that had one, by the indices of these tensors."""
        self._obstacles: Faults = {}
        """Why a layer could not get a gradient in a step: the name of the fault."""

    @torch.no_grad()
    def observe(self) -> None:
        """Look at the gradients of a step, before they are cleared. Nothing waits for the device.

        After the first `OFTEN` steps only one in as many is looked at.
        """
        self.steps += 1
        if self.steps > OFTEN and self.steps % OFTEN:
            return
        present = [(k, tensor.grad) for k, tensor in enumerate(self.tensors) if tensor.grad is not None]
        if present:
            largest = torch._foreach_norm([gradient for _, gradient in present], float("inf"))
            # A step that overflows counts as none.
            found = torch.stack([norm.float() for norm in largest]).nan_to_num_(0, posinf=0)
            key = tuple(k for k, _ in present)
            before = self._gradients.get(key)
            self._gradients[key] = found if before is None else torch.maximum(before, found)
        for path, layer in self.layers.items():
            if obstacle := self._obstacle(path, layer):
                self._obstacles[path] = obstacle

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs to see the whole run: the start, the gradients and the number of steps."""
        return {"start": self.start, "gradients": self._largest_gradients(), "steps": torch.tensor(self.steps)}

    def resume(self, state: Mapping[str, Tensor] | None) -> None:
        """Take over what the run saw before it was stopped. None: that is not known; the run is seen from here on."""
        if state is None or state["start"].shape != self.start.shape:
            self.start, self.is_whole = self._samples(), False
            return
        self.start, self.steps, self._before = state["start"], int(state["steps"]), state["gradients"]

    def changes(self) -> dict[str, float]:
        """By layer or module: the largest change of a number since the start."""
        moved = (self._samples() - self.start).abs().split([_count(tensor) for tensor in self.tensors])
        return dict(zip(self.groups, self._by_group([float(part.max()) for part in moved]), strict=True))

    def measured(self) -> dict[str, Any]:
        """Numbers for the certificate."""
        found = self.changes()
        layers = [change for path, change in found.items() if path in self.layers]
        others = {path: change for path, change in found.items() if path not in self.layers}
        return {
            "layers": len(layers),
            "steps": self.steps,
            "share_below_1e-7": sum(change < UNMOVED for change in layers) / max(1, len(layers)),
            "largest_change": max(layers, default=0.0),
            **({"changes_of_modules": others} if others else {}),
        }

    def faults(self) -> Faults:
        """What is wrong with what the run has done so far, by name."""
        if not self.tensors:
            return {"nothing": "no layer is trained"}
        found: dict[str, list[str]] = {}
        changes, gradients = self.changes(), self._by_group(self._largest_gradients().tolist())
        known = self.is_whole and self.steps > 0
        for (path, change), gradient in zip(changes.items(), gradients, strict=True):
            layer = self.layers.get(path)
            obstacle = self._obstacle(path, layer) if layer is not None else ""
            if not obstacle and known and gradient == 0:
                obstacle = self._obstacles.get(path, "gradient")
            if not obstacle and known and (change == 0 or max(changes.values()) < UNMOVED):
                half = any(tensor.dtype.itemsize < 4 for tensor in self.groups[path])
                obstacle = "underflow" if half else "unmoved"
            if obstacle:
                found.setdefault(obstacle, []).append(path)
        sentences = {name: f"{_some(paths, len(changes))} {_SENTENCES[name]}" for name, paths in found.items()}
        return {**self.start_faults, **sentences}

    def _obstacle(self, path: str, layer: Any) -> str:
        if layer.disable_adapters:
            return "disabled"
        if self.name not in layer.active_adapters:
            return "inactive"
        return "" if all(tensor.requires_grad for tensor in self.groups[path]) else "frozen"

    def _samples(self) -> Tensor:
        """The numbers of all tensors that are compared, on the CPU."""
        picked = [sampled(tensor, SAMPLES).float() for tensor in self.tensors]
        if len({tensor.device for tensor in picked}) > 1:  # before the module is placed on its device
            picked = [tensor.cpu() for tensor in picked]
        return torch.cat(picked).cpu() if picked else torch.zeros(0)

    def _largest_gradients(self) -> Tensor:
        largest = self._before.clone()
        for key, values in self._gradients.items():
            index = torch.tensor(key)
            largest[index] = torch.maximum(largest[index], values.cpu())
        return largest

    def _by_group(self, values: list[float]) -> list[float]:
        """The largest value of each group's tensors."""
        rest = iter(values)
        return [max(next(rest) for _ in group) for group in self.groups.values()]


_SENTENCES = {
    "disabled": "had their adapters switched off",
    "inactive": "had another adapter active",
    "frozen": "do not require gradients",
    "gradient": "got no gradient; is their input or the loss detached?",
    "unmoved": "did not move, though they got gradients; is the learning rate 0, as in the first step of a warm-up?",
    "underflow": "did not move, though they got gradients; a step is too small for their half precision",
}


def certify(model: nn.Module, saved: SavedAdapter, name: str = "default") -> tuple[Faults, dict[str, float]]:
    """Check a saved adapter, as it was read back, against the one in a bare model.

    Three of its layers are built again from the file on the layers that they adapt; no second model is needed. The
    adapter in memory is compared where it is the active one, at its own scale.

    Returns:
        Faults by name, and how much the file changes these layers' outputs for a fixed input, relative to their norm;
        empty where the layers cannot be run by themselves.
    """
    layers = _layers(model, name)
    if not layers:
        nothing = {"nothing": f"no layer of {type(model).__name__} carries the adapter"}
        return (nothing if method_of(saved.config) else {}), {}  # PEFT's prompt methods adapt no layers
    faults = _key_faults(saved, layers)
    if faults:
        return faults, {}
    chosen = spread(list(layers))
    if not all(is_here(weight) for path in chosen for weight in layers[path].parameters()):
        return faults, {}
    try:
        written = bare_layers(layers, chosen, saved)
    except ValueError as error:
        return {"keys": first_line(error)}, {}
    changes = {}
    for k, path in enumerate(chosen):
        found, live = outputs(written[path], k), outputs(layers[path], k)
        if found is None:
            continue
        plain, adapted = found
        change, size = float((adapted - plain).norm()), float(plain.norm())
        changes[path] = change / size if size else 0.0
        if live is not None and _is_in_use(layers[path], written[path], name):
            rounding = 1e-5 if _dtype(layers[path]).itemsize >= 4 else 1e-2
            if float((adapted - live[1]).norm()) > 1e-3 * change + rounding * size:
                own = float((live[1] - live[0]).norm()) / size
                sizes = f"{changes[path]:.2g} of their norm, the adapter in memory by {own:.2g}"
                faults["file"] = f"what was read back changes the outputs of {path} by {sizes}"
    return faults, changes


def has_effect(model: nn.Module, saved: SavedAdapter, changes: Mapping[str, float], name: str = "default") -> bool:
    """Whether a saved adapter changes any layer's outputs measurably; True where that cannot be found out.

    Args:
        changes: What `certify` measured of some layers. Only if these do not change, the others are looked at.
    """
    if not changes or max(changes.values()) > NOTHING or getattr(saved.config, "modules_to_save", None):
        return True
    layers = _layers(model, name)
    for layer in bare_layers(layers, [path for path in layers if path not in changes], saved).values():
        found = outputs(layer)
        if found is None or float((found[1] - found[0]).norm()) > NOTHING * float(found[0].norm()):
            return True
    return False


def bare_layers(layers: Mapping[str, Any], chosen: Iterable[str], saved: SavedAdapter) -> dict[str, Any]:
    """Some adapted layers built again, around the same frozen layers, with the adapter of a file in them.

    Args:
        layers: All layers that are adapted, by name.
        chosen: Names of those to build.

    Raises:
        UserError: the file's tensors are not those of these layers.
    """
    chosen = list(chosen)
    if not chosen:
        return {}
    root = _tree({path: layers[path].get_base_layer() for path in chosen})
    _inject(root, saved.config, chosen)
    parts = {PREFIX + path for path in chosen}
    own = {key: tensor for key, tensor in saved.tensors.items() if _owner(key, parts) or not key.startswith(PREFIX)}
    for key, tensor in facts_of(saved.config).shared_tensors(root, "default").items():
        tensor.data = tensor.new_empty(own[key.removesuffix(".default")].shape)  # sized for the widest of all layers
    part = dataclasses.replace(saved, tensors=own)
    check_same_tensors(root, part)
    fill(root, part, "default")
    return {path: root.get_submodule(path) for path in chosen}


def start_fault(model: nn.Module, settings: MethodSettings, seed: int) -> Faults:
    """Attach the adapter once more, to the same frozen layers alone: its start must be a function of the seed."""
    layers = layers_with(model)
    root = _tree({path: layer.get_base_layer() for path, layer in layers.items()})
    _inject(root, settings.for_model(model).peft_config(), list(layers), derive_seed(seed, "adapter-init"))
    again = dict(root.named_parameters())
    differ = [
        path
        for path, layer in layers.items()
        for key, tensor in layer.named_parameters()
        if _is_adapters(key, "default") and not torch.equal(tensor, again[f"{path}.{key}"].to(tensor.dtype))
    ]
    if not differ:
        return {}
    return {"start": f"{_some(list(dict.fromkeys(differ)), len(layers))} do not start as seed {seed} has them start"}


def _inject(root: nn.Module, config: Any, paths: list[str], seed: int = 0) -> None:
    """Put an adapter into these layers of a tree. The frozen layers belong to a model as well, and stay as they are."""
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.target_modules = "|".join(map(re.escape, paths))  # of long lists PEFT searches the shortest endings
    for key in ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "target_parameters"):
        if hasattr(config, key):
            setattr(config, key, None)
    flags = {parameter: parameter.requires_grad for parameter in root.parameters()}
    try:
        inject(root, config, seed=seed)
    finally:
        for parameter, requires_grad in flags.items():
            parameter.requires_grad_(requires_grad)


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module that holds nothing but these layers, under their names."""
    root = nn.Module()
    for path, layer in layers.items():
        parent = root
        *above, last = path.split(".")
        for part in above:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, layer)
    return root


def _layers(model: nn.Module, name: str) -> dict[str, Any]:
    """As `layers_with`, by their names in the bare model also where it is PEFT's."""
    return {path.removeprefix(PREFIX): layer for path, layer in layers_with(model, name).items()}


def _groups(module: nn.Module, layers: Mapping[str, Any], name: str) -> dict[str, list[nn.Parameter]]:
    """Trained tensors: those of an adapter by layer, the others by the part of the module that they belong to."""
    groups: dict[str, list[nn.Parameter]] = {}
    for key, parameter in module.named_parameters():
        owner = _owner(key, layers)
        if owner and _is_adapters(key.removeprefix(f"{owner}."), name):
            groups.setdefault(owner, []).append(parameter)
        elif not owner and parameter.requires_grad:
            groups.setdefault(key.partition(".")[0], []).append(parameter)
    return groups


def _owner(key: str, layers: Iterable[str]) -> str | None:
    """The layer that a tensor lies in, by their names."""
    known, parts = layers if isinstance(layers, (set, Mapping)) else set(layers), key.split(".")
    return next((path for k in range(len(parts), 0, -1) if (path := ".".join(parts[:k])) in known), None)


def _is_adapters(key: str, name: str) -> bool:
    """Whether a tensor of an adapted layer is the adapter's, by its name in that layer."""
    parts = key.split(".")
    return name in parts and "base_layer" not in parts


def _key_faults(saved: SavedAdapter, layers: Mapping[str, Any]) -> Faults:
    """Names in the file that no bare model has, and layers of which the file has nothing."""
    ours = {PREFIX + path for path in layers}
    bare = [key for key in saved.tensors if not key.startswith("base_model.")]
    wrapped = [key for key in saved.tensors if _owner(key, ours) is None and {*key.split(".")} & {*WRAPPERS}]
    if wrapped:
        return {"wrapper": f"{_some(wrapped, len(saved.tensors), 'names')} in the file are a wrapper's"}
    whole = getattr(saved.config, "modules_to_save", None)
    strays = [key for key in saved.tensors if key.startswith(PREFIX) and _owner(key, ours) is None and not whole]
    if bare or strays:
        return {"keys": f"{_some([*bare, *strays], len(saved.tensors), 'names')} in the file are no adapted layer's"}
    absent = sorted(ours - {_owner(key, ours) for key in saved.tensors})
    return {"keys": f"of {_some(absent, len(ours))} there is nothing in the file"} if absent else {}


def _is_in_use(live: BaseTunerLayer, written: BaseTunerLayer, name: str) -> bool:
    """Whether what a layer in memory does is what this adapter does at the scale that it is saved with."""
    alone = not live.disable_adapters and list(live.active_adapters) == [name] and not live.merged_adapters
    own, other = (getattr(layer, "scaling", None) for layer in (live, written))
    same_scale = not isinstance(own, dict) or not isinstance(other, dict) or own.get(name) == other.get("default")
    return alone and same_scale


def _dtype(layer: Any) -> torch.dtype:
    return layer.get_base_layer().weight.dtype


def _count(tensor: Tensor) -> int:
    return sampled(tensor, SAMPLES).numel()


def _some(paths: list[str], whole: int, what: str = "layers") -> str:
    """`3 of 106 layers (mid_block…, …)`."""
    return f"{len(paths)} of {whole} {what} ({paths[0]}{', …' * (len(paths) > 1)})"
