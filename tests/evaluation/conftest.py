"""Fixtures of protocol tests: two subjects, one of whose names contains the other's, with photos and images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.scorers import Loaded, load_scorers
from ether_diffusion.pictures import pixel_digest, save_png
from ether_diffusion.tinyworld.builtin_subjects import render_photos

TEMPLATES = ("a {subject} in the snow", "a {subject} at night")
LOOKS = {"dog": ("spotted_dog", "party_cat"), "backpack_dog": ("monster", "racing_car")}
"""By subject: whose photos are its real ones, and whose stand in for generated images."""


SAMPLING = {"scheduler": "dpm++", "steps": 7, "guidance": 3.0, "negative_prompt": ""}


@pytest.fixture(scope="session")
def protocol() -> SubjectProtocol:
    """The miniature's, with two subjects, two prompts and two images of each."""
    whole = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v1").model_dump(mode="json")
    whole |= {
        "name": "tests/two-subjects",
        "subjects": {
            "dog": {"class_name": "dog", "prompts": "two"},
            "backpack_dog": {"class_name": "toy", "prompts": "two"},
        },
        "prompts": {"two": TEMPLATES},
        "sampling": SAMPLING,
    }
    return SubjectProtocol.model_validate(whole)


class Caching:
    """A scorer that computes the features of each image and text once, and of one at a time."""

    def __init__(self, network: Any) -> None:
        self.network, self.digest = network, network.digest
        self.known: dict[str, Tensor] = {}

    def image_features(self, images: Sequence[Image.Image]) -> Tensor:
        for image in images:
            if (key := pixel_digest(image)) not in self.known:
                self.known[key] = self.network.image_features([image])[0]
        return torch.stack([self.known[pixel_digest(image)] for image in images])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        for text in texts:
            if text not in self.known:
                self.known[text] = self.network.text_features([text])[0]
        return torch.stack([self.known[text] for text in texts])


@pytest.fixture(scope="session")
def fresh_scorers(protocol: SubjectProtocol) -> dict[str, Loaded]:
    return load_scorers(protocol.judges)


@pytest.fixture(scope="session")
def scorers(fresh_scorers: dict[str, Loaded]) -> dict[str, Loaded]:
    """The miniature's scorers; tests share the features."""
    return {name: replace(scorer, network=Caching(scorer.network)) for name, scorer in fresh_scorers.items()}


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of the dog, five of the backpack: in a flat average the second weighs more."""
    folder = tmp_path_factory.mktemp("photos")
    for subject, (real, _) in LOOKS.items():
        for k, photo in enumerate(render_photos(real)[: 3 if subject == "dog" else 5]):
            save_png(photo, folder / subject / f"{k}.png")
    return folder


@pytest.fixture
def images(protocol: SubjectProtocol, tmp_path: Path) -> Path:
    """Four images a subject, in folders as `generate` writes them. A test may change them."""
    for subject, (_, generated) in LOOKS.items():
        pictures = dict(
            zip([f"{row}-{k}.png" for row in (0, 1) for k in (0, 1)], render_photos(generated), strict=False)
        )
        prompts = {name: protocol.prompt(subject, TEMPLATES[int(name[0])]) for name in pictures}
        for name, picture in pictures.items():
            save_png(picture, tmp_path / "images" / subject / name)
        _list_images(tmp_path / "images" / subject, prompts)
    return tmp_path / "images"


@pytest.fixture(scope="session")
def list_images() -> Callable[[Path, Mapping[str, str]], None]:
    """Writes the list of a subject's folder: files and their prompts."""
    return _list_images


def _list_images(folder: Path, prompts: Mapping[str, str]) -> None:
    own = {"adapter": f"of {folder.name}", "seed": 0, **SAMPLING}
    rows = [json.dumps({"file": name, "prompt": prompt, **own}) + "\n" for name, prompt in prompts.items()]
    (folder / "images.jsonl").write_text("".join(rows))
