"""The kind of conditions that an encoder was trained on, saved with it: no map is painted with another palette."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.input_files import read_object

from .conditions import AS_IT_IS
from .pairs import Pairs
from .palettes import ADE20K

FILE = "condition.json"


@dataclass(frozen=True)
class ConditionKind:
    """`kind`, `palette` and `names` as in `Pairs`."""

    kind: str = "labels"
    palette: np.ndarray | None = None
    """None: ADE20K's."""
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: Pairs) -> ConditionKind:
        """The kind of these pairs' conditions."""
        return cls(pairs.kind, pairs.palette, pairs.names)

    @property
    def colours(self) -> np.ndarray:
        """(N + 1, 3) uint8: the palette of maps."""
        return ADE20K if self.palette is None else self.palette

    @property
    def preprocessor(self) -> str | None:
        """The `preprocessor` argument of `read_condition` for such conditions."""
        return {"labels": None, "image": AS_IT_IS}.get(self.kind, self.kind)

    def same_colours(self, palette: np.ndarray | None) -> bool:
        """Whether this palette is the one of training; None: no maps, which fit every kind."""
        return self.kind != "labels" or palette is None or np.array_equal(self.colours, palette)


def save_condition_kind(kind: ConditionKind, folder: str | Path) -> Path:
    """Write `condition.json` into an encoder's folder, whole or not at all: colours as `rrggbb`, from label 0 on."""
    path = Path(folder) / FILE
    colours = None if kind.palette is None else [bytes(colour).hex() for colour in kind.palette.tolist()]
    values = {"kind": kind.kind, "palette": colours, "names": list(kind.names)}
    write_whole(path, json.dumps(values, ensure_ascii=False) + "\n")
    return path


def read_condition_kind(folder: str | Path) -> ConditionKind | None:
    """The kind that an encoder's folder states; None: it states none.

    Raises:
        UserError: `condition.json` is not as `save_condition_kind` writes it.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    values = read_object(path)
    try:
        colours = values["palette"]
        palette = None if colours is None else np.array([tuple(bytes.fromhex(colour)) for colour in colours], np.uint8)
        if palette is not None and (palette.ndim != 2 or palette.shape[1] != 3):
            raise ValueError("colours of another length than rrggbb")
        return ConditionKind(str(values["kind"]), palette, tuple(map(str, values["names"])))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error
