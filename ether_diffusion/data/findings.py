"""The findings of a check of pairs, as a report and as a sheet of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from ether_diffusion.data.frames import Size
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import Pair
from ether_diffusion.data.pairs import Pairs
from ether_diffusion.data.palettes import Classes
from ether_diffusion.data.photos import open_photo
from ether_diffusion.data.preprocessors import is_preprocessor
from ether_diffusion.errors import UserError
from ether_diffusion.pictures import sheet

EXAMPLES, WIDTH = 3, 110
PHOTOS_KIND = "photos"
"""The kind of a split of photos of a subject, which have no conditions."""


@dataclass
class Finding:
    """One kind of finding in a split: how often, and its first few examples. A note is no fault."""

    what: str
    fault: bool
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line, or one line per example where they are long."""
        examples = self.examples + ["..."] * (self.count > len(self.examples))
        head = f"{'FAULT' if self.fault else 'note'}: {self.what} ({self.count:,}):"
        line = f"{head} {'; '.join(examples)}"
        return [line] if len(line) <= WIDTH or self.count == 1 else [head, *(f"    {example}" for example in examples)]


@dataclass
class SplitFindings:
    """The findings in one split."""

    split: str
    kind: str
    images: int = 0
    conditions: int = 0
    pairs: list[Pair] = field(default_factory=list)
    captions: str = ""
    """How many there are, and their source."""
    sizes: list[Size] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    """Number of pixels by label, over all maps; [0] is unlabelled. All 0 where conditions are not label maps."""
    findings: dict[str, Finding] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    """Other notes for the user, one line each."""

    def add(self, what: str, example: str, *, fault: bool = True) -> None:
        """Count one more finding of this kind."""
        finding = self.findings.setdefault(what, Finding(what, fault))
        finding.count += 1
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(example)


@dataclass
class Findings:
    """The findings in a data set's folder."""

    folder: Path
    described: str
    classes: Classes | None
    ignore_exif: bool
    splits: list[SplitFindings]

    @property
    def faults(self) -> int:
        """Number of kinds of faults, over the splits; 0: clean."""
        return sum(finding.fault for split in self.splits for finding in split.findings.values())

    def lines(self) -> list[str]:
        """The report."""
        lines = [f"{self.folder}: {self.described}"]
        for split in self.splits:
            lines += ["", *self._split_lines(split)]
        return [*lines, "", f"{self.faults} kind{'s' * (self.faults > 1)} of fault." if self.faults else "No faults."]

    def sheet(self, most: int = 4) -> Image.Image:
        """The first `most` pairs without faults: image, condition, and one over the other.

        Raises:
            UserError: No pair can be shown.
        """
        rows = []
        palette = self.classes.palette if self.classes else None
        for split in self.splits:
            for files in split.pairs:
                if split.kind == PHOTOS_KIND and files.image:
                    rows.append((files.name, [open_photo(files.image)]))
                    continue
                pairs = Pairs("", "", (files,), split.kind, palette, ignore_exif=self.ignore_exif)
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
            raise UserError(f"{self.folder}: no pair without faults to show")
        return sheet(rows)

    def _split_lines(self, split: SplitFindings) -> list[str]:
        lines = [f"split {split.split}: {split.images:,} images"]
        if split.kind == PHOTOS_KIND:
            lines = [f"{split.images:,} photos"]
        elif not is_preprocessor(split.kind):
            lines[0] += f", {split.conditions:,} conditions, {len(split.pairs):,} pairs"
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
