"""The model card in a folder of weights: a README.md, with the front matter that the hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from .version import __version__


def model_card(
    title: str,
    base: str,
    library: str,
    rows: Mapping[str, Any],
    code: str,
    end: str = "",
    *,
    front_matter: Mapping[str, Any] | None = None,
    lead: str = "",
    more: str = "",
) -> str:
    """A README.md of a title, a table and the lines of Python that load the weights.

    Args:
        base: Name of the base.
        library: Of the loading class, as the hub names it.
        rows: The table: values by name.
        end: Sentences that follow.
        front_matter: Entries to add, or in the place of those of the same name; None leaves one out.
        lead: Markdown between title and table.
        more: Markdown between the lines of Python and the last one.
    """
    tags = [*(["ether"] if library == "peft" else []), "diffusers", "text-to-image", "stable-diffusion"]
    entries = {"base_model": base, "library_name": library, "tags": tags, **(front_matter or {})}
    facts = {key: value for key, value in entries.items() if value is not None}
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None, width=1000)
    cells = {key.replace("_", " "): " ".join(str(value).split()).replace("|", "\\|") for key, value in rows.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in cells.items())
    parts = [
        f"---\n{front}---",
        f"# {title} for {' '.join(base.split())}",
        lead,
        f"| | |\n|---|---|\n{table}",
        f"```python\n{code}\n```",
        more,
        f"Made with ether_diffusion {__version__}.{end}",
    ]
    card = "\n\n".join(filter(None, parts)) + "\n"
    return card.encode("utf-8", "backslashreplace").decode("utf-8")  # paths may hold bytes that are not UTF-8


def carrier_of(keys: Iterable[str]) -> tuple[str, str]:
    """The part of a pipeline that weights with these keys are for, and the pipeline's class, for lines of Python."""
    keys = list(keys)
    if not any(re.search(r"(?:^|\.)(?:down_blocks|mid_block|up_blocks)\.", key) for key in keys):
        return "pipeline.transformer", "DiffusionPipeline"
    # Blocks of several transformer layers are those of Stable Diffusion XL.
    is_xl = any(".transformer_blocks.1." in key for key in keys)
    return "pipeline.unet", "DiffusionPipeline" if is_xl else "StableDiffusionPipeline"


def pipeline_code(base: str, kind: str = "StableDiffusionPipeline", **parts: str) -> str:
    """Lines of Python that make `pipeline` of this class from a base.

    Args:
        parts: Expressions for parts to replace or to add, by name.
    """
    arguments = "".join(f", {name}={expression}" for name, expression in parts.items())
    if base == "tiny":
        make = f'load_base("tiny").pipeline({kind}{arguments})'
        return f"from diffusers import {kind}\nfrom ether_diffusion.models.bases import load_base\npipeline = {make}"
    load = "from_single_file" if base.endswith((".safetensors", ".ckpt")) else "from_pretrained"
    name = json.dumps(base, ensure_ascii=False)
    return f"from diffusers import {kind}\npipeline = {kind}.{load}({name}{arguments})"
