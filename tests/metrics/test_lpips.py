"""LPIPS: against the lpips package; its networks against torchvision's."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import lpips
import pytest
import torch
import torchvision
from accelerate import init_empty_weights
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import LpipsDiversity, LpipsScore, load_lpips
from ether_diffusion.metrics.backbones import LpipsBackbone

MakeImage = Callable[..., Image.Image]


def trunk(net: str) -> tuple[Any, dict[str, Tensor]]:
    """A meta copy of torchvision's network, and random weights for its features, under its own names."""
    with torch.device("meta"):
        network = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]()
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("features."):
            scale = (2 / max(1, tensor[0].numel())) ** 0.5 if tensor.ndim > 1 else 0.05
            weights[name] = torch.randn(tensor.shape, generator=random) * scale
    return network, weights


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trunks")
    for net in ("alex", "vgg"):
        torch.save(trunk(net)[1] | {"classifier.6.bias": torch.zeros(1000)}, folder / f"{net}.pth")
    return {net: folder / f"{net}.pth" for net in ("alex", "vgg")}


def small(backbone: LpipsBackbone, size: int = 72) -> LpipsBackbone:
    return replace(backbone, preprocessing=replace(backbone.preprocessing, size=size))


@pytest.fixture(scope="module")
def alex(files: dict[str, Path]) -> LpipsBackbone:
    return small(load_lpips("alex", str(files["alex"])))


def package_network(net: str) -> lpips.LPIPS:
    """The lpips package's own, on the same trunk, with the channel weights that it ships."""
    # Initialising 138 million weights of VGG-16, to be replaced, would take seconds.
    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    channels = torch.load(Path(lpips.__path__[0]) / f"weights/v0.1/{net}.pth", map_location="cpu", weights_only=True)
    network.load_state_dict(channels, strict=False, assign=True)
    features = torch.nn.Sequential(
        *[layer for k in range(1, 6) for layer in network.net.get_submodule(f"slice{k}").children()]
    )
    weights = {name.removeprefix("features."): value for name, value in trunk(net)[1].items()}
    features.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def package() -> lpips.LPIPS:
    return package_network("alex")


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_distances_are_those_of_the_package(files: dict[str, Path], make_image: MakeImage, net: str) -> None:
    backbone = small(load_lpips(net, str(files[net])))  # pyright: ignore[reportArgumentType]
    package = package_network(net)
    left, right = ([make_image(seed, (90, 80)) for seed in seeds] for seeds in ((1, 2), (3, 4, 5)))
    ours = backbone.distances(backbone.feature_maps(left), backbone.feature_maps(right))
    for row, one in enumerate(left):
        for column, other in enumerate(right):
            theirs = float(package(backbone.preprocessing(one)[None], backbone.preprocessing(other)[None]))
            assert theirs > 0.01
            assert float(ours[row, column]) == pytest.approx(theirs, abs=1e-6)


def test_at_the_protocols_size(files: dict[str, Path], package: lpips.LPIPS, make_image: MakeImage) -> None:
    one, other = make_image(1, (300, 200)), make_image(2, (512, 512))
    backbone = load_lpips("alex", str(files["alex"]))
    assert backbone.preprocessing(one).shape == (3, 512, 512)
    ours = backbone.distances(backbone.feature_maps([one]), backbone.feature_maps([other]))
    theirs = package(backbone.preprocessing(one)[None], backbone.preprocessing(other)[None])
    assert float(ours) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize(("net", "layers"), [("alex", (1, 4, 7, 9, 11)), ("vgg", (3, 8, 15, 22, 29))])
def test_maps_are_torchvisions_activations(
    files: dict[str, Path], make_image: MakeImage, net: str, layers: tuple[int, ...]
) -> None:
    """The layers that the LPIPS paper names: after each ReLU of AlexNet, and of the last in each block of VGG-16."""
    backbone = small(load_lpips(net, str(files[net])), 64)  # pyright: ignore[reportArgumentType]
    network, weights = trunk(net)
    network.load_state_dict(weights, strict=False, assign=True)
    image = make_image(1)
    # Zhang et al.'s constants, of pixels in ±1.
    shift, scale = (torch.tensor(v).view(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    x, found = (backbone.preprocessing(image)[None] - shift) / scale, []
    with torch.no_grad():
        for k, layer in enumerate(network.features):
            x = layer(x)
            if k in layers:
                found.append(x / x.norm(dim=1, keepdim=True).clamp_min(1e-10))
                x = x.clone()
    for ours, theirs in zip(backbone.feature_maps([image]), found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_scores_are_means_of_the_packages_pairs(
    alex: LpipsBackbone, package: lpips.LPIPS, make_image: MakeImage
) -> None:
    images = {name: make_image(seed) for seed, name in enumerate(("p.jpg", "q.jpg", "x.png", "y.png", "z.png"))}

    def distance(one: str, other: str) -> float:
        return float(package(alex.preprocessing(images[one])[None], alex.preprocessing(images[other])[None]))

    real, generated = ["p.jpg", "q.jpg"], ["z.png", "x.png", "y.png"]
    score = LpipsScore(alex, batch_size=2).update(
        [images[name] for name in generated], generated, [images[name] for name in real], real, subject="dog"
    )
    expected = [distance(one, other) for one in generated for other in real]
    assert score.compute()["macro"] == pytest.approx(sum(expected) / 6, abs=1e-6)
    found = score.pairs()["dog"]
    assert found.values[found.rows.index("x.png")].tolist() == pytest.approx(expected[2:4], abs=1e-6)
    diversity = LpipsDiversity(alex).update([images[name] for name in generated], generated, group="dog, in the snow")
    expected = [distance(one, other) for one, other in combinations(generated, 2)]
    assert diversity.compute()["macro"] == pytest.approx(sum(expected) / 3, abs=1e-6)
    assert diversity.compute()["pairs"] == {"dog, in the snow": 3}


def test_an_image_is_at_no_distance_from_itself(alex: LpipsBackbone, make_image: MakeImage) -> None:
    maps = alex.feature_maps([make_image(1), make_image(2)])
    distances = alex.distances(maps, maps)
    assert distances.diagonal().tolist() == [0, 0]
    assert torch.allclose(distances, distances.T, atol=1e-9)


def test_order_batch_size_and_processes_change_nothing(alex: LpipsBackbone, make_image: MakeImage) -> None:
    photos = {name: make_image(seed) for seed, name in enumerate(("p.jpg", "q.jpg", "r.jpg"))}
    generated = {name: make_image(seed) for seed, name in enumerate(("v.png", "w.png", "x.png", "y.png", "z.png"), 10)}

    def pairs(batch_size: int, names: list[str], real: list[str]) -> LpipsScore:
        metric = LpipsScore(alex, batch_size)
        return metric.update([generated[n] for n in names], names, [photos[n] for n in real], real, subject="dog")

    def among(batch_size: int, groups: dict[str, list[str]]) -> LpipsDiversity:
        metric = LpipsDiversity(alex, batch_size)
        for group, names in groups.items():
            metric.update([generated[n] for n in names], names, group=group)
        return metric

    names, real, groups = (
        list(generated),
        list(photos),
        {"snow": ["v.png", "w.png", "x.png"], "night": ["y.png", "z.png"]},
    )
    turned = {group: members[::-1] for group, members in groups.items()}
    for whole, parts, empty in (
        (pairs(4, names, real), [pairs(1, names[::-2], real[::-1]), pairs(2, names[1::2], real)], LpipsScore),
        (among(4, groups), [among(1, {group: turned[group]}) for group in turned], LpipsDiversity),
    ):
        states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
        found = [empty(alex).merge(one).merge(other).compute() for one, other in (states, states[::-1])]
        assert found[0] == found[1]  # to the bit
        expected = whole.compute()
        assert found[0]["pairs"] == expected["pairs"]
        assert found[0]["per_group"] == pytest.approx(expected["per_group"], abs=1e-6)
        with pytest.raises(UserError, match="is counted twice"):
            whole.merge(states[0])


def test_invalid_images_and_weights_are_one_error(
    alex: LpipsBackbone, make_image: MakeImage, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_image(1)
    with pytest.raises(UserError, match="no real images of dog"):
        LpipsScore(alex).update([image], ["a"], [], [], subject="dog")
    with pytest.raises(UserError, match="LPIPS diversity: a of dog is counted twice"):
        LpipsDiversity(alex).update([image, image], ["a", "a"], group="dog")
    with pytest.raises(UserError, match="1 images of dog; pairs need two"):
        LpipsDiversity(alex).update([image], ["a"], group="dog")
    with pytest.raises(UserError, match="net is 'squeeze'; expected one of alex, vgg"):
        load_lpips("squeeze")  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        UserError, match=r"LPIPS alex: .*6 of its 22 weights are missing.*put it at .*alexnet-owt-7be5be79\.pth"
    ):
        load_lpips("alex", str(files["vgg"]))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    place = tmp_path / "hub/checkpoints/alexnet-owt-7be5be79.pth"
    place.write_bytes(files["alex"].read_bytes())
    assert load_lpips("alex").digest == alex.digest
    assert load_lpips("alex", str(place.parent)).digest == alex.digest  # a folder that has the published file
