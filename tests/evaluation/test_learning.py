"""Training on the miniature, scored: the subject is learned, prompts are followed, no photo is copied."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.config import load_config
from ether_diffusion.data.photos import find_photos
from ether_diffusion.evaluation.quick_look import Evaluation, evaluate, evaluate_maps
from ether_diffusion.evaluation.quick_scores import SubjectScores
from ether_diffusion.generation import read_run
from ether_diffusion.tinyworld.scoring import load_scorers
from ether_diffusion.training import controllable, dreambooth

pytestmark = pytest.mark.slow


def quickstart(folder: Path, *settings: str) -> Evaluation[SubjectScores]:
    """The quickstart, without its validation images."""
    fixed = [f"output_dir={folder}", "training.tracker=none", "validation.prompts=[]", *settings]
    dreambooth.run(load_config(dreambooth.DreamBoothConfig, "quickstart/dreambooth", fixed))
    return evaluate(read_run(folder), folder / "evaluation")


def test_the_quickstart_learns_its_subject_and_copies_no_photo(tmp_path: Path) -> None:
    """Against the same run at rate 0, whose adapter stays at the base, where ETHER+ starts."""
    trained = quickstart(tmp_path / "trained")
    rest = ("training.learning_rate=0", "training.ema_decay=null", "training.steps=2")  # an average would round
    still = quickstart(tmp_path / "still", *rest, "training.require_certificate=false")
    assert still.before == trained.before
    assert still.after == still.before
    before, after = trained.before, trained.after
    assert after.identity - before.identity > 0.2
    assert after.clip_i - before.clip_i > 0.1
    assert after.settings >= 0.8
    assert after.copies == 0
    assert after.identity < trained.real.identity
    # By the backbone's features no image is as close to a photo as the two closest photos are to each other. Pixels
    # cannot show this for images in a photo's own setting, whose ground and sky are the photo's: `copies` skips them.
    scorers = load_scorers()
    generated = sorted((tmp_path / "trained/evaluation/after").glob("*-[0-9][0-9].png"))
    images = scorers.identity([Image.open(path).convert("RGB") for path in generated])
    photos = scorers.identity([photo.open() for photo in find_photos("builtin:smiling_mug").photos])
    assert len(images) == 20
    assert (images @ photos.T).max() < (photos @ photos.T).fill_diagonal_(-1).max()


def test_the_controllable_quickstart_follows_its_own_maps_and_no_others(tmp_path: Path) -> None:
    fixed = [f"output_dir={tmp_path / 'run'}", "training.tracker=none", "validation.images=0"]
    controllable.run(load_config(controllable.ControllableConfig, "quickstart/controllable", fixed))
    found = evaluate_maps(read_run(tmp_path / "run"), tmp_path / "evaluation")
    assert found.after.miou - found.before.miou > 0.1
    assert found.after.pixel_accuracy - found.before.pixel_accuracy > 0.08
    assert abs(found.after.shuffled - found.before.shuffled) < 0.02
