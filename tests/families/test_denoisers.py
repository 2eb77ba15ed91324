"""Adapters on the denoiser classes of diffusers, by presets: small random models, the whole life of an adapter each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ether_diffusion import AdapterBank, load_adapter, save_adapter
from ether_diffusion.adapters.attach import adapted_layers, attach, merge, trainable_parameters
from ether_diffusion.adapters.methods import EtherPlusSettings, EtherSettings
from ether_diffusion.adapters.presets import NAMES, presets_of
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.adapters.targets import PRESETS, reach
from ether_diffusion.adapters.weight_sum import add_up, concatenated
from ether_diffusion.errors import UserError
from ether_diffusion.exporting.lora_files import write_diffusers
from support.adapted_unets import move
from support.denoisers import BATCH, DENOISERS, built, forward

REACH = {
    "UNet2DConditionModel": (32, 32),
    "UNet2DConditionModel, XL": (56, 56),
    "SD3Transformer2DModel": (18, 19),
    "FluxTransformer2DModel": (11, 11),
    "Flux2Transformer2DModel": (10, 10),
    "ZImageTransformer2DModel": (16, 16),
    "QwenImageTransformer2DModel": (14, 16),
    "SanaTransformer2DModel": (16, 16),
    "Lumina2Transformer2DModel": (16, 16),
    "AuraFlowTransformer2DModel": (12, 12),
    "CogView4Transformer2DModel": (8, 8),
    "CogView3PlusTransformer2DModel": (8, 8),
    "ChromaTransformer2DModel": (11, 11),
    "BriaTransformer2DModel": (11, 11),
    "HunyuanImageTransformer2DModel": (15, 15),
    "HunyuanVideoTransformer3DModel": (15, 15),
    "WanTransformer3DModel": (16, 16),
    "LTXVideoTransformer3DModel": (8, 8),
    "CogVideoXTransformer3DModel": (4, 4),
    "MochiTransformer3DModel": (14, 15),
    "CosmosTransformer3DModel": (16, 16),
    "Kandinsky5Transformer3DModel": (12, 12),
    "PixArtTransformer2DModel": (8, 8),
    "DiTTransformer2DModel": (4, 4),
    "HunyuanDiT2DModel": (16, 16),
    "PRXTransformer2DModel": (6, 6),
    "HiDreamImageTransformer2DModel": (12, 12),
}
"""How many of their attention layers the preset `attention` reaches, and how many they have."""

QUICK = (
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "ZImageTransformer2DModel",
    "SanaTransformer2DModel",
    "HunyuanDiT2DModel",
)
"""Classes of the quick suite: those of the families, and one each with convolutions and with a bypassed layer."""
CLASSES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DENOISERS]


def fresh(name: str) -> Any:
    return copy.deepcopy(built(name))


@pytest.mark.parametrize("name", CLASSES)
def test_an_adapter_trains_loads_merges_exports_and_mixes(name: str, tmp_path: Path) -> None:
    row, model = DENOISERS[name], fresh(name)
    layers = attach(model, EtherPlusSettings(target="attention"))
    reached = reach(model, adapted_layers(model))
    assert (reached.attention, reached.all_attention) == REACH[name]
    assert len(layers) == reached.attention

    # One step, in which every vector of every layer gets a gradient.
    move(model, 0.02)
    forward(model, row).square().mean().backward()
    without = [key for key, p in trainable_parameters(model).items() if p.grad is None or not p.grad.any()]
    assert without == []
    torch.optim.SGD(trainable_parameters(model).values(), lr=0.1).step()

    # Saved, and loaded strictly into another copy.
    folder = save_adapter(model, tmp_path / "adapter", base_model="tiny")
    loaded = fresh(name)
    load_adapter(loaded, folder)
    with torch.no_grad():
        plain, trained = forward(built(name), row), forward(model, row)
        assert torch.equal(forward(loaded, row), trained)
        assert float((trained - plain).norm() / plain.norm()) > 1e-5
        merge(loaded)
        assert relative(forward(loaded, row), trained) < 1e-5

        # As a LoRA file, by the loader of the model's own pipeline.
        if row.pipeline:
            part = "unet" if name.startswith("UNet") else "transformer"
            changes = add_up({part: fresh(name)}, [(read_adapter(folder), 1.0)], low_rank=True)
            exact = {layer: concatenated(own) for layer, own in changes[part].items()}
            write_diffusers(tmp_path / "lora", {part: exact}, torch.float32, {"format": "pt"})
            lora = fresh(name)
            pipeline_around(row.pipeline, part, lora).load_lora_weights(tmp_path / "lora")
            assert len(adapted_layers(lora)) == len(layers)
            assert relative(forward(lora, row), trained) < 1e-4

        # In a batch of three, of which the second has none.
        bank = AdapterBank(mixed := fresh(name), capacity=2)
        bank.load("own", folder)
        with bank.select(["own", None, "own"]):
            found = forward(mixed, row)
        expected = torch.stack([trained[0], plain[1], trained[2]])
        assert len(found) == BATCH
        assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("name", CLASSES)
def test_presets_reach_more_and_more_and_every_layer_of_them_learns(name: str) -> None:
    row, counts = DENOISERS[name], []
    own = presets_of(built(name))
    for preset in NAMES if own is not None else PRESETS:
        model = fresh(name)
        layers = attach(model, EtherSettings(target=preset))
        counts.append(len(layers))
        move(model, 0.02)
        forward(model, row).square().mean().backward()
        parameters = trainable_parameters(model).items()
        assert [key for key, p in parameters if p.grad is None or not p.grad.any()] == []
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_preset_that_a_class_does_not_have_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^adapter\.target: FluxTransformer2DModel has no preset 'attention\+geglu'"):
        attach(fresh("FluxTransformer2DModel"), EtherPlusSettings(target="attention+geglu"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def pipeline_around(class_name: str, part: str, model: Any) -> Any:
    """A pipeline of this class that has nothing but a denoiser: its loader of LoRA files asks for no more."""
    made = object.__new__(getattr(diffusers, class_name))
    modules, _ = made._get_signature_keys(made)
    made.register_modules(**{**dict.fromkeys(modules), part: model})
    return made
