"""Segmenters: CSAIL's names, shapes and arithmetic; every segmenter's maps against its library's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.upernet.modeling_upernet import UperNetHead

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import (
    SegmentationScore,
    load_csail_upernet,
    load_tiny_segmenter,
    load_transformers_segmenter,
)
from ether_diffusion.metrics.csail_upernet import Decoder, Encoder
from ether_diffusion.metrics.segmenters import CSAIL_FILES, CSAIL_SINGLE_SCALE, CsailUperNet, csail_size
from ether_diffusion.metrics.weights import fill, read_tensors
from ether_diffusion.tinyworld.render import render
from ether_diffusion.tinyworld.scenes import sample_scene

MakeImage = Callable[..., Image.Image]

BLOCKS, CHANNELS = (1, 2, 1, 1), (32, 64, 128, 256)


def scrambled(network: nn.Module, seed: int) -> nn.Module:
    """The network with random weights and statistics, so that no norm is the identity."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(tensor.shape, generator=random)
        fan = tensor[0].numel() if tensor.ndim == 4 else 1
        kinds = {"running_var": noise.abs() + 0.5, "bias": noise * 0.2, "running_mean": noise * 0.2}
        scale = noise * (2 / fan) ** 0.5 if tensor.ndim == 4 else noise * 0.2 + 1
        tensor.copy_(kinds.get(name.rsplit(".", 1)[-1], scale))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return scrambled(Encoder(BLOCKS, width=8), 0)  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return scrambled(Decoder(7, CHANNELS, width=16), 1)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize(
    ("network", "count", "expected"),
    [
        (Encoder, 530, "422dad77e6b1aef8fc40716db5087e2ea335cdc8c23fb3a6b0a2a8a4aa1a6efc"),
        (Decoder, 62, "a4e73c82e071bc89abc6479294dfcdf132a5d9c8f65813615b3ca620383faa63"),
    ],
)
def test_names_and_shapes_are_those_of_the_published_files(network: Any, count: int, expected: str) -> None:
    """SHA-256 of the sorted lines `name 64x3x3x3`, taken from a list of the published tensors."""
    with torch.device("meta"):
        tensors = network().state_dict().items()
    lines = [f"{name} {'x'.join(map(str, tensor.shape))}" for name, tensor in tensors if "num_batches" not in name]
    assert len(lines) == count
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == expected


def test_the_encoder_is_timms_deep_stemmed_resnet(encoder: Encoder) -> None:
    twin: Any = ResNet(Bottleneck, BLOCKS, stem_width=64, stem_type="deep", channels=(8, 16, 32, 64))  # pyright: ignore
    stem = {
        "conv1": "conv1.0",
        "bn1": "conv1.1",
        "conv2": "conv1.3",
        "bn2": "conv1.4",
        "conv3": "conv1.6",
        "bn3": "bn1",
    }
    weights = {}
    for name, tensor in encoder.state_dict().items():
        first, rest = name.split(".", 1)
        weights[f"{stem.get(first, first)}.{rest}"] = tensor
    twin.load_state_dict(weights | {name: twin.state_dict()[name] for name in ("fc.weight", "fc.bias")})
    x = twin.maxpool(twin.eval().act1(twin.bn1(twin.conv1(torch.randn(1, 3, 64, 96, generator=seeded(2))))))
    with torch.no_grad():
        for stage, ours in enumerate(encoder(torch.randn(1, 3, 64, 96, generator=seeded(2))), 1):
            x = twin.get_submodule(f"layer{stage}")(x)
            assert torch.allclose(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("open_relu", [True, False])
def test_the_decoder_is_transformers_head_except_for_the_pooling_order(decoder: Decoder, open_relu: bool) -> None:
    """Pooled features are enlarged before the ReLU here, after it there: equal only if that ReLU changes nothing."""
    random = seeded(3)
    stages = [torch.randn(1, size, side, side + 3, generator=random) for size, side in zip(CHANNELS, (40, 20, 10, 5))]  # noqa: B905
    ours = Decoder(7, CHANNELS, width=16).eval()
    ours.load_state_dict(decoder.state_dict())
    if open_relu:
        for branch in ours.ppm_conv:
            branch.get_submodule("1").bias.data += 20  # pyright: ignore
    options: dict[str, Any] = {"hidden_size": 16, "num_labels": 7, "pool_scales": [1, 2, 3, 6]}
    config = UperNetConfig(backbone_config=ConvNextConfig(), **options)
    head = UperNetHead(config, in_channels=list(CHANNELS)).eval()
    weights: dict[str, Tensor] = {}
    moved = {"ppm_last_conv": "bottleneck", "fpn_in": "lateral_convs", "fpn_out": "fpn_convs"}
    for name, tensor in ours.state_dict().items():
        part, *rest = name.split(".")
        if part == "conv_last":
            name = ".".join(
                ["classifier", rest[-1]] if rest[0] == "1" else ["fpn_bottleneck", layer(rest[1]), rest[-1]]
            )
        elif part == "ppm_conv":
            name = ".".join(["psp_modules", rest[0], "1", layer(rest[1]), rest[-1]])
        else:
            middle = [] if part == "ppm_last_conv" else rest[:1]
            name = ".".join([moved[part], *middle, layer(rest[-2]), rest[-1]])
        weights[name] = tensor
    head.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(ours(stages), head(stages), rtol=1e-3, atol=1e-3) is open_relu


def layer(number: str) -> str:
    return {"0": "conv", "1": "batch_norm"}[number]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((512, 512), 300, (320, 320)),
        ((512, 512), 375, (384, 384)),
        ((512, 512), 450, (480, 480)),
        ((512, 512), 525, (544, 544)),
        ((512, 512), 600, (608, 608)),
        ((683, 512), 300, (416, 320)),  # 400.2 is cut to 400, then raised to 416
        ((2000, 500), 600, (1024, 256)),  # the long side is held at 1000
        ((640, 320), 320, (640, 320)),
    ],
)
def test_sizes_of_csails_scales(size: tuple[int, int], short_side: int, expected: tuple[int, int]) -> None:
    assert csail_size(size, short_side) == expected


def test_probabilities_are_averaged_over_the_scales(encoder: Encoder, decoder: Decoder, make_image: MakeImage) -> None:
    images = [make_image(seed, (60, 44)) for seed in range(2)]
    segmenter = CsailUperNet(encoder, decoder, torch.device("cpu"), short_sides=(40, 70))
    expected = torch.zeros(2, 7, 44, 60)
    for size in ((64, 64), (96, 96)):  # 54 x 40 and 95 x 70, raised
        for k, image in enumerate(images):
            x = np.asarray(image.resize(size, Image.Resampling.BILINEAR)) / 255
            x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            logits = decoder(encoder(torch.from_numpy(x.transpose(2, 0, 1)).float()[None]))
            full = F.interpolate(logits, (44, 60), mode="bilinear", align_corners=False)
            expected[k] += F.softmax(full, dim=1)[0] / 2
    assert torch.allclose(segmenter.probabilities(images), expected, atol=1e-5)
    labels = segmenter(images)
    assert labels.shape == (2, 44, 60)
    assert torch.equal(labels, segmenter.probabilities(images).argmax(dim=1) + 1)
    assert len(labels.unique()) > 2
    assert SegmentationScore(segmenter.num_classes).update(labels, labels).compute()["miou"] == 1
    one = CsailUperNet(encoder, decoder, torch.device("cpu"), short_sides=(70,))
    assert not torch.allclose(one.probabilities(images), expected, atol=1e-2)
    with pytest.raises(UserError, match="images of one size are one batch; got 44 x 60, 60 x 44"):
        segmenter([images[0], images[0].transpose(Image.Transpose.ROTATE_90)])


def test_unused_buffers_are_ignored_and_missing_weights_are_not(encoder: Encoder, tmp_path: Path) -> None:
    state = encoder.state_dict()
    norms = {name.removesuffix("running_mean") for name in state if name.endswith("running_mean")}
    unused = {f"{norm}{extra}": torch.zeros(1) for norm in norms for extra in ("_tmp_running_var", "_running_iter")}
    kept = {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    torch.save(kept | unused, tmp_path / "encoder.pth")
    loaded = fill(Encoder(BLOCKS, width=8), read_tensors(tmp_path / "encoder.pth"))
    x = torch.randn(1, 3, 64, 64, generator=seeded(4))
    for ours, theirs in zip(loaded(x), encoder(x), strict=True):
        assert torch.equal(ours, theirs)
    for path, message in (
        (tmp_path / "encoder.pth", "weights are missing"),  # of the small network
        (tmp_path / "nowhere.pth", "no such file or folder"),
        (tmp_path, r"the folder holds none of encoder_epoch_50\.pth"),
    ):
        with pytest.raises(UserError, match=rf"UPerNet-101's encoder: cannot load .*{message}.*encoder_epoch_50\.pth"):
            load_csail_upernet(path, path)


@pytest.mark.slow
def test_the_published_size_loads_and_runs(tmp_path: Path, make_image: MakeImage) -> None:
    for name, network in (("encoder", Encoder), ("decoder", Decoder)):
        torch.save(scrambled(network(), 5).state_dict(), tmp_path / CSAIL_FILES[name])
    segmenter = load_csail_upernet(tmp_path, tmp_path, short_sides=CSAIL_SINGLE_SCALE)
    labels = segmenter([make_image(1, (512, 512))])
    assert labels.shape == (1, 512, 512)
    assert 1 <= int(labels.min()) <= int(labels.max()) <= segmenter.num_classes == 150


def networks() -> dict[str, Any]:
    """A SegFormer and an UperNet, small, of eleven classes."""
    # The base class' settings, such as num_labels, are not in these classes' signatures.
    labels: dict[str, Any] = {"num_labels": 11}
    stages: dict[str, Any] = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16]}
    segformer = SegformerConfig(**sizes, num_attention_heads=[1] * 4, decoder_hidden_size=16, **labels)
    backbone = ConvNextConfig(**sizes, **stages)
    upernet = UperNetConfig(
        backbone_config=backbone, hidden_size=8, auxiliary_in_channels=16, use_auxiliary_head=True, **labels
    )
    return {
        "segformer": SegformerForSemanticSegmentation(segformer),
        "upernet": UperNetForSemanticSegmentation(upernet),
    }


@pytest.mark.parametrize("kind", ["segformer", "upernet"])
def test_maps_are_those_of_transformers(kind: str, tmp_path: Path, make_image: MakeImage) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = networks()[kind]
        for parameter in network.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(tmp_path)
    processor = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config["image_processor_type"] = "SegformerImageProcessor"  # as the published folders name it
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    images = [make_image(seed, (90, 70)) for seed in range(2)]
    segmenter = load_transformers_segmenter(str(tmp_path))
    assert segmenter.num_classes == 11
    network = type(network).from_pretrained(tmp_path).eval()  # pyright: ignore
    with torch.no_grad():
        output = network(**processor(images, return_tensors="pt"))
    theirs = processor.post_process_semantic_segmentation(output, target_sizes=[(70, 90)] * 2)
    ours = segmenter(images)
    assert torch.equal(ours, torch.stack(theirs) + 1)  # pyright: ignore
    assert len(ours.unique()) > 2


def test_other_preprocessing_is_another_digest(tmp_path: Path) -> None:
    """Of the same weights; the same settings saved again, or under another class name, are the same digest."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        networks()["segformer"].save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"

    def digest(**changed: Any) -> str:
        settings: dict[str, Any] = {"size": {"height": 64, "width": 64}, **changed}
        SegformerImageProcessorPil(**settings).save_pretrained(tmp_path)
        config = json.loads(path.read_text()) | {"image_processor_type": "SegformerImageProcessor"}
        path.write_text(json.dumps(config))
        return load_transformers_segmenter(str(tmp_path)).digest

    before = digest()
    load_transformers_segmenter(str(tmp_path)).processor.save_pretrained(tmp_path)
    assert load_transformers_segmenter(str(tmp_path)).digest == before
    others = digest(image_mean=[0.5, 0.5, 0.5]), digest(size={"height": 32, "width": 32}), digest(do_normalize=False)
    assert len({before, *others}) == 4
    assert len({one.split("-")[0] for one in (before, *others)}) == 1
    assert digest() == before


def test_the_miniatures_segmenter_labels_rendered_scenes() -> None:
    rendered = [render(sample_scene(seed)) for seed in range(8)]
    images, labels = [image for image, _ in rendered], np.stack([np.asarray(label) for _, label in rendered])
    segmenter = load_tiny_segmenter()
    found = SegmentationScore(segmenter.num_classes).update(segmenter(images), labels).compute()
    assert found["pixel_accuracy"] > 0.9
    assert found["miou_absent_zero"] < found["miou"]
    with pytest.raises(UserError, match="an image of 32 x 64; expected 64 x 64"):
        segmenter([images[0].crop((0, 0, 32, 64))])


def test_invalid_sources_are_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for source in (str(tmp_path), "nvidia/segformer-b0-finetuned-ade-512-512"):
        with pytest.raises(UserError, match=r"segmenter: cannot load .*Ways to name a segmenter: a hub name"):
            load_transformers_segmenter(source)
