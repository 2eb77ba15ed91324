"""What a doctor finds in a folder of pairs, as a report and as a sheet to look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.data.frames import Size
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import Files
from ether_diffusion.data.pairs import Pair, Pairs
from ether_diffusion.data.palettes import Classes
from ether_diffusion.errors import UserError
from ether_diffusion.pictures import sheet

EXAMPLES, WIDTH = 3, 110


@dataclass
class Finding:
    """Something found in a split: how often, and the first few times in words. A note is no fault."""

    what: str
    fault: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line, or a line an example where they are long."""
        examples = self.examples + ["..."] * (self.count > len(self.examples))
        head = f"{'FAULT' if self.fault else 'note'}: {self.what} ({self.count:,}):"
        line = f"{head} {'; '.join(examples)}"
        return [line] if len(line) <= WIDTH or self.count == 1 else [head, *(f"    {example}" for example in examples)]


@dataclass
class SplitFindings:
    """What was found in one split."""

    split: str
    kind: str
    images: int = 0
    conditions: int = 0
    pairs: list[Files] = field(default_factory=list)
    captions: str = ""
    """How many there are and where from."""
    sizes: list[Size] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """By label, over all maps; [0] are unlabelled. Empty of counts where conditions are not label maps."""
    findings: dict[str, Finding] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """What else the user should hear, one line each."""

    def add(self, what: str, example: str, *, fault: bool = True) -> None:
        finding = self.findings.setdefault(what, Finding(what, fault))
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)


@dataclass
class Findings:
    """What was found in a folder."""

    folder: Path
    described: str
    classes: Classes | None
    as_stored: bool
    splits: list[SplitFindings]

    @property
    def faults(self) -> int:
        """Kinds of faults, over the splits; 0: clean."""
        return sum(finding.fault for split in self.splits for finding in split.findings.values())

    def lines(self) -> list[str]:
        """The report."""
        lines = [f"{self.folder}: {self.described}"]
        for split in self.splits:
            lines += ["", *self._split_lines(split)]
        return [*lines, "", f"{self.faults} kind{'s' * (self.faults > 1)} of fault." if self.faults else "No faults."]

    def sheet(self, most: int = 4) -> Image.Image:
        """The first pairs that are free of faults: image, condition, and one over the other.

        Raises:
            UserError: No pair can be shown.
        """
        rows = []
        palette = self.classes.palette if self.classes else None
        for split in self.splits:
            for files in split.pairs:
                pairs = Pairs("", "", (Pair(*files, caption=""),), split.kind, palette, as_stored=self.as_stored)
                try:
                    shown = ControllableDataset(pairs, resolution=256).example(0)
                except UserError:
                    continue
                image, condition = shown.get("image"), shown["condition"]
                over = [image, condition, Image.blend(image, condition, 0.5)] if image else [condition]
                rows.append((f"{split.split}: {files.name}", over))
                if len(rows) == most:
                    return sheet(rows)
        if not rows:
            raise UserError(f"{self.folder}: no pair that can be shown")
        return sheet(rows)

    def _split_lines(self, split: SplitFindings) -> list[str]:
        made = split.kind not in ("labels", "image")
        conditions = "" if made else f", {split.conditions:,} conditions, {len(split.pairs):,} pairs"
        lines = [f"split {split.split}: {split.images:,} images{conditions}"]
        if split.sizes:
            small, large = (pick(split.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
            lines.append("  sizes: " + " to ".join(dict.fromkeys(f"{w} x {h}" for w, h in (small, large))))
        total = int(split.pixels.sum())
        if self.classes is not None and total:
            present = [label for label, count in enumerate(split.pixels.tolist()) if label and count]
            most = sorted(present, key=lambda label: -split.pixels[label])[:5]
            named = ", ".join(f"{self._name(label)} {split.pixels[label] / total:.0%}" for label in most)
            lines.append(f"  labels: {len(present)} of {len(self.classes)} classes occur; most of all {named}")
            lines.append(f"  unlabelled: {split.pixels[0] / total:.1%} of the pixels")
        lines.append(f"  captions: {split.captions}")
        found = sorted(split.findings.values(), key=lambda finding: not finding.fault)
        return lines + [f"  {line}" for line in (*split.remarks, *(line for one in found for line in one.lines()))]

    def _name(self, label: int) -> str:
        assert self.classes is not None
        return self.classes.names[label - 1].split(",")[0] if self.classes.names else f"class {label}"
