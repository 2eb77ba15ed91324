"""CLIP-I and CLIP-T: features against open_clip's and transformers', from every published form of the weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import (
    ClipImageScore,
    ClipTextScore,
    load_clip,
    load_csail_upernet,
    load_dino,
    load_inception,
    load_lpips,
)
from ether_diffusion.metrics.backbones import ClipBackbone

MakeImage = Callable[..., Image.Image]

NAME = "ether-diffusion-test"
VISION = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = ["a dog in the jungle", "a purple cat, seen from above", "a dog in the jungle"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One set of random weights as open_clip's folder, as torch.save's file, and as OpenAI's TorchScript archive."""
    folder = tmp_path_factory.mktemp("clip")
    config = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}
    (folder / f"{NAME}-quickgelu.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{NAME}-quickgelu.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = open_clip.CLIP(**open_clip.get_model_config(f"{NAME}-quickgelu")).eval()  # pyright: ignore
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.1)
    save_file(network.state_dict(), folder / "open_clip_model.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}, folder / "trained.pt")
    network.register_buffer("input_resolution", torch.tensor(32))  # as in OpenAI's archives
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 77, dtype=torch.long)}
        torch.jit.trace_module(network, inputs, check_trace=False).save(folder / "archive.pt")
    return {"folder": folder, "trained": folder / "trained.pt", "archive": Path(f"torchscript:{folder / 'archive.pt'}")}


@pytest.fixture(scope="module")
def clip(published: dict[str, Path]) -> ClipBackbone:
    return load_clip(NAME, str(published["folder"]))


@pytest.fixture(scope="module")
def images(make_image: MakeImage) -> list[Image.Image]:
    return [make_image(seed, size) for seed, size in enumerate([(40, 60), (60, 40), (33, 32)])]


@pytest.mark.parametrize("form", ["trained", "archive"])
def test_every_published_form_is_the_same_network(published: dict[str, Path], clip: ClipBackbone, form: str) -> None:
    assert load_clip(NAME, str(published[form])).digest == clip.digest


def test_features_are_open_clips(published: dict[str, Path], clip: ClipBackbone, images: list[Image.Image]) -> None:
    network, _, transform = open_clip.create_model_and_transforms(
        f"{NAME}-quickgelu", pretrained=str(published["folder"] / "open_clip_model.safetensors")
    )
    network.eval()
    with torch.no_grad():
        theirs = network.encode_image(torch.stack([transform(image) for image in images]))  # pyright: ignore
        texts = network.encode_text(open_clip.get_tokenizer(f"{NAME}-quickgelu")(TEXTS))  # pyright: ignore
    assert theirs.shape == (3, 48)
    assert torch.allclose(clip.image_features(images), theirs, atol=1e-5)
    assert torch.allclose(clip.text_features(TEXTS), texts, atol=1e-5)


def test_features_are_transformers(clip: ClipBackbone, images: list[Image.Image]) -> None:
    """OFT's evaluator uses CLIP of transformers, with other names of weights and of the activation."""
    network = transformers_twin(clip.network.state_dict())
    tokens = open_clip.get_tokenizer(clip.architecture)(TEXTS)
    with torch.no_grad():
        pixels = clip.preprocessing.batch(images)
        theirs = network.visual_projection(network.vision_model(pixels).pooler_output)
        texts = network.text_projection(network.text_model(tokens).pooler_output)
    assert torch.allclose(clip.image_features(images), theirs, atol=1e-5)
    assert torch.allclose(clip.text_features(TEXTS), texts, atol=1e-5)


def transformers_twin(weights: dict[str, Tensor]) -> CLIPModel:
    """A CLIPModel with the weights of an open_clip network."""
    config = CLIPConfig(
        projection_dim=48,
        vision_config={
            "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256,
            "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu",
        },
        text_config={
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
            "vocab_size": 49408, "hidden_act": "quick_gelu", "eos_token_id": 49407, "bos_token_id": 49406,
        },
    )  # fmt: skip
    found = {
        "vision_model.embeddings.class_embedding": weights["visual.class_embedding"],
        "vision_model.embeddings.position_embedding.weight": weights["visual.positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": weights["visual.conv1.weight"],
        "visual_projection.weight": weights["visual.proj"].T,
        "text_model.embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": weights["positional_embedding"],
        "text_projection.weight": weights["text_projection"].T,
        "logit_scale": weights["logit_scale"],
    }
    for end in ("weight", "bias"):
        found[f"vision_model.pre_layrnorm.{end}"] = weights[f"visual.ln_pre.{end}"]
        found[f"vision_model.post_layernorm.{end}"] = weights[f"visual.ln_post.{end}"]
        found[f"text_model.final_layer_norm.{end}"] = weights[f"ln_final.{end}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for k in range(2):
                layer, block = f"{tower}.encoder.layers.{k}", f"{prefix}transformer.resblocks.{k}"
                for part, value in zip("qkv", weights[f"{block}.attn.in_proj_{end}"].chunk(3), strict=True):
                    found[f"{layer}.self_attn.{part}_proj.{end}"] = value
                for theirs, ours in (
                    ("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                    ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"),
                ):  # fmt: skip
                    found[f"{layer}.{theirs}.{end}"] = weights[f"{block}.{ours}.{end}"]
    network = CLIPModel(config).eval()
    network.load_state_dict(found)
    return network


def test_the_scores_are_mean_cosines(clip: ClipBackbone, images: list[Image.Image]) -> None:
    features, texts = clip.image_features(images), clip.text_features(TEXTS)
    keys = ["a.png", "b.png", "c.png"]
    prompt = ClipTextScore(clip, batch_size=2).update(images, TEXTS, keys, subject="dog").compute()
    assert prompt["macro"] == pytest.approx(float(F.cosine_similarity(features, texts).mean()), abs=1e-6)
    subject = ClipImageScore(clip).update(images[:1], keys[:1], subject="dog", real=False)
    subject.update(images[1:], keys[1:], subject="dog", real=True)
    expected = float(F.cosine_similarity(features[:1], features[1:]).mean())
    assert subject.compute()["macro"] == pytest.approx(expected, abs=1e-6)
    assert subject.real_pairs()["dog"].mean() == pytest.approx(
        float(F.cosine_similarity(features[1], features[2], dim=0)), abs=1e-6
    )


def test_torchscript_is_read_only_where_it_is_named(
    published: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code would run while it is read: not for another scorer, nor for a file whose suffix says nothing of it."""
    archive = str(published["archive"]).removeprefix("torchscript:")

    def run(*_: Any, **__: Any) -> None:
        raise SystemExit("the archive's code would have run")  # which no handler of failed loads catches

    monkeypatch.setattr(torch.jit, "load", run)
    for load in (partial(load_clip, NAME), load_dino, partial(load_lpips, "alex"), load_inception):
        with pytest.raises(UserError, match=r"cannot load .*: it is a TorchScript archive, which runs code of its own"):
            load(archive)
    with pytest.raises(UserError, match=r"UPerNet-101's encoder: cannot load .*: it is a TorchScript archive"):
        load_csail_upernet(archive, archive)
    with pytest.raises(UserError, match=r"torchscript:PATH for .*, if you trust it"):
        load_clip(NAME, archive)
    with pytest.raises(SystemExit, match="would have run"):
        load_clip(NAME, f"torchscript:{archive}")


def test_long_texts_are_cut_to_what_clip_reads(clip: ClipBackbone) -> None:
    long = " ".join(["dog"] * 200)
    assert torch.equal(clip.text_features([long]), clip.text_features([long + " dog"]))


def test_openais_architectures_have_openais_activation() -> None:
    for name in ("ViT-L-14", "ViT-B-32"):
        assert open_clip.get_model_config(f"{name}-quickgelu")["quick_gelu"]  # pyright: ignore
        assert "openai" in open_clip.list_pretrained_tags_by_model(f"{name}-quickgelu")


def test_invalid_weights_are_one_error(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ways = r"hf download timm/vit_large_patch14_clip_224\.openai.*ViT-L-14\.pt"
    for source, reason in (
        ("openai", "it is not in the local cache, and cannot be downloaded"),
        (str(published["trained"]), "of its 446 weights are missing"),
        (str(tmp_path), r"the folder holds none of open_clip_model\.safetensors"),
        ("nowhere.pt", "no such file or folder"),
    ):
        with pytest.raises(UserError, match=rf"CLIP ViT-L-14: cannot load .*{reason}.*{ways}"):
            load_clip("ViT-L-14", source)
    with pytest.raises(UserError, match=r"open_clip knows no 'ViT-L14-quickgelu'\. Did you mean 'ViT-L-14'\?"):
        load_clip("ViT-L14")
    score = ClipTextScore(load_clip(NAME, str(published["folder"])))
    with pytest.raises(UserError, match="2 images, 1 texts and 2 keys of dog"):
        score.update([Image.new("RGB", (8, 8))] * 2, ["a"], ["x", "y"], subject="dog")
