"""The model card of a repository on the hub: front matter that it reads, and how each program loads the files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftType

from ether_diffusion.adapters.methods import method_title
from ether_diffusion.adapters.saved_adapter import TEXT_ENCODER, SavedAdapter
from ether_diffusion.adapters.saving import card_rows
from ether_diffusion.generation import SavedRun
from ether_diffusion.hub import MARK, is_hub_base
from ether_diffusion.model_card import carrier_of, model_card, pipeline_code


@dataclass(frozen=True)
class CardFacts:
    """What the card says."""

    repository: str
    run: SavedRun
    saved: SavedAdapter
    samples: list[tuple[str, str]]
    """Prompts and files of sample images."""
    licence: str
    lora: str | None
    """Name of the LoRA file, if there is one."""

    @property
    def trigger(self) -> str | None:
        """The prompt that the subject was trained with."""
        return (self.run.config.get("data") or {}).get("instance_prompt")


def hub_card(facts: CardFacts) -> str:
    """The README.md, whose front matter is valid YAML for any name of a base and any prompt."""
    saved, base, trigger = facts.saved, facts.saved.base_model or "", facts.trigger
    name = facts.repository.partition("/")[2]
    tags = ["text-to-image", "stable-diffusion", "diffusers", "peft", "ether", MARK]
    front: dict[str, Any] = {
        "base_model": base if is_hub_base(base) else None,
        "base_model_relation": "adapter" if is_hub_base(base) else None,
        "library_name": "diffusers" if facts.lora else "peft",
        "pipeline_tag": "text-to-image",
        "tags": [*tags, *(("lora", "template:sd-lora") if facts.lora else ())],
        "license": facts.licence,
        "instance_prompt": trigger,
        "widget": [{"text": text or " ", "output": {"url": file}} for text, file in facts.samples] or None,
    }
    rows = {**card_rows(saved.config, saved.parameters), "base model": f"`{shown_base(base)}`"}
    training = facts.run.config.get("training") or {}
    rows |= {"training steps": str(training["steps"])} if training.get("steps") else {}
    lead = ["<Gallery />"] if facts.samples else []
    if trigger:
        lead.append(f"Write `{trigger}` in the prompt: it is what the subject was trained with.")
    title = f"{name}: {saved.method} adapter"
    code, more = _our_code(facts), _other_programs(facts)
    return model_card(
        title, shown_base(base), "peft", rows, code, front_matter=front, lead="\n\n".join(lead), more=more
    )


def shown_base(base: str) -> str:
    """A base's name for others: of a path, its last part."""
    return base if is_hub_base(base) else Path(base).name


def _loads_base(facts: CardFacts) -> str:
    base = facts.saved.base_model or ""
    is_path = "/" in base and not is_hub_base(base)
    return pipeline_code(f"path/to/{shown_base(base)}" if is_path else base, carrier_of(facts.saved.tensors)[1])


def _our_code(facts: CardFacts) -> str:
    """The lines that load it with this package."""
    repository, prompt = json.dumps(facts.repository), json.dumps(facts.trigger or "…", ensure_ascii=False)
    if facts.run.condition_encoder is not None:
        return (
            "from ether_diffusion.generation import load_pipeline\n"
            f"pipeline, adapter = load_pipeline({repository})\n"
            f'# ether-diffusion generate --adapter {facts.repository} --condition map.png --prompt "…" --output images'
        )
    which = {part: "True" if part == TEXT_ENCODER else f'"{part}"' for part in facts.saved.text_encoders}
    text = "".join(
        f"ether_diffusion.load_adapter(pipeline.{part}, {repository}, text_encoder={value})\n"
        for part, value in which.items()
    )
    return (
        f"import ether_diffusion\n{_loads_base(facts)}\n"
        f"ether_diffusion.load_adapter({carrier_of(facts.saved.tensors)[0]}, {repository})\n{text}"
        f'pipeline({prompt}).images[0].save("image.png")'
    )


def _other_programs(facts: CardFacts) -> str:
    if facts.lora is None:
        method = method_title(facts.saved.config)
        known = "" if isinstance(facts.saved.config.peft_type, PeftType) else " after `import ether_diffusion`"
        return f"{method} changes weights in full rank, so that there is no LoRA file. PEFT loads this folder{known}."
    trigger = f" and `{facts.trigger}` in the prompt" if facts.trigger else ""
    loads = f'pipeline.load_lora_weights("{facts.repository}", weight_name="{facts.lora}")'
    controlled = " It follows no condition: those need ether_diffusion." if facts.run.condition_encoder else ""
    if carrier_of(facts.saved.tensors)[0].endswith("transformer"):
        return f"""[{facts.lora}]({facts.lora}) is the same as a LoRA, in diffusers' layout.

```python
{_loads_base(facts)}
{loads}
```"""
    return f"""[{facts.lora}]({facts.lora}) is the same as a LoRA, for programs that do not know the method.{controlled}

| program | where it goes |
|---|---|
| ComfyUI | `ComfyUI/models/loras/`; the node *Load LoRA*, strength 1{trigger} |
| A1111, Forge | `models/Lora/`; `<lora:{facts.lora.removesuffix(".safetensors")}:1>`{trigger} |
| InvokeAI | *Models*, *Add Model*, the file's path{trigger and f"; {trigger.removeprefix(' and ')}"} |

```python
{_loads_base(facts)}
{loads}
```"""
