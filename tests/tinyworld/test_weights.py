"""The shipped weights: complete, loadable by plain libraries, and scorers that recognise rendered scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel

from ether_diffusion.tinyworld import WEIGHTS
from ether_diffusion.tinyworld.figures import fresh_scenes, mean_iou, named, recognised, reconstruction, sample_captions
from ether_diffusion.tinyworld.phrasing import caption
from ether_diffusion.tinyworld.pretrain.export import digests
from ether_diffusion.tinyworld.render import LABELS, render
from ether_diffusion.tinyworld.scenes import Scene, Thing
from ether_diffusion.tinyworld.scoring import Scorers, load_scorers


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return load_scorers()


def test_every_file_has_its_recorded_digest_and_all_fit_the_budget() -> None:
    record = json.loads((WEIGHTS / "making.json").read_text())
    assert record["sha256"] == digests(WEIGHTS)
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 30e6
    assert (WEIGHTS / "README.md").is_file()


def test_the_text_encoder_is_the_text_tower_of_clip(scorers: Scorers) -> None:
    text_encoder = CLIPTextModel.from_pretrained(WEIGHTS / "pipeline", subfolder="text_encoder", dtype=torch.float32)
    left, right = text_encoder.state_dict(), scorers.clip.text_model.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_scorers_recognise_rendered_scenes(scorers: Scorers) -> None:
    """Loose bounds on 60 scenes: the card has the figures on 500."""
    scenes, texts = fresh_scenes(60, "train")
    rendered = [render(scene) for scene in scenes]
    images, truth = [image for image, _ in rendered], np.stack([labels for _, labels in rendered])
    found = recognised(scorers, images, [named(scene, text) for scene, text in zip(scenes, texts, strict=True)])
    assert found["setting"] > 0.95
    assert found["class"] > 0.9
    assert found["colour"] > 0.75
    assert mean_iou(scorers.segment(images), truth) > 0.8
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "pipeline", subfolder="vae", torch_dtype=torch.float32)
    assert reconstruction(vae, images) > 27


@pytest.mark.slow
def test_plain_diffusers_generates_what_captions_name(scorers: Scorers) -> None:
    """Loose bounds on 60 captions, in any words: the card has the figures on 500."""
    pipeline = StableDiffusionPipeline.from_pretrained(WEIGHTS / "pipeline", dtype=torch.float32)
    scenes, texts = fresh_scenes(60, "train")
    images = sample_captions(pipeline, texts, "test")
    found = recognised(scorers, images, [named(scene, text) for scene, text in zip(scenes, texts, strict=True)])
    assert found["setting"] > 0.9
    assert found["class"] > 0.5
    assert found["colour"] > 0.3
    (image,) = sample_captions(pipeline, ["Ein Häuschen, 日本 🙂 and words that no scene has"], "test")
    assert image.size == (64, 64)
    assert image.getbbox()


def test_an_image_must_show_what_its_caption_names() -> None:
    things = (Thing("car", "red", "left", 0.4, 0.3, 0.9), Thing("ball", "blue", "right", 0.3, 0.8, 0.9))
    scene = Scene("snow", things)
    one = named(scene, "a red car and a ball in the snow")
    assert (one.kinds, one.colours, one.setting) == (("car", "ball"), (("car", "red"),), "snow")
    two = named(scene, "a picture of a car next to a blue ball")
    assert (two.kinds, two.colours, two.setting) == (("car", "ball"), (("ball", "blue"),), None)


def test_every_caption_names_every_thing_of_its_scene() -> None:
    scenes, _ = fresh_scenes(200, "train")
    for seed, scene in enumerate(scenes):
        assert named(scene, caption(scene, seed)).kinds == tuple(thing.kind for thing in scene.things)


def test_mean_iou_pools_the_whole_set_and_ignores_unlabelled_pixels() -> None:
    truth = np.array([[[1, 1, 2, 0]], [[2, 2, 2, 0]]], dtype=np.uint8)
    predicted = np.array([[[1, 2, 2, 5]], [[2, 2, 1, 5]]], dtype=np.uint8)
    # label 1: 1 of 3; label 2: 3 of 5; label 5 only where nothing is labelled
    assert mean_iou(predicted, truth) == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert len(LABELS) > 5
