"""The model card in an adapter's folder."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftType
from torch import Tensor

from ether_diffusion.version import __version__

from .methods import facts_of, method_of, method_title


def model_card(
    config: PeftConfig,
    base: str,
    state: dict[str, Tensor],
    model_class: str,
    notes: dict[str, Any],
    before: list[str],
) -> str:
    """The README.md of a PEFT folder: what the adapter is, and the lines that load it with plain diffusers and PEFT.

    Args:
        base: Name of the base.
        state: The adapter's tensors, to count its parameters.
        model_class: Class name of the model that carries it, a UNet or a text encoder.
        notes: Further rows of its table.
        before: Paths in this folder of the adapters that are merged into the base first, in their order.
    """
    settings = {key: value for key, value in sorted(config.to_dict().items()) if value not in (None, {}, [], "")}
    hidden = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "task_type"}
    rows = {"base model": f"`{base}`", "method": method_title(config)}
    is_trained = facts_of(config).is_trained
    rows["parameters"] = f"{sum(tensor.numel() for key, tensor in state.items() if is_trained(key)):,}"
    rows |= {key.replace("_", " "): f"`{value}`" for key, value in settings.items() if key not in hidden}
    if before:
        rows["after"] = f"`{before[-1]}/`, which is merged into the base"
    rows |= {key.replace("_", " "): str(value) for key, value in notes.items()}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    method = method_of(config)
    published = f" Method: [{method.title}]({method.paper})." if method and method.paper else ""
    # PEFT knows its own methods, and raises a KeyError for others.
    needed = "" if isinstance(config.peft_type, PeftType) else "import ether_diffusion  # makes PEFT know the method\n"
    part = "text_encoder" if "Text" in model_class else "unet"
    if base == "tiny":
        pipeline = "from ether_diffusion.models.bases import load_base\npipeline = load_base('tiny').pipeline()"
    else:
        load = "from_single_file" if base.endswith((".safetensors", ".ckpt")) else "from_pretrained"
        pipeline = f'from diffusers import StableDiffusionPipeline\npipeline = StableDiffusionPipeline.{load}("{base}")'
    load = f"pipeline.{part} = PeftModel.from_pretrained(pipeline.{part}, "
    merged = "".join(f'{load}"path/to/this/folder/{folder}").merge_and_unload()\n' for folder in before)
    return f"""---
base_model: {base}
library_name: peft
tags: [ether, diffusers, text-to-image, stable-diffusion]
---

# {method_title(config)} adapter for {base}

| | |
|---|---|
{table}

```python
{needed}{pipeline}
from peft import PeftModel
{merged}{load}"path/to/this/folder")
```

Made with ether_diffusion {__version__}.{published}
"""
