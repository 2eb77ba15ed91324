"""ETHER through diffusers' processor interface: an attention's own processor, run on adapted projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from ether_diffusion.errors import UserError
from ether_diffusion.ether import EtherConfig, EtherLayer
from ether_diffusion.randomness import derive_seed, seeded

from .attach import inject
from .loading import check_fits, fill_adapter
from .saved_adapter import PREFIX, SavedAdapter, read_adapter
from .targets import check_targets

# The projections that a processor reaches. Its own names for them are not matched by other adapters' patterns.
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}


class EtherAttnProcessor(nn.Module):
    """Runs another processor on a view of the attention module whose projections are adapted.

    The projections are `EtherLayer`s around the attention's own frozen layers, which stay where they are: outputs and
    gradients are those of the PEFT route (`attach`, `unet.add_adapter`), bit for bit. Prefer that route if you can:

    - A processor reaches `to_q`, `to_k`, `to_v` and `to_out.0` of attentions, no feed-forward layers or convolutions.
    - It is lost when another one is set, as `enable_attention_slicing` and `fuse_qkv_projections` do: call those first.
    - It cannot be set on a UNet that is offloaded already (an error). Set first, it is offloaded with the weights.
    - It is not merged, saved or switched with adapters: `processors_to_peft` converts it to a PEFT adapter.

    Args:
        attn: The attention module, to be given to `attn.set_processor` together with this processor.
        config: Variant, blocks and sides; `target_modules` and the patterns apply to `name` followed by the projection.
        name: The attention's name in its model.
        delegate: The processor that attends. Default: the one that `attn` has.

    Raises:
        ValueError: a projection cannot be adapted with this config, or carries an adapter already.
    """

    def __init__(self, attn: nn.Module, config: EtherConfig, name: str = "", delegate: Any = None) -> None:
        super().__init__()
        self.delegate: Any = attn.get_processor() if delegate is None else delegate  # pyright: ignore
        self.config = config
        self.layers = nn.ModuleDict()
        # diffusers passes on those of `cross_attention_kwargs` that a processor's signature names: the delegate's here.
        self.__call__ = self.delegate.__call__
        for key, projection in PROJECTIONS.items():
            full_name = f"{name}.{projection}".removeprefix(".")
            if check_target_module_exists(config, full_name):
                base = attn.get_submodule(projection)
                if isinstance(base, BaseTunerLayer):
                    raise UserError(f"{full_name} carries an adapter already ({type(base).__name__}); take it out.")
                layer = EtherLayer(base, "default", config, full_name)
                # Not a child: the weight belongs to the attention alone, in state_dict() and for what moves modules.
                vars(layer)["base_layer"] = layer._modules.pop("base_layer")
                self.layers[key] = layer

    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.delegate(_View(attn, self.layers), hidden_states, *args, **kwargs)


class _View:
    """An attention module with other projections."""

    def __init__(self, attn: nn.Module, layers: nn.ModuleDict) -> None:
        self._attn = attn
        for key, layer in layers.items():
            name, _, first_of_list = PROJECTIONS[key].partition(".")
            if layer.base_layer is not attn.get_submodule(PROJECTIONS[key]):
                raise ValueError(f"{name} was replaced after EtherAttnProcessor was set: take that off, set it again.")
            setattr(self, name, [layer, *list(getattr(attn, name))[1:]] if first_of_list else layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)


def set_ether_processors(unet: UNet2DConditionModel, config: EtherConfig, seed: int = 0) -> dict[str, nn.Parameter]:
    """Freeze a UNet and put an `EtherAttnProcessor` before the processor of each attention that `config` targets.

    Returns `ether_parameters(unet)`; its `values()` are for an optimiser. They start as those of `attach` at this seed.

    Raises:
        ValueError: the config targets other layers, or does not fit; the UNet is then unchanged.
    """
    processors: dict[str, Any] = dict(unet.attn_processors)
    if any(isinstance(processor, EtherAttnProcessor) for processor in processors.values()):
        raise UserError("The UNet has ETHER processors already; take them off first: remove_ether_processors(unet).")
    names = [key.removesuffix(".processor") for key in processors]
    target = config.target_modules or ()
    matched = set(check_targets(unet, config, target if isinstance(target, str) else sorted(target)))
    matched.update(config.modules_to_save or ())
    beyond = matched - {f"{name}.{projection}" for name in names for projection in PROJECTIONS.values()}
    if beyond:
        raise UserError(f"Processors do not reach {min(beyond)} (of {len(beyond)} such layers). Use attach(unet, …).")
    with seeded(derive_seed(seed, "adapter-init")):
        for name in names:
            processor = EtherAttnProcessor(unet.get_submodule(name), config, name)
            if len(processor.layers):
                processors[f"{name}.processor"] = processor
    unet.requires_grad_(False)
    unet.set_attn_processor(processors)
    return ether_parameters(unet)


def ether_parameters(unet: UNet2DConditionModel) -> dict[str, nn.Parameter]:
    """The vectors of a UNet's ETHER processors, by the keys that they have in a PEFT folder."""
    found: dict[str, nn.Parameter] = {}
    for name, processor in unet.attn_processors.items():
        for key, layer in processor.layers.items() if isinstance(processor, EtherAttnProcessor) else ():
            for vector, parameter in layer.named_parameters():
                path = f"{name.removesuffix('processor')}{PROJECTIONS[key]}.{vector.replace('.default.', '.')}"
                found[PREFIX + path] = parameter
    return found


def load_ether_processors(unet: UNet2DConditionModel, path: str | Path) -> dict[str, nn.Parameter]:
    """Set processors with the vectors of a PEFT or run folder. Errors: see `read_adapter`, `set_ether_processors`."""
    saved = read_adapter(path)
    if not isinstance(saved.config, EtherConfig):
        raise UserError(f"{saved.folder} is a {saved.method} adapter; EtherAttnProcessor loads ETHER and ETHER+.")
    check_fits(unet, saved)
    parameters = set_ether_processors(unet, saved.config)
    for key, parameter in parameters.items():
        parameter.data.copy_(saved.tensors[key])
    return parameters


def remove_ether_processors(unet: UNet2DConditionModel) -> None:
    """Give each attention the processor that it had before."""
    processors: dict[str, Any] = dict(unet.attn_processors)
    ours = {key: p.delegate for key, p in processors.items() if isinstance(p, EtherAttnProcessor)}
    unet.set_attn_processor(processors | ours)


def processors_to_peft(unet: UNet2DConditionModel, name: str = "default") -> None:
    """Replace a UNet's ETHER processors by a PEFT adapter of the same vectors, which can be saved, merged, switched."""
    config = next(p.config for p in unet.attn_processors.values() if isinstance(p, EtherAttnProcessor))
    tensors: dict[str, Tensor] = {key: parameter.data for key, parameter in ether_parameters(unet).items()}
    remove_ether_processors(unet)
    inject(unet, config, name)
    fill_adapter(unet, SavedAdapter(Path("EtherAttnProcessor"), config, tensors), name)
