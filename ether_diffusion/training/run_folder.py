"""A run's folder: what may be in it before a run starts, and the files that grow while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ether_diffusion.config import Settings, to_yaml
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole


class RunFolder:
    """`config.yaml`, `checkpoints/`, `samples/`, `metrics.jsonl`, `logs/` of one training run, and what it trained:
    `adapter/` and `condition_encoder/`, or a whole `unet/` or `controlnet/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.samples = path / "samples"
        self.logs = path / "logs"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"

    def check_free(self, resume: bool) -> None:
        """Refuse a folder that holds something, unless the run resumes. Writes nothing.

        Raises:
            UserError: the path is a file, or a folder that is not empty.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; expected a folder, new or empty.")
        if not resume and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(
                f"output_dir: {self.path} is not empty. Go on with that run by training.resume=true, or choose another "
                "output_dir."
            )

    def create(self, settings: Settings) -> None:
        """Make the folder and write the resolved config."""
        write_whole(self.config, to_yaml(settings))

    def log(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, step: int) -> None:
        """Drop the metrics of steps after `step`, which a resumed run takes again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError):
                continue  # a line cut short by a crash
        write_whole(self.metrics, "".join(kept))
