"""The model card of the weights, from their figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ether_diffusion.files import write_whole
from ether_diffusion.tinyworld.figures import Figures

TARGETS = {
    "PSNR of the autoencoder, dB": 28.0,
    "mIoU of the segmenter": 0.90,
    "class": 0.90,
    "setting": 0.95,
}

PIPELINE = """`pipeline/` is a `StableDiffusionPipeline` that plain diffusers loads:

```python
import torch
from diffusers import StableDiffusionPipeline

folder = "ether_diffusion/tinyworld/weights/pipeline"  # stored in half precision
pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
pipeline("a red boat in the snow", guidance_scale=6).images[0]
```
"""
PARTS = """`pipeline/` holds the trained parts of a `StableDiffusionPipeline`: autoencoder, text encoder, tokenizer.
Without a UNet there are no figures of generated images.
"""


def write_card(folder: Path, figures: dict[str, Figures], making: dict[str, Any]) -> Path:
    """Write `README.md` into a weights folder."""
    rows = []
    for heading, values in figures.items():
        for name, value in values.items():
            target = TARGETS.get(name) if not heading.startswith("renders") or "of the" in name else None
            verdict = "" if target is None else f"{target:g}{'' if value >= target else ', not reached'}"
            rows.append(f"| {heading} | {name} | {value:.3f} | {verdict} |")
    parameters = ", ".join(f"{name} {number / 1e6:.1f}M" for name, number in making["parameters"].items())
    steps = ", ".join(f"{name} {number:,}" for name, number in making["steps"].items())
    table = "\n".join(rows)
    note = f"\n- {making['note']}" if "note" in making else ""
    pipeline = PIPELINE if "denoiser" in making["steps"] else PARTS
    text = f"""# The miniature: a Stable Diffusion of a small rendered world, and its scorers

64 x 64 images of eight settings and twelve classes in ten colours, rendered by a program (`ether_diffusion.tinyworld`):
no photographs, no texts from elsewhere, no people. `clip/`, `backbone/` and `segmenter/` are transformers' CLIPModel,
ViTModel and SegformerForSemanticSegmentation. All weights are fp16, and trained on this world alone.

{pipeline}
## Figures

`python -m ether_diffusion.tinyworld.figures` measures them again, on 500 scenes per split that no stage was trained on.
"Held out" scenes have a main object whose class, colour and setting never occur together in training, and captions in
phrasings that never occur there. `class`, `colour`, `setting`: the share of what the captions name that the scorers
find in the images; on renders it measures the scorers, on generated images the base.

| images | figure | value | target |
|---|---|---|---|
{table}

A class counts as present if the segmenter gives it 40 pixels. Colour and setting are CLIP's zero-shot choices. The same
scorers score fine-tuned adapters elsewhere: they are scorers for this world, not for images in general.

## Making

`python -m ether_diffusion.tinyworld.pretrain --to runs/tinyworld` trains all of it from scratch, on rendered scenes
alone. `making.json` has versions and the SHA-256 of every file. Apache-2.0.

- Parameters: {parameters}.
- Steps: {steps}.{note}
"""
    path = folder / "README.md"
    write_whole(path, text)
    return path
