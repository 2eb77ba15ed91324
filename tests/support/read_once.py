"""The miniature, read from its files once a process: whoever loads it afterwards gets a deep copy."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from ether_diffusion.models import bases
from ether_diffusion.tinyworld import WEIGHTS

_FOLDER = WEIGHTS / "pipeline"
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def read_tiny_once() -> None:
    """Change what `load_base("tiny")` reads, for the rest of the process."""
    kept: dict[str, Any] = {}
    real, text_encoder = bases.StableDiffusionPipeline, bases._whole_text_encoder

    class Pipelines(real):
        @classmethod
        def from_pretrained(cls, name: Any, **options: Any) -> Any:
            if name != _FOLDER:
                return real.from_pretrained(name, **options)
            if not kept:
                options["text_encoder"] = text_encoder(str(_FOLDER), torch.float32, None)
                with torch.random.fork_rng(devices=[]):
                    pipeline = real.from_pretrained(name, **options)
                kept.update({part: getattr(pipeline, part) for part in _PARTS})
            return SimpleNamespace(**copy.deepcopy(kept))

    def whole_text_encoder(name: str, *options: Any) -> Any:
        return None if name == str(_FOLDER) else text_encoder(name, *options)

    bases.StableDiffusionPipeline, bases._whole_text_encoder = Pipelines, whole_text_encoder
