"""Adapters that were trained one after another: where the earlier ones lie, and what a model keeps of them.

An adapter folder may hold another one, `before/`, which was merged into the base before this one was trained. That one
may again: the innermost acts first. So one folder is all that an image needs beside the base.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

WEIGHTS, CONFIG, TEXT_ENCODER = "adapter_model.safetensors", "adapter_config.json", "text_encoder"
BEFORE = "before"


def phases(folder: Path) -> list[Path]:
    """Adapter folders in the order in which they act: those inside this one, and this one last."""
    before = folder / BEFORE
    return [*(phases(before) if before.is_dir() else ()), folder]


def weights_digest(folder: Path) -> str:
    """SHA-256 of the weights of an adapter folder: the text encoder's too, and those of the adapters before it."""
    parts = [part / WEIGHTS for phase in reversed(phases(folder)) for part in (phase, phase / TEXT_ENCODER)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in parts if file.is_file())).hexdigest()


@dataclass(frozen=True)
class PreviousAdapter:
    """A saved adapter that was merged into a model, in memory: it must survive its folder to be saved again."""

    digest: str
    files: dict[str, bytes]
    """By their paths in the folder."""

    @classmethod
    def read(cls, folder: Path) -> PreviousAdapter:
        """All of a folder."""
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return cls(weights_digest(folder), {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def write(self, folder: Path) -> None:
        """Write all of it into a folder that does not exist yet."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    @property
    def folders(self) -> list[str]:
        """Paths of its adapter folders in the one that is trained after it, the first to act first."""
        found = [Path(BEFORE, name).parent for name in self.files if Path(name).name == CONFIG]
        found = [folder for folder in found if folder.name != TEXT_ENCODER]
        return [folder.as_posix() for folder in sorted(found, key=lambda folder: -len(folder.parts))]


def previous_adapter(model: nn.Module) -> PreviousAdapter | None:
    """What was merged into a model to train another adapter on it."""
    return getattr(model, "_adapter_before", None)


def set_previous_adapter(model: nn.Module, before: PreviousAdapter | None) -> None:
    """Have a model keep what was merged into it: an adapter trained on it is saved together with this. None: forget."""
    mark: Any = model
    mark._adapter_before = before
