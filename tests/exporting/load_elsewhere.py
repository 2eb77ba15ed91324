"""Run by test_export.py in a process that refuses this package: images of plain diffusers with an exported adapter.

Arguments: the folder of the base, a JSON list of [kind, path, file to write], where kind is base, lora, peft, folder
or file.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


class Refuse(importlib.abc.MetaPathFinder):
    """No import of this package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("ether_diffusion", "ether_diffusion_cli"):
            raise ImportError(f"{name} is not to be needed")


if __name__ == "__main__":  # before diffusers is imported
    sys.meta_path.insert(0, Refuse())

import torch  # noqa: E402
from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: E402
from peft import PeftModel  # noqa: E402

PLAIN = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def load(base: str, kind: str, path: str) -> StableDiffusionPipeline:
    """The pipeline, in single precision."""
    if kind == "folder":
        return StableDiffusionPipeline.from_pretrained(path, torch_dtype=torch.float32, **PLAIN)
    pipeline = StableDiffusionPipeline.from_pretrained(base, **PLAIN)
    if kind == "file":
        parts = {"tokenizer": pipeline.tokenizer, "scheduler": pipeline.scheduler, **PLAIN}
        return StableDiffusionPipeline.from_single_file(
            path, config=base, local_files_only=True, torch_dtype=torch.float32, **parts
        )
    if kind == "lora":
        pipeline.load_lora_weights(path)
    if kind == "peft":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, path)
        if Path(path, "text_encoder").is_dir():
            pipeline.text_encoder = PeftModel.from_pretrained(pipeline.text_encoder, Path(path, "text_encoder"))
    return pipeline


def image(pipeline: Any) -> np.ndarray:
    """Values from 0 to 1."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
    return pipeline("a photo of qwe dog", generator=generator, output_type="np", **options).images[0]


if __name__ == "__main__":
    base, jobs = sys.argv[1], json.loads(sys.argv[2])
    for kind, path, target in jobs:
        np.save(target, image(load(base, kind, path)))
