"""FLOPs of a forward and a backward pass with each method (paper, Table 1), counted on meta tensors.

python eval/cost.py [phi llama unet] [--tokens 512] [--latents 64]      # cost.csv, cost.md, a plot and the command
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

import torch  # noqa: E402

from ether_diffusion.analysis import cost  # noqa: E402
from ether_diffusion.analysis.cost_subjects import TOKENS, subjects  # noqa: E402
from ether_diffusion.analysis.output import (  # noqa: E402
    FAINT,
    check_matplotlib,
    command_line,
    line_style,
    plot,
    write_command,
    write_table,
)
from ether_diffusion.analysis.plots import plain_log  # noqa: E402
from ether_diffusion.analysis.published import COSTS  # noqa: E402
from ether_diffusion.errors import UserError, did_you_mean, exit_code  # noqa: E402
from ether_diffusion.files import write_whole  # noqa: E402

BLOCKS = (1, 4, 32)
TITLES = {"ether": "ETHER", "ether_plus": "ETHER+", "lora": "LoRA", "base": "frozen base"}
RANK = 8
TERA = 1e12


def rows_of(key: str, subject: cost.Subject) -> list[dict[str, Any]]:
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
                "paper": COSTS.get(key, {}).get((method, blocks)) if form != "activations" else None,
            }
        )
        print(f"{subject.title}: {TITLES[method]} {form} {blocks or ''}", flush=True)

    with torch.device("meta"):
        shapes = list(cost.group_shapes(subject.build(), subject).values())
    add("base", "", None, cost.count_base(subject))
    add("lora", "", None, cost.count_lora(subject, RANK))
    for variant in ("ether", "ether_plus"):
        for blocks in BLOCKS:
            products = cost.dense_products(shapes, blocks, outer=variant == "ether_plus") / TERA
            add(variant, "dense", blocks, cost.count_dense(subject, variant, blocks), products)
            add(variant, "activations", blocks, cost.count_activations(subject, variant, blocks))
    return rows


def deviations(key: str, subject: cost.Subject) -> list[str]:
    """How the paper's values compare with the closed forms: the y of x + y / n between two of them, and x."""
    if key not in COSTS:
        return []
    with torch.device("meta"):
        shapes = list(cost.group_shapes(subject.build(), subject).values())
    sides = {"input side": (True, False), "output side": (False, True), "both sides": (True, True)}
    told = ", ".join(
        f"{name} {cost.dense_products(shapes, 1, inner, outer) / TERA:.2f}" for name, (inner, outer) in sides.items()
    )
    lines = [f"- {subject.title}: the products' closed forms at n = 1: {told}."]
    for variant in ("ether", "ether_plus"):
        printed = {n: COSTS[key][(variant, n)] for n in BLOCKS}
        slopes = [(printed[a] - printed[b]) / (1 / a - 1 / b) for a, b in ((1, 4), (4, 32))]
        lines.append(
            f"- {subject.title}, {TITLES[variant]}: the printed values give y = {slopes[0]:.2f} from n = 1 and 4, "
            f"{slopes[1]:.2f} from n = 4 and 32, and x = {printed[4] - slopes[1] / 4:.2f} from the latter."
        )
    return lines


def markdown(rows: Sequence[dict[str, Any]], notes: Sequence[str], command: str) -> str:
    """Table and deviations."""
    head = ["model", "input", "method", "form", "n", "forward", "backward", "dense products", "paper"]
    lines = [f"# TFLOPs of a pass, batch 1\n\n`{command}`\n", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        numbers = [row["forward"], row["backward"], row["products"], row["paper"]]
        cells = [row["model"], row["input"], TITLES[row["method"]], row["form"], str(row["blocks"] or "")]
        lines.append(
            "| " + " | ".join([*cells, *("" if value is None else f"{value:.3f}" for value in numbers)]) + " |"
        )
    if notes:
        lines += ["\n## The paper's Table 1 against closed forms, TFLOPs\n", *notes]
    return "\n".join(lines) + "\n"


def draw(panel: Any, subject: cost.Subject, rows: Sequence[dict[str, Any]]) -> None:
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


def main() -> None:
    """Count, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="phi, llama, unet (default: all)")
    add("--tokens", type=int, default=TOKENS, help=f"of the language models' input (default: {TOKENS})")
    add("--latents", type=int, default=64, help="side of the UNet's latents (default: 64, for 512 pixels)")
    add("--output", type=Path, default=Path("runs/cost"), metavar="DIR")
    arguments = parser.parse_args()
    check_matplotlib()
    for name, value, least in (("tokens", arguments.tokens, 1), ("latents", arguments.latents, 8)):
        if value < least or (name == "latents" and value % 8):
            expected = "a multiple of 8" if name == "latents" else "a whole number from 1"
            raise UserError(f"--{name} {value}: expected {expected}.")
    known = subjects(arguments.tokens, arguments.latents)
    for name in arguments.models:
        if name not in known:
            raise UserError(f"{name!r}: no such model.{did_you_mean(name, known)} Expected {', '.join(known)}.")
    chosen = {key: subject for key, subject in known.items() if not arguments.models or key in arguments.models}
    rows = [row for key, subject in chosen.items() for row in rows_of(key, subject)]
    notes = [line for key, subject in chosen.items() for line in deviations(key, subject)]
    command, folder = command_line("eval/cost.py", sys.argv[1:]), arguments.output
    write_command(folder, command)
    write_table(folder / "cost.csv", rows)
    write_whole(folder / "cost.md", markdown(rows, notes, command))
    with plot(folder / "cost", command, columns=len(chosen), size=(max(4.0 * len(chosen) + 1, 6.4), 4.8)) as panels:
        for panel, (key, subject) in zip(panels, chosen.items(), strict=True):
            draw(panel, subject, [row for row in rows if row["model"] == key])
        panels[0].set_ylabel("TFLOPs of a backward pass")
        named = panels[0].get_legend_handles_labels()
        panels[0].figure.legend(*named, loc="outside lower center", ncols=min(len(chosen) + 1, 3), handlelength=3.5)
    print(markdown(rows, notes, command), end="")
    print(f"Table and plots: {folder}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/cost.py", main))
