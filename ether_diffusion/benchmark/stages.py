"""The stages of a unit: what each was made of and what came of it, in a JSON file that survives its worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.pictures import read_settings


class Stages:
    """Written whole or not at all; by one worker at a time, who holds the unit's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path.is_file():
            try:
                self.found = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: cannot be read ({error}); delete it.") from None

    def begin(self, stage: str, inputs: Mapping[str, Any], *, derived: bool = False) -> dict[str, Any] | None:
        """What came of a stage with these inputs; None if it did not come to its end yet.

        Args:
            derived: It is made anew from other inputs.

        Raises:
            UserError: it was begun with other inputs, and is not derived.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(inputs))
        before = self.found.get(stage)
        if before is not None and before["inputs"] == wanted:
            return before["outputs"]
        if before is not None and not derived:
            key, was, now = _difference(before["inputs"], wanted)
            raise UserError(
                f"{self.path}: {stage} with {key} = {was}, not {now}. Choose another output_dir, or delete the folders "
                "of this method."
            )
        self._write(stage, wanted, None)
        return None

    def end(self, stage: str, outputs: Mapping[str, Any]) -> None:
        """Keep what came of a stage that was begun."""
        self._write(stage, self.found[stage]["inputs"], dict(outputs))

    def outputs(self, stage: str) -> dict[str, Any] | None:
        """What came of a stage, whatever its inputs; None if it did not come to its end."""
        return self.found.get(stage, {}).get("outputs")

    def _write(self, stage: str, inputs: dict[str, Any], outputs: dict[str, Any] | None) -> None:
        self.found[stage] = {"inputs": inputs, "outputs": outputs}
        write_whole(self.path, json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")


def locked(output_dir: Path, name: str) -> FileLock:
    """For what one worker does at a time, of all that see a benchmark's folder. The system lets go of a lost worker's
    locks."""
    folder = output_dir / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def drop_broken_batches(folder: Path, files: Sequence[str], batch_size: int) -> bool:
    """Delete the images of batches that are not whole, so that what is left to draw falls into the same batches as in
    a drawing that nothing stopped: the last bits of an image may depend on its batch. Gives whether all are there."""
    whole = True
    for start in range(0, len(files), batch_size):
        batch = [folder / file for file in files[start : start + batch_size]]
        if any(read_settings(file) is None for file in batch):
            whole = False
            for file in batch:
                file.unlink(missing_ok=True)
    return whole


def _difference(was: Any, now: Any, key: str = "") -> tuple[str, str, str]:
    """The first key whose values differ, dotted, and these."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in (*was, *(name for name in now if name not in was)):
            if was.get(name) != now.get(name):
                return _difference(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    return key, repr(was), repr(now)
