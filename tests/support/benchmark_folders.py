"""A benchmark that takes seconds, and the images and numbers in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ether_diffusion.benchmark.config import BenchmarkConfig
from ether_diffusion.config import load_config, to_yaml
from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol, load_protocol

SUBJECTS = ("robot", "monster")
TEMPLATES = ("a {subject} in the snow", "a {subject} at night")


def write_protocol(folder: Path, **changed: object) -> Path:
    """The miniature's protocol with two subjects, two prompts, two images of each, one sampling step."""
    whole = load_protocol(SubjectProtocol, "tinyworld/dreambooth-v1").model_dump(mode="json") | {
        "name": "tests/subjects",
        "subjects": {name: {"class_name": "toy", "prompts": "two"} for name in SUBJECTS},
        "prompts": {"two": TEMPLATES},
        "sampling": {"scheduler": "dpm++", "steps": 1, "guidance": 1.0},
        **changed,
    }
    return _write(folder / "subjects.yaml", to_yaml(SubjectProtocol.model_validate(whole)))


def write_map_protocol(folder: Path) -> Path:
    """The miniature's protocol with three scenes and one sampling step."""
    whole = load_protocol(MapProtocol, "tinyworld/s2i-v1").model_dump(mode="json") | {
        "name": "tests/maps",
        "images": 3,
        "sampling": {"scheduler": "dpm++", "steps": 1, "guidance": 1.0},
        "distribution_replicates": 2,
    }
    return _write(folder / "maps.yaml", to_yaml(MapProtocol.model_validate(whole)))


def write_config(
    folder: Path, protocol: Path, class_images: Path, methods: Sequence[str] = ("ether_plus",), pack: str = "off"
) -> Path:
    """A benchmark of subjects: two training steps each, a checkpoint after each step."""
    small = [
        "adapter.target=attention", "training.schedule=constant", "training.warmup_steps=0", "training.ema_decay=null",
        "training.steps=2", "training.batch_size=1", "training.checkpoint_every=1", "data.prior.num_images=1",
        "data.prior.sampling.steps=1", f"data.prior.cache_dir={class_images}",
    ]  # fmt: skip
    lines = [f"    {name}: {{config: quickstart/dreambooth, settings: [adapter.method={name}]}}" for name in methods]
    text = f"""output_dir: {folder / "out"}
device: cpu
threads: 1
pack: {pack}
dreambooth:
  protocol: {protocol}
  dataset_dir: "builtin:"
  batch_size: 2
  settings: [{", ".join(small)}]
  methods:
"""
    return _write(folder / "benchmark.yaml", "\n".join([text.rstrip(), *lines, ""]))


def load(config: Path, *overrides: str) -> BenchmarkConfig:
    return load_config(BenchmarkConfig, config, overrides)


def images(folder: Path) -> dict[str, bytes]:
    """The bytes of all images of a benchmark, by path."""
    files = sorted(folder.glob("*/*/images/**/*.png"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def numbers(folder: Path) -> dict[str, str]:
    """The text of all results and tables, by path."""
    files = sorted([*folder.glob("*/*/results.json"), *folder.glob("*/table.*")])
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
