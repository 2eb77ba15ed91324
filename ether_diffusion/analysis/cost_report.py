"""FLOPs of passes as a table, a plot and the paper's values beside them (Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from ether_diffusion.adapters.targets import PRESETS
from ether_diffusion.ether import EtherConfig
from ether_diffusion.models.families.stable_diffusion_v1 import UNET, build_unet
from ether_diffusion.own_files import write_own

from . import cost
from .cost import Subject
from .output import FAINT, check_outputs, line_style, plot, write_command, write_table
from .plots import plain_log
from .published import COSTS

BLOCKS = (1, 4, 32)
TITLES = {"ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA", "base": "frozen base"}
RANK = 8
TERA = 1e12
HEAD = ("model", "input", "method", "form", "n", "forward", "backward", "dense products", "paper")


def write_costs(models: Mapping[str, Subject], output: Path, command: str) -> str:
    """Count FLOPs; write `cost.csv`, `cost.md`, a plot and the command.

    Args:
        models: By the short names of `cost_subjects.subjects`.

    Raises:
        UserError: as `check_outputs`.
    """
    check_outputs(output, "cost.csv", "cost.md", plots=("cost",))
    rows = [row for key, subject in models.items() for row in _rows(key, subject)]
    notes = [line for key, subject in models.items() for line in _deviations(key, subject)]
    text = _markdown(rows, notes, command)
    write_command(output, command)
    write_table(output / "cost.csv", rows)
    write_own(output / "cost.md", text)
    with plot(output / "cost", command, columns=len(models), size=(max(4.0 * len(models) + 1, 6.4), 4.8)) as panels:
        for panel, (key, subject) in zip(panels, models.items(), strict=True):
            _plot(panel, subject, [row for row in rows if row["model"] == key])
        panels[0].set_ylabel("TFLOPs of a backward pass")
        named = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(*named, loc="outside lower center", ncols=min(len(models) + 1, 3), handlelength=3.5)
    return text


def _rows(key: str, subject: Subject) -> list[dict[str, Any]]:
    """A row for each method, way of applying it, and number of blocks."""
    rows = []

    def add(method: str, form: str, blocks: int | None, found: cost.Flops, products: float | None = None) -> None:
        rows.append(
            {
                "model": key,
                "input": subject.note,
                "method": method,
                "form": form,
                "blocks": blocks,
                "forward": found.forward / TERA,
                "backward": found.backward / TERA,
                "products": products,
                "paper": COSTS.get(key, {}).get(method, {}).get(blocks) if form != "activations" else None,
            }
        )
        print(f"{subject.title}: {TITLES[method]} {form} {blocks or ''}", flush=True)

    shapes = _shapes(subject)
    add("base", "", None, cost.count_passes(subject))
    layers = list(subject.layers)
    add("lora", "", None, cost.count_passes(subject, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)))
    for variant in ("ether", "ether_plus"):
        for blocks in BLOCKS:
            products = cost.dense_products(shapes, blocks, outer=variant == "ether_plus") / TERA
            add(variant, "dense", blocks, cost.count_dense(subject, variant, blocks), products)
            config = EtherConfig(variant=variant, num_blocks=blocks, target_modules=layers)
            add(variant, "activations", blocks, cost.count_passes(subject, config))
    return rows


def _deviations(key: str, subject: Subject) -> list[str]:
    """How the paper's values compare with the closed forms: the y of x + y / n between two of them, and x."""
    if key not in COSTS:
        return []
    shapes = _shapes(subject)
    sides = {"input side": (True, False), "output side": (False, True), "both sides": (True, True)}
    forms = ", ".join(
        f"{name} {cost.dense_products(shapes, 1, inner, outer) / TERA:.2f}" for name, (inner, outer) in sides.items()
    )
    lines = [f"- {subject.title}: the products' closed forms at n = 1: {forms}."]
    for variant in ("ether", "ether_plus"):
        printed = COSTS[key][variant]
        slopes = [(printed[a] - printed[b]) / (1 / a - 1 / b) for a, b in ((1, 4), (4, 32))]
        lines.append(
            f"- {subject.title}, {TITLES[variant]}: the printed values give y = {slopes[0]:.2f} from n = 1 and 4, "
            f"{slopes[1]:.2f} from n = 4 and 32, and x = {printed[4] - slopes[1] / 4:.2f} from the latter."
        )
    return lines


def _shapes(subject: Subject) -> list[tuple[int, int]]:
    with torch.device("meta"):
        return list(cost.group_shapes(subject.build(), subject).values())


def _markdown(rows: Sequence[Mapping[str, Any]], notes: Sequence[str], command: str) -> str:
    lines = [f"# TFLOPs of a pass, batch 1\n\n`{command}`\n", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for row in rows:
        numbers = [row["forward"], row["backward"], row["products"], row["paper"]]
        cells = [row["model"], row["input"], TITLES[row["method"]], row["form"], str(row["blocks"] or "")]
        lines.append(
            "| " + " | ".join([*cells, *("" if value is None else f"{value:.3f}" for value in numbers)]) + " |"
        )
    if notes:
        lines += ["\n## The paper's Table 1 against closed forms, TFLOPs\n", *notes]
    return "\n".join(lines) + "\n"


def _plot(panel: Any, subject: Subject, rows: Sequence[Mapping[str, Any]]) -> None:
    """Backward passes of one model against the number of blocks."""
    for method in ("ether", "ether_plus"):
        style = line_style(TITLES[method])
        for form, dash in (("dense", "--"), ("activations", "-")):
            found = [(row["blocks"], row["backward"]) for row in rows if (row["method"], row["form"]) == (method, form)]
            label = f"{TITLES[method]}, {'H as a matrix' if form == 'dense' else 'on activations'}"
            panel.plot(*zip(*found, strict=True), linestyle=dash, label=label, **style)
        printed = [(row["blocks"], row["paper"]) for row in rows if row["method"] == method and row["paper"]]
        if printed:
            hollow = {**style, "markerfacecolor": "white", "linestyle": "none"}
            panel.plot(*zip(*printed, strict=True), label=f"{TITLES[method]}, printed in the paper", **hollow)
    for method, colour in (("lora", line_style("LoRA")["color"]), ("base", FAINT)):
        row = next(row for row in rows if row["method"] == method)
        label = f"LoRA, r = {RANK}" if method == "lora" else TITLES[method]
        panel.axhline(
            row["backward"], color=colour, linestyle="-" if method == "lora" else ":", linewidth=1, label=label
        )
        if row["paper"]:
            panel.axhline(row["paper"], color=colour, linestyle=(0, (1, 4)), linewidth=1, label=f"{label}, printed")
    panel.set_xscale("log", base=2)
    panel.set_xticks(BLOCKS, [str(blocks) for blocks in BLOCKS])
    panel.minorticks_off()
    low, high = (pick(row["backward"] for row in rows) for pick in (min, max))
    if high > 4 * low:
        panel.set_yscale("log")
        plain_log(panel.yaxis)
    panel.set_xlabel("blocks n")
    panel.set_title(f"{subject.title}, {subject.note}")


PHI_1_5: dict[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
}
LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
}
_PLAIN: dict[str, Any] = {"attn_implementation": "eager", "use_cache": False}
TOKENS = 512
"""Length of the language models' input, batch 1. The paper does not state its own."""


def subjects(tokens: int = TOKENS, latents: int = 64) -> dict[str, Subject]:
    """The models by short names; `latents` is the side of the UNet's input, 64 for images of 512 x 512."""

    def words(config: dict[str, Any]) -> dict[str, Any]:
        # Without a given mask the model would read values, which meta tensors do not have.
        mask = torch.zeros(1, 1, tokens, tokens)
        return {"inputs_embeds": torch.zeros(1, tokens, config["hidden_size"]), "attention_mask": mask}

    def noise() -> dict[str, Any]:
        width = UNET["cross_attention_dim"]
        return {
            "sample": torch.zeros(1, 4, latents, latents),
            "timestep": torch.zeros(1, dtype=torch.long),
            "encoder_hidden_states": torch.zeros(1, 77, width),
            "return_dict": False,
        }

    def phi() -> nn.Module:
        return PhiForCausalLM(PhiConfig(**PHI_1_5, **_PLAIN))

    def llama() -> nn.Module:
        return LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B, **_PLAIN))

    fused = ("q_proj", "k_proj", "v_proj")
    return {
        "phi": Subject("Phi-1.5", phi, lambda: words(PHI_1_5), (*fused, "dense"), fused, f"{tokens} tokens"),
        "llama": Subject("Llama-2-7B", llama, lambda: words(LLAMA_2_7B), (*fused, "o_proj"), fused, f"{tokens} tokens"),
        "unet": Subject(
            "Stable Diffusion v1.5, UNet", build_unet, noise, PRESETS["attention"], (), f"{latents} x {latents} latents"
        ),
    }
