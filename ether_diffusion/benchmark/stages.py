"""The stages of a unit: the inputs and the outputs of each, in a JSON file that survives its worker."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.input_files import read_bytes
from ether_diffusion.pictures import check_marked, read_settings

TRAINED, DRAWN, SCORED = "trained", "drawn", "scored"
DIVERGED = "diverged"
"""The output of a training whose loss ceased to be finite: the reason, in the place of digests of weights."""


class Stage(TypedDict):
    """What a stage was begun with, and its result; None until it ends."""

    inputs: dict[str, Any]
    outputs: dict[str, Any] | None


_STAGES = TypeAdapter(dict[str, Stage])
T = TypeVar("T")


class Stages:
    """The file of a unit's stages. Only the worker that holds the unit's lock writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = read_json(path, _STAGES, "the stages of a unit") if path.is_file() else {}

    def begin(self, stage: str, inputs: Mapping[str, Any], *, derived: bool = False) -> dict[str, Any] | None:
        """Begin a stage, unless it is complete with these inputs.

        Args:
            derived: Other inputs replace the stage; otherwise they are refused.

        Returns:
            The outputs of the complete stage, else None.

        Raises:
            UserError: the stage was begun with other inputs, and is not derived.
        """
        wanted: dict[str, Any] = json.loads(json.dumps(inputs))
        before = self.found.get(stage)
        if before is not None and before["inputs"] == wanted:
            return before["outputs"]
        if before is not None and not derived:
            key, was, now = _difference(before["inputs"], wanted)
            raise UserError(
                f"{self.path}: stage {stage!r} was made with {key} = {was}; this run has {now}. Choose another "
                "output_dir, or delete the folders of this method."
            )
        self._write(stage, wanted, None)
        return None

    def end(self, stage: str, outputs: Mapping[str, Any]) -> None:
        """Record the outputs of a stage that was begun."""
        self._write(stage, self.found[stage]["inputs"], dict(outputs))

    def outputs(self, stage: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The outputs of a complete stage; None if it is not complete, or had other values for some of `inputs`."""
        found = self.found.get(stage)
        if found is None or any(found["inputs"].get(key) != value for key, value in (inputs or {}).items()):
            return None
        return found["outputs"]

    def divergence(self) -> str | None:
        """The message of a training whose loss ceased to be finite; None if it did not."""
        message = (self.outputs(TRAINED) or {}).get(DIVERGED)
        return None if message is None else str(message)

    def _write(self, stage: str, inputs: dict[str, Any], outputs: dict[str, Any] | None) -> None:
        self.found[stage] = {"inputs": inputs, "outputs": outputs}
        write_whole(self.path, json.dumps(self.found, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: TypeAdapter[T], what: str) -> T:
    """Read a file of the benchmark's own.

    Args:
        what: What it holds, for the message.

    Raises:
        UserError: it holds something else.
    """
    try:
        return kind.validate_json(read_bytes(path))
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path}: not {what} ({place or 'the file'}: {fault['msg']}). Delete it to do them again."
        ) from None


def locked(output_dir: Path, name: str) -> FileLock:
    """A lock between all workers that see a benchmark's folder. The system releases the locks of a lost worker."""
    folder = output_dir / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")


def drop_incomplete_batches(folder: Path, files: Sequence[str], batch_size: int) -> bool:
    """Delete the images of batches that are not complete. Returns whether all batches are complete.

    The last bits of an image may depend on the batch that it is generated in. After this, a resumed folder is filled
    by the same batches as one that was never interrupted.

    Raises:
        UserError: as `check_marked`.
    """
    complete = True
    for start in range(0, len(files), batch_size):
        batch = [folder / file for file in files[start : start + batch_size]]
        if any(read_settings(file) is None for file in batch):
            complete = False
            for file in batch:
                check_marked(file)
            for file in batch:
                file.unlink(missing_ok=True)
    return complete


def _difference(was: Any, now: Any, key: str = "") -> tuple[str, str, str]:
    """The first key whose values differ, dotted, and the two values."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in (*was, *(name for name in now if name not in was)):
            if was.get(name) != now.get(name):
                return _difference(was.get(name), now.get(name), f"{key}.{name}" if key else name)
    return key, repr(was), repr(now)
