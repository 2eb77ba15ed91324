"""FID and KID: against torch-fidelity on the same files, and against SciPy's matrix square root."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id
from torchmetrics.image.kid import poly_mmd

from ether_diffusion.errors import UserError
from ether_diffusion.metrics import InceptionDistance, load_inception, load_tiny_backbone
from ether_diffusion.metrics.fid import frechet_distance, kernel_distance

MakeImage = Callable[..., Image.Image]

PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"


class Unloaded(FeatureExtractorInceptionV3):
    """Keeps its initial weights."""

    def load_state_dict(self, *_args: object, **_options: object) -> None:  # pyright: ignore
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file like torch-fidelity's, of random weights whose activations do not vanish."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Unloaded("random", ["2048"], str(folder / "empty.pth"))
        for name, weight in network.named_parameters():
            if name.endswith("conv.weight"):
                weight.normal_(std=(2 / weight[0].numel()) ** 0.5)
    torch.save(network.state_dict(), folder / PUBLISHED)
    return folder / PUBLISHED


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_image: MakeImage) -> list[Path]:
    """Three PNGs of two sizes, and three others."""
    folder = tmp_path_factory.mktemp("images")
    for kind, seeds in (("real", range(3)), ("generated", range(10, 13))):
        (folder / kind).mkdir()
        for seed in seeds:
            make_image(seed, (96, 80 + 20 * (seed % 2))).save(folder / kind / f"{seed:02}.png")
    return [folder / "real", folder / "generated"]


def pngs(folder: Path) -> tuple[list[Image.Image], list[str]]:
    files = sorted(folder.glob("*.png"))
    return [Image.open(file) for file in files], [file.name for file in files]


def gaussians(count: int, other: int, size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=random) / size**0.5
    one = torch.randn(count, size, generator=random) @ mix
    return one, torch.randn(other, size, generator=random) * 0.7 + 0.3


def test_features_are_torch_fidelitys_of_the_same_files(weights: Path, folders: list[Path]) -> None:
    options = {"feature_extractor_weights_path": str(weights), "cuda": False, "verbose": False, "cache": False}
    options["save_cpu_ram"] = True  # no worker processes
    extractor = create_feature_extractor("inception-v3-compat", ["2048"], **options)
    theirs = extract_featuresdict_from_input_id(1, extractor, input1=str(folders[0]), batch_size=1, **options)["2048"]
    images, _ = pngs(folders[0])
    ours = load_inception(str(weights)).image_features(images)
    assert ours.shape == (3, 2048)
    assert float(theirs.std()) > 1e-2
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
def test_both_are_torch_fidelitys_of_the_same_files(weights: Path, folders: list[Path]) -> None:
    theirs = torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), fid=True, kid=True, kid_subsets=1, kid_subset_size=3,
        feature_extractor_weights_path=str(weights), batch_size=1, cuda=False, verbose=False, cache=False,
        save_cpu_ram=True,
    )  # fmt: skip
    metric = InceptionDistance(load_inception(str(weights.parent)))  # the folder does, too
    for folder, real in zip(folders, (True, False), strict=True):
        metric.update(*pngs(folder), real=real)
    found = metric.compute()
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert (found["real"], found["generated"]) == (3, 3)


@pytest.mark.parametrize(("count", "other", "size"), [(300, 200, 24), (130, 400, 48)])
def test_fid_is_that_of_scipys_matrix_square_root(count: int, other: int, size: int) -> None:
    one, two = (features.numpy().astype(np.float64) for features in gaussians(count, other, size))
    root = np.real(scipy.linalg.sqrtm(np.cov(one, rowvar=False) @ np.cov(two, rowvar=False)))
    difference = one.mean(0) - two.mean(0)
    traces = np.trace(np.cov(one, rowvar=False)) + np.trace(np.cov(two, rowvar=False))
    expected = difference @ difference + traces - 2 * np.trace(root)
    assert frechet_distance(torch.from_numpy(one), torch.from_numpy(two)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count", "other"), [(100, 90), (20, 90), (12, 9)])
def test_fid_is_torch_fidelitys_for_few_images_too(count: int, other: int) -> None:
    one, two = gaussians(count, other, 32)
    theirs = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(two), verbose=False)
    assert frechet_distance(one, two) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_fid_of_a_set_with_itself_is_zero_and_a_shift_adds_its_square() -> None:
    for count in (10, 200):
        one, _ = gaussians(count, 2, 32)
        assert abs(frechet_distance(one, one.flip(0))) < 1e-10
        assert frechet_distance(one.double(), one.double() + 0.5) == pytest.approx(32 * 0.25, rel=1e-9)


def test_kid_over_all_images_is_torch_fidelitys() -> None:
    one, two = gaussians(60, 60, 32)
    theirs = kid_features_to_metric(one, two, kid_subsets=1, kid_subset_size=60, verbose=False)
    assert kernel_distance(one, two) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_kid_of_equally_many_images_is_torchmetrics() -> None:
    one, two = (features.double() for features in gaussians(50, 50, 32))
    assert kernel_distance(one, two) == pytest.approx(float(poly_mmd(one, two)), rel=1e-12)


def test_kid_is_the_mean_over_torch_fidelitys_subsets() -> None:
    one, two = gaussians(60, 80, 32)
    theirs = kid_features_to_metric(one, two, kid_subsets=600, kid_subset_size=30, verbose=False)
    spread = theirs["kernel_inception_distance_std"] / 600**0.5
    assert abs(kernel_distance(one, two) - theirs["kernel_inception_distance_mean"]) < 4 * spread


def test_order_and_processes_change_no_bit() -> None:
    one, two = gaussians(40, 30, 16)
    keys = [f"{k:03}" for k in range(40)]
    whole, *parts = (InceptionDistance(load_tiny_backbone()) for _ in range(4))
    whole.update_features(one, keys, real=True).update_features(two, keys[:30], real=False)
    for k in torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist():
        parts[k % 3].update_features(one[k : k + 1], [keys[k]], real=True)
        if k < 30:
            parts[k % 2].update_features(two[k : k + 1], [keys[k]], real=False)
    merged = parts[2].merge(parts[0].state()).merge(parts[1].state())
    assert merged.compute() == whole.compute()
    with pytest.raises(UserError, match="FID, real images: 000 of all is counted twice"):
        merged.merge(parts[0].state())


def test_invalid_weights_are_one_error(tmp_path: Path) -> None:
    torch.save({"conv": Path("an object")}, tmp_path / "objects.pth")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    for name, reason in (
        ("objects", "Weights only load failed"),
        ("other", "Missing key"),
        ("nowhere", "no such file or folder"),
    ):
        message = rf"Inception: cannot load .*{reason}.*put it at .*weights-inception-2015-12-05-6726825d\.pth"
        with pytest.raises(UserError, match=message):
            load_inception(str(tmp_path / f"{name}.pth"))


def test_too_few_images_are_refused() -> None:
    metric = InceptionDistance(load_tiny_backbone()).update_features(torch.ones(1, 4), ["a"], real=True)
    with pytest.raises(UserError, match="1 real and 0 generated images; needs two of each"):
        metric.compute()
