"""Conditions computed from photos: controlnet-aux's own pixels, computed once, cached with their settings."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image

from ether_diffusion.data.conditions import read_condition
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.data.preprocessors import Preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.pictures import read_settings, save_png


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of 512 pixels by 640 at most, so that canny sees them as they are, and their captions."""
    folder = tmp_path_factory.mktemp("photos")
    for name, size in (("astronaut", (512, 512)), ("coffee", (640, 512)), ("chelsea", (512, 576))):
        Image.fromarray(getattr(skimage.data, name)()).resize(size).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    return folder


def test_canny_is_opencvs(photos: Path):
    for path in photos.glob("*.png"):
        image = Image.open(path)
        edges = Preprocessor("canny")(image)
        assert edges.mode == "RGB"
        assert np.array_equal(np.asarray(edges)[..., 0], cv2.Canny(np.asarray(image), 100, 200))


def test_a_condition_by_name_states_its_preprocessor(photos: Path):
    condition = read_condition(photos / "coffee.png", preprocessor="canny")
    assert (condition.taken_for, condition.discrete) == ("a photo, through canny", False)


def test_each_is_computed_once_and_cached_with_its_settings(photos: Path, tmp_path: Path):
    canny = Preprocessor("canny", cache_dir=tmp_path)
    paths = sorted(photos.glob("*.png"))
    assert canny.prepare(paths, shown=False) == 3
    assert canny.prepare(paths, shown=False) == 0
    manifest = json.loads((canny.folder / "manifest.json").read_text())
    assert manifest["preprocessor"] == "canny"
    assert manifest["settings"] == {"low_threshold": 100, "high_threshold": 200, "detect_resolution": 512}
    assert set(manifest["versions"]) >= {"controlnet-aux"}
    files = sorted(canny.folder.glob("*.png"))
    assert len(files) == 3
    settings = read_settings(files[0])
    assert settings is not None
    assert settings["digest"] == files[0].stem
    assert settings["photo"] in {path.name for path in paths}
    before = {file: file.stat().st_mtime_ns for file in files}
    kept = canny.of(paths[0])
    assert np.array_equal(np.asarray(kept), np.asarray(canny(Image.open(paths[0]))))
    assert before == {file: file.stat().st_mtime_ns for file in files}
    assert not list(canny.folder.glob(".*"))


def test_damaged_ones_and_changed_photos_are_computed_again(photos: Path, tmp_path: Path):
    canny = Preprocessor("canny", cache_dir=tmp_path)
    whole = canny.of(photos / "coffee.png")
    (file,) = canny.folder.glob("*.png")
    file.write_bytes(file.read_bytes()[:200])
    assert canny.of(photos / "coffee.png").tobytes() == whole.tobytes()
    assert read_settings(file) is not None
    other = whole.copy()
    other.putpixel((5, 5), (1, 2, 3))
    save_png(other, file, read_settings(file))  # a whole image, but not the one of before
    assert canny.of(photos / "coffee.png").tobytes() == whole.tobytes()
    changed = tmp_path / "coffee.png"
    Image.open(photos / "coffee.png").rotate(90).save(changed)
    assert canny.of(changed).tobytes() != whole.tobytes()
    assert len(list(canny.folder.glob("*.png"))) == 2


def test_other_settings_and_other_weights_have_caches_of_their_own(tmp_path: Path):
    names = ("canny", "lineart_standard", "hed", "scribble_hed", "hed:elsewhere")
    assert len({Preprocessor(name, cache_dir=tmp_path).folder for name in names}) == len(names)


def test_in_a_data_set_image_and_condition_show_the_same(photos: Path, tmp_path: Path):
    pairs = find_pairs(photos, condition="canny", cache_dir=tmp_path)
    data = ControllableDataset(pairs, resolution=128, crop="random", horizontal_flip=True)
    assert data.prepare(shown=False) == 3
    assert data.prepare(shown=False) == 0
    for index in range(9):
        sample = data[index]
        assert sample["prompt"] == f"a photo of {sample['name']}"
        gradient = np.abs(np.diff(sample["pixel_values"].mean(0).numpy(), axis=1, append=0))[:, :-1]
        hint = sample["hint"].mean(0).numpy()
        # Edges lie where the image changes, and do not when they are mirrored.
        right, wrong = (np.corrcoef(gradient.ravel(), edges[:, :-1].ravel())[0, 1] for edges in (hint, hint[:, ::-1]))
        assert right > 0.25
        assert right > wrong + 0.1


def test_names_and_weights_that_do_not_exist(tmp_path: Path):
    for name, message in (
        ("cany", "preprocessor 'cany' is not known. Did you mean 'canny'? Known: canny,"),
        ("canny:folder", "preprocessor 'canny:folder': canny has no weights; expected 'canny'"),
    ):
        with pytest.raises(UserError) as caught:
            Preprocessor(name)
        assert str(caught.value).startswith(message)
    with pytest.raises(
        UserError, match=r"preprocessor hed: weights from .* cannot be loaded: .* name a folder"
    ) as caught:
        Preprocessor(f"hed:{tmp_path}")(Image.new("RGB", (64, 64)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow  # 60 MB of weights, 512 pixels
def test_a_detector_with_weights_from_a_folder(photos: Path, tmp_path: Path):
    import torch
    from controlnet_aux.hed import ControlNetHED_Apache2

    torch.manual_seed(0)
    network = ControlNetHED_Apache2()
    torch.save(network.state_dict(), tmp_path / "ControlNetHED.pth")
    edges = Preprocessor(f"scribble_hed:{tmp_path}", cache_dir=tmp_path).of(photos / "astronaut.png")
    assert edges.size == (512, 512)
    assert set(np.unique(np.asarray(edges))) <= {0, 255}  # which soft edges are not
