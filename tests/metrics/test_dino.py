"""DINO and DINOv2: against the libraries' own forward passes and OFT's pair by pair mean."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import DinoScore, load_dino, load_dinov2
from ether_diffusion.metrics.backbones import DinoBackbone
from ether_diffusion.metrics.preprocessing import DINO_SQUASH

MakeImage = Callable[..., Image.Image]

WIDTH, DEPTH = 384, 12


def authors_weights() -> dict[str, Tensor]:
    """Random weights under the names and shapes of dino_deitsmall16_pretrain.pth."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, scale: float = 0.05, offset: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale + offset

    found = {
        "cls_token": random(1, 1, WIDTH),
        "pos_embed": random(1, 197, WIDTH, scale=0.5),
        "patch_embed.proj.weight": random(WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": random(WIDTH),
    }
    for k in range(DEPTH):
        for norm in ("norm1", "norm2"):
            found |= {
                f"blocks.{k}.{norm}.weight": random(WIDTH, offset=1),
                f"blocks.{k}.{norm}.bias": random(WIDTH),
            }
        for name, out, into in (("attn.qkv", 3, 1), ("attn.proj", 1, 1), ("mlp.fc1", 4, 1), ("mlp.fc2", 1, 4)):
            found[f"blocks.{k}.{name}.weight"] = random(out * WIDTH, into * WIDTH)
            found[f"blocks.{k}.{name}.bias"] = random(out * WIDTH)
    return found | {"norm.weight": random(WIDTH, offset=1), "norm.bias": random(WIDTH)}


def hub_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of facebook/dino-vits16."""
    found = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
    }
    for end in ("weight", "bias"):
        for k in range(DEPTH):
            layer, block = f"encoder.layer.{k}", f"blocks.{k}"
            for name, part in zip(("query", "key", "value"), weights[f"{block}.attn.qkv.{end}"].chunk(3), strict=True):
                found[f"{layer}.attention.attention.{name}.{end}"] = part.clone()
            for theirs, ours in (
                ("layernorm_before", "norm1"),
                ("layernorm_after", "norm2"),
                ("attention.output.dense", "attn.proj"),
                ("intermediate.dense", "mlp.fc1"),
                ("output.dense", "mlp.fc2"),
            ):
                found[f"{layer}.{theirs}.{end}"] = weights[f"{block}.{ours}.{end}"]
        found[f"layernorm.{end}"] = weights[f"norm.{end}"]
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino") / "dino_deitsmall16_pretrain.pth"
    torch.save(authors_weights(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dino-vits16")
    config = {
        "architectures": ["ViTModel"], "model_type": "vit", "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": 6, "intermediate_size": 4 * WIDTH, "hidden_act": "gelu", "image_size": 224,
        "patch_size": 16, "num_channels": 3, "qkv_bias": True, "layer_norm_eps": 1e-12,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file(hub_weights(authors_weights()), path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def backbone(file: Path) -> DinoBackbone:
    return load_dino(str(file), preprocessing=DINO_SQUASH)


def test_both_published_forms_of_the_weights_give_the_same_features(
    backbone: DinoBackbone, folder: Path, make_image: MakeImage
) -> None:
    images = [make_image(seed, (100, 150)) for seed in range(2)]
    hub = load_dino(str(folder), preprocessing=DINO_SQUASH)
    ours = backbone.image_features(images)
    assert ours.shape == (2, WIDTH)
    assert not torch.allclose(ours[0], ours[1], atol=0.1)
    assert torch.allclose(ours, hub.image_features(images), atol=2e-4)
    assert not any(parameter.requires_grad for parameter in hub.network.parameters())


def test_features_are_those_of_transformers(folder: Path, make_image: MakeImage) -> None:
    image = make_image(3, (300, 200))
    processor = ViTImageProcessorPil(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=2)
    network = ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = network(**processor(image, return_tensors="pt")).last_hidden_state[:, 0]
    assert torch.allclose(load_dino(str(folder), DINO_SQUASH).image_features([image]), theirs, atol=1e-5)


def test_the_score_is_the_mean_cosine_pair_by_pair(backbone: DinoBackbone, make_image: MakeImage) -> None:
    photos = {"dog": [make_image(k, (90, 60)) for k in range(2)], "cat": [make_image(7, (60, 90))]}
    generated = {"dog": [make_image(20)], "cat": [make_image(21)]}
    metric = DinoScore(backbone, batch_size=2)
    for subject in photos:
        metric.update(photos[subject], [f"{k}.jpg" for k in range(len(photos[subject]))], subject=subject, real=True)
        metric.update(
            generated[subject],
            [f"{k}.png" for k in range(len(generated[subject]))],
            subject=subject,
            real=False,
        )
    one_by_one = {
        (subject, kind): [backbone.image_features([image]) for image in images[subject]]
        for kind, images in (("real", photos), ("generated", generated))
        for subject in images
    }
    values = {
        subject: [
            float(F.cosine_similarity(one, other))
            for one in one_by_one[subject, "real"]
            for other in one_by_one[subject, "generated"]
        ]
        for subject in photos
    }
    found = metric.compute()
    flat = [value for one in values.values() for value in one]
    assert found["flat"] == pytest.approx(sum(flat) / len(flat), abs=1e-6)
    means = [sum(one) / len(one) for one in values.values()]
    assert found["macro"] == pytest.approx(sum(means) / 2, abs=1e-6)
    assert found["flat"] != pytest.approx(found["macro"], abs=1e-6)
    assert found["pairs"] == {"cat": 1, "dog": 2}


def test_invalid_weights_are_one_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = authors_weights()
    torch.save({"teacher": weights}, tmp_path / "full.pth")
    torch.save({name: weights[name] for name in list(weights)[:-1]}, tmp_path / "cut.pth")
    torch.save({**weights, "pos_embed": weights["pos_embed"][:, :10]}, tmp_path / "other.pth")
    torch.save({"weights": Path("an object")}, tmp_path / "objects.pth")
    (tmp_path / "page.pth").write_text("<html>")
    for name, reason in (
        ("full.pth", "it holds no tensors by name"),
        ("cut.pth", r"1 of its 150 weights are missing, e\.g\. norm\.bias"),
        ("other.pth", r"pos_embed is of shape \(1, 10, 384\), expected \(1, 197, 384\)"),
        ("objects.pth", "Weights only load failed"),
        ("page.pth", "it is not what torch.save writes"),
        ("nowhere.pth", "no such folder"),
        ("", "Error no file named|no file named|does not appear to have a file named"),
    ):
        with pytest.raises(UserError, match=rf"(?s)DINO: cannot load .*{reason}.*hf download facebook/dino-vits16"):
            load_dino(str(tmp_path / name))
    hub = hub_weights(weights)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text((folder / "config.json").read_text())
    save_file({name: hub[name] for name in list(hub)[:-1]}, tmp_path / "hub/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 of its \d+ weights are missing, e\.g\. layernorm"):
        load_dino(str(tmp_path / "hub"))
    with pytest.raises(UserError, match="it is not in the local cache, and cannot be downloaded"):
        load_dino()


def test_dinov2s_features_are_those_of_transformers_with_its_own_preprocessing(
    tmp_path: Path, make_image: MakeImage
) -> None:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    processor = BitImageProcessorPil(
        size={"shortest_edge": 256}, crop_size=224, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    image = make_image(3, (300, 280))
    with torch.no_grad():
        theirs = network(**processor(image, return_tensors="pt")).pooler_output  # the class token, after the norm
    assert torch.allclose(load_dinov2(str(tmp_path)).image_features([image]), theirs, atol=1e-5)


def test_missing_weights_of_dinov2_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DINOv2: cannot load .*hf download facebook/dinov2-base"):
        load_dinov2(str(tmp_path))
