"""Loads backbones: DINO, DINOv2, CLIP, LPIPS' networks, FID's Inception, the miniature's.

Each is frozen, in fp32, with a digest of its weights. A source is a hub name, a folder or a file. UserError is raised
for weights that cannot be found, read or fitted, and says where to get them.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import nn

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.tinyworld.scoring import load_scorers
from ether_diffusion.weight_files import loading

from .backbones import ClipBackbone, DinoBackbone, InceptionBackbone, LpipsBackbone, TinyBackbone, TinyClip
from .preprocessing import CLIP_CENTRE_CROP, DINO_CENTRE_CROP, Preprocessing
from .weights import cached, fetch, fill, find_file, pretrained, read_tensors

Device = str | torch.device

DINO = "facebook/dino-vits16"
DINOV2 = "facebook/dinov2-base"


def load_dino(
    source: str = DINO, preprocessing: Preprocessing = DINO_CENTRE_CROP, device: Device = "cpu"
) -> DinoBackbone:
    """DINO's ViT-S/16.

    Args:
        source: A hub name or a folder in transformers' layout, or the file that DINO's authors publish.
        preprocessing: `DINO_CENTRE_CROP`, or `DINO_SQUASH` to compare with OFT's numbers.
    """
    ways = (
        f"Ways to name DINO: the hub name '{DINO}' (needs the network once, or `hf download {DINO}` beforehand); its "
        "folder; or the path of dino_deitsmall16_pretrain.pth, which the facebookresearch/dino project publishes."
    )
    with loading(f"DINO: cannot load {source!r}", ways):
        network = _dino(source)
    return DinoBackbone(source, network.to(device), torch.device(device), preprocessing)


def load_dinov2(
    source: str = DINOV2, preprocessing: Preprocessing = DINO_CENTRE_CROP, device: Device = "cpu"
) -> DinoBackbone:
    """DINOv2 (Oquab et al. 2023) by transformers; the features are the class token after the last norm.

    Args:
        source: A hub name or a folder in transformers' layout.
        preprocessing: As DINOv2's own evaluation, which is DINO's: short side 256, centre crop 224.
    """
    from transformers import Dinov2Model

    ways = (
        f"Ways to name DINOv2: the hub name '{DINOV2}' (needs the network once, or `hf download {DINOV2}` beforehand), "
        "or its folder."
    )
    with loading(f"DINOv2: cannot load {source!r}", ways):
        network = pretrained(Dinov2Model, source)
    return DinoBackbone(source, network.to(device), torch.device(device), preprocessing)


CLIP_ARCHITECTURES = ("ViT-L-14", "ViT-L-14-336", "ViT-B-32")
OPENAI = "openai"
TORCHSCRIPT = "torchscript:"
"""Before the path of an archive whose code may run."""


def load_clip(architecture: str = "ViT-L-14", source: str = OPENAI, device: Device = "cpu") -> ClipBackbone:
    """OpenAI's CLIP, or other weights that were trained with its quick GELU.

    Args:
        architecture: One of open_clip's names: `ViT-L-14`, `ViT-L-14-336` (CMMD's), `ViT-B-32`.
        source: `openai` for what open_clip fetches; a hub name or a folder in open_clip's layout; a file; or
            `torchscript:` and a file such as OpenAI's own archive, which can run code while it is read.
    """
    import open_clip

    name = architecture if architecture.endswith("-quickgelu") else f"{architecture}-quickgelu"
    config = open_clip.get_model_config(name)
    if config is None:
        known = ", ".join(CLIP_ARCHITECTURES)
        near = did_you_mean(architecture, CLIP_ARCHITECTURES)
        raise UserError(f"CLIP: open_clip knows no {name!r}.{near} Architectures of OpenAI's weights: {known}.")
    published: dict[str, Any] = open_clip.pretrained.get_pretrained_cfg(name, OPENAI)
    hub_name = published.get("hf_hub", "").rstrip("/")
    file = published.get("url", "").rsplit("/", 1)[-1] or "what open_clip.create_model saved"
    ways = f"Ways to name CLIP: '{OPENAI}'" + (
        f" or '{hub_name}' (needs the network once, or `hf download {hub_name}` beforehand)" if hub_name else ""
    )
    ways += f"; a folder with {_CLIP_FILES[0]}; the path of such a file; or {TORCHSCRIPT}PATH for {file}, if you trust "
    ways += "it: OpenAI's own archive is TorchScript, which can run any code while it is read."
    with loading(f"CLIP {architecture}: cannot load {source!r}", ways):
        where = hub_name or source if source == OPENAI else source.removeprefix(TORCHSCRIPT)
        tensors = read_tensors(find_file(where, _CLIP_FILES), torchscript=source.startswith(TORCHSCRIPT))
        with init_empty_weights(include_buffers=False):  # the causal mask is a buffer, and no file holds it
            network = open_clip.CLIP(**config)
        fill(network, tensors)
    side = int(config["vision_cfg"]["image_size"])
    preprocessing = Preprocessing(side, "bicubic", False, side, CLIP_CENTRE_CROP.mean, CLIP_CENTRE_CROP.std)
    return ClipBackbone(source, network.to(device), torch.device(device), name, preprocessing)


def load_lpips(
    net: Literal["alex", "vgg"] = "alex", source: str | None = None, device: Device = "cpu"
) -> LpipsBackbone:
    """LPIPS' network; the package `lpips` has the weights of its channels.

    Args:
        source: torchvision's file of the trunk, AlexNet or VGG-16 with IMAGENET1K_V1 weights; or a folder or a
            repository of the hub that has it under its published name; default: torch's hub cache, downloaded if
            missing.
    """
    import lpips
    from torchvision.models import AlexNet_Weights, VGG16_Weights

    urls = {"alex": AlexNet_Weights.IMAGENET1K_V1.url, "vgg": VGG16_Weights.IMAGENET1K_V1.url}
    if net not in urls:
        raise UserError(f"LPIPS: net is {net!r}; expected one of {', '.join(urls)}.")
    place = cached(urls[net])
    ways = f"Get {urls[net]} (torchvision publishes it) and put it at {place}, or give its path or its folder."
    with loading(f"LPIPS {net}: cannot load {source or urls[net]!r}", ways):
        trunk = read_tensors(find_file(source, (place.name,)) if source else fetch(urls[net]))
        channels = read_tensors(Path(lpips.__path__[0]) / "weights" / "v0.1" / f"{net}.pth")
        # The constants of the scaling layer are buffers, and no file holds them.
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's, of arguments that lpips still passes
            network: Any = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        tensors = {name: value for name, value in network.state_dict().items() if name.startswith("scaling_layer.")}
        for name in network.state_dict():
            part, _, rest = name.partition(".")
            # net.slice2.3.weight is torchvision's features.3.weight; lins.2.model… is lin2.model… a second time.
            if part == "net" and (given := trunk.get(f"features.{rest.partition('.')[2]}")) is not None:
                tensors[name] = given
            elif part.startswith("lin"):
                tensors[name] = channels[name if part != "lins" else f"lin{rest}"]
        fill(network, tensors)
    return LpipsBackbone(source or urls[net], network.to(device), torch.device(device), net)


def load_inception(source: str | None = None, device: Device = "cpu") -> InceptionBackbone:
    """FID's Inception.

    Args:
        source: torch-fidelity's file, or a folder or a repository of the hub that has it under its published name;
            default: torch's hub cache, downloaded if missing.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    place = cached(URL_INCEPTION_V3)
    ways = (
        f"Get {URL_INCEPTION_V3} (torch-fidelity publishes it) and put it at {place}, or give its path or its folder."
    )
    with loading(f"Inception: cannot load {source or URL_INCEPTION_V3!r}", ways):
        # torch-fidelity would run code that a pickle holds: it gets the tensors alone.
        weights: Any = io.BytesIO()
        file = find_file(source, (place.name,)) if source else fetch(URL_INCEPTION_V3)
        torch.save(read_tensors(file), weights)
        weights.seek(0)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
    return InceptionBackbone(source or URL_INCEPTION_V3, network.to(device), torch.device(device))


def load_tiny_backbone() -> TinyBackbone:
    """The miniature's stand-in for DINO, from the package."""
    scorers = load_scorers()
    return TinyBackbone("tiny", scorers.backbone, torch.device("cpu"), scorers)


def load_tiny_clip() -> TinyClip:
    """The miniature's stand-in for CLIP, from the package."""
    scorers = load_scorers()
    return TinyClip("tiny", scorers.clip, torch.device("cpu"), scorers)


_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def _dino(source: str) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer
    from transformers import ViTModel

    if Path(source).is_file():
        tensors = read_tensors(Path(source))
        with torch.device("meta"):  # timm's names are the authors'
            return fill(VisionTransformer(patch_size=16, embed_dim=384, depth=12, num_heads=6, num_classes=0), tensors)
    return pretrained(ViTModel, source, add_pooling_layer=False)
