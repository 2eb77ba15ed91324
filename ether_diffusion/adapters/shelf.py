"""A shelf: thousands of ETHER or ETHER+ adapters of one shape in one safetensors file; only those in use are read.

Each tensor is an adapter, by its name: a row of a bank's table (`ether.bank.Layout`), so that putting it into a bank is
one copy from the mapped file. The header has the layout, the adapters' settings, and the digest of each.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock
from peft import PeftConfig
from safetensors import safe_open
from torch import Tensor

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.ether.bank import Layout
from ether_diffusion.files import BLOCK, digest_of, short_digest, whole_file
from ether_diffusion.input_files import check_file
from ether_diffusion.weight_files import loading

from .bankable import bankable
from .saved_adapter import SavedAdapter, read_adapter

FORMAT = "ether_diffusion shelf, version 1"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_NO_DIGEST = "0" * len(digest_of())
LONGEST_NAME = 200


@dataclass(frozen=True)
class Contents:
    """What a shelf's header says."""

    layout: Layout
    settings: dict[str, Any]
    """Values of an adapter_config.json that all of its adapters share."""
    vae: str | None
    dtype: torch.dtype
    digests: dict[str, str] = field(default_factory=dict)
    """Of each adapter, as `SavedAdapter.digest`, by name in the order of the file."""

    @property
    def row_bytes(self) -> int:
        return self.layout.size * self.dtype.itemsize

    @property
    def base_model(self) -> str | None:
        return self.settings.get("base_model_name_or_path")

    @property
    def config(self) -> Any:
        return PeftConfig.from_peft_type(**self.settings)

    def header(self) -> bytes:
        """The file's bytes before the rows. Their number depends on the names, and not on the digests."""
        size = self.row_bytes
        rows = {
            name: {
                "dtype": _CODES[self.dtype],
                "shape": [self.layout.size],
                "data_offsets": [index * size, (index + 1) * size],
            }
            for index, name in enumerate(self.digests)
        }
        metadata = {
            "format": FORMAT,
            "layout": json.dumps(dict(self.layout.shapes)),
            "config": json.dumps(self.settings),
            "vae": json.dumps(self.vae),
            "digests": json.dumps(self.digests),
        }
        text = json.dumps({"__metadata__": metadata, **rows}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


class Shelf:
    """A shelf's file, mapped into memory: what is read of it stays in the system's file cache, not in the process.

    Args:
        path: A file of `build_shelf`.

    Raises:
        UserError: no file there, or not a shelf.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_file(Path(path))
        with loading(f"{path}: cannot be read as a shelf"):
            self._file = safe_open(self.path, "pt")
            self.contents = _contents(self.path, self._file)
        self.layout = self.contents.layout

    def __contains__(self, name: object) -> bool:
        return name in self.contents.digests

    def __len__(self) -> int:
        return len(self.contents.digests)

    @property
    def names(self) -> list[str]:
        return list(self.contents.digests)

    def row(self, name: str) -> Tensor:
        """An adapter's row: a view of the mapped file. Raises UserError: it holds NaN or infinity."""
        row = self._file.get_tensor(name)
        if not torch.isfinite(row).all():
            raise UserError(f"{self.path}: the adapter {name!r} holds NaN or infinity; the file is damaged.")
        return row


def _contents(path: Path, file: Any) -> Contents:
    metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is no shelf; expected a file that `ether-diffusion shelf build` wrote.")
    shapes = {name: tuple(shape) for name, shape in json.loads(metadata["layout"]).items()}
    digests = json.loads(metadata["digests"])
    code = file.get_slice(next(iter(digests))).get_dtype() if digests else "F32"
    contents = Contents(
        Layout(shapes), json.loads(metadata["config"]), json.loads(metadata["vae"]), DTYPES[code], digests
    )
    if sorted(digests) != sorted(file.keys()):
        raise ValueError("its list of adapters is not that of its tensors")
    for name in (*digests,)[:: max(1, len(digests) // 16)]:
        if file.get_slice(name).get_shape() != [contents.layout.size]:
            raise ValueError(f"{name} has another size than its layout")
    return contents


def build_shelf(
    path: str | Path,
    adapters: Mapping[str, str | Path],
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda count: None,
) -> Contents:
    """Write a new shelf of these adapters, by name. Either all are in it, or no file is written.

    Args:
        dtype: Of the rows, fp32 or bf16, which takes half the disk and rounds each number to 8 bits.
        progress: Called with 1 for each adapter read.

    Raises:
        UserError: there is a file already; an adapter cannot be read, or cannot share a shelf with the others.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise UserError(f"{path} is there already; `shelf add` adds to a shelf. Choose another name, or remove it.")
    return _write(path, None, [], adapters, dtype, progress)


def add_to_shelf(
    path: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    replace: bool = False,
    progress: Callable[[int], object] = lambda count: None,
) -> Contents:
    """Write a shelf again with further adapters. It takes the disk of a second file meanwhile, and little memory.

    Args:
        replace: Adapters of names that the shelf holds take their places; False: they are refused.

    Raises:
        UserError: as `build_shelf`, or not a shelf. It is then as it was.
    """
    with _locked(Path(path)):
        contents = Shelf(path).contents
        taken = [name for name in adapters if name in contents.digests]
        if taken and not replace:
            raise UserError(f"{path} holds an adapter {taken[0]!r} already; take --replace, or another name.")
        kept = [name for name in contents.digests if name not in taken]
        return _write(Path(path), contents, kept, adapters, contents.dtype, progress)


def remove_from_shelf(path: str | Path, names: Sequence[str]) -> Contents:
    """Write a shelf again without these adapters.

    Raises:
        UserError: it holds no adapter of one of these names, or no others. It is then as it was.
    """
    with _locked(Path(path)):
        contents = Shelf(path).contents
        for name in names:
            if name not in contents.digests:
                near = did_you_mean(name, contents.digests)
                raise UserError(f"{path} holds no adapter {name!r}.{near} It holds {len(contents.digests):,}.")
        kept = [name for name in contents.digests if name not in set(names)]
        if not kept:
            raise UserError(f"{path} would be empty; remove the file itself.")
        return _write(Path(path), contents, kept, {}, contents.dtype)


def _write(
    path: Path,
    old: Contents | None,
    kept: Sequence[str],
    adapters: Mapping[str, str | Path],
    dtype: torch.dtype,
    progress: Callable[[int], object] = lambda count: None,
) -> Contents:
    """Write the kept rows of the old file, and then those of these adapters."""
    for name in adapters:
        if not name or len(name) > LONGEST_NAME or not name.isprintable() or name == "__metadata__":
            raise UserError(f"shelf: {name!r:.80} cannot be a name; expected 1 to {LONGEST_NAME} printable characters.")
    source = str(path)
    rows = (_row_of(folder) for folder in adapters.values())
    if old is None:
        first = next(rows, None)
        if first is None:
            raise UserError("shelf: no adapters; name at least one run.")
        saved, layout, _ = first
        source, rows = str(saved.folder), itertools.chain([first], rows)
        old = Contents(layout, json.loads(json.dumps(_settings(saved))), saved.vae, dtype)
    digests = {name: old.digests[name] for name in kept} | dict.fromkeys(adapters, _NO_DIGEST)
    contents = Contents(old.layout, old.settings, old.vae, dtype, digests)
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(contents.header())
        if kept:
            _copy_rows(path, old, kept, file)
        for name, (saved, layout, row) in zip(adapters, rows, strict=True):
            _check_alike(contents, source, saved, layout)
            file.write(row.to(dtype).view(torch.uint8).numpy().tobytes())
            digests[name] = saved.digest
            progress(1)
        file.seek(0)
        file.write(contents.header())
    return contents


def _row_of(folder: str | Path) -> tuple[SavedAdapter, Layout, Tensor]:
    saved = read_adapter(folder)
    vectors, layout = bankable(saved)
    return saved, layout, layout.row(vectors)


def _settings(saved: SavedAdapter) -> dict[str, Any]:
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in saved.config.to_dict().items()}
    return {**values, "peft_type": getattr(saved.config.peft_type, "value", saved.config.peft_type)}


def _check_alike(contents: Contents, source: str, saved: SavedAdapter, layout: Layout) -> None:
    """Refuse an adapter that differs in more than its vectors from those of the shelf, whose first is `source`."""
    difference = contents.layout.difference(layout)
    for what, its, own in (
        ("base_model", contents.base_model, saved.base_model),
        ("revision", contents.settings.get("revision"), saved.revision),
        ("vae", contents.vae, saved.vae),
    ):
        difference = difference or (f"{what}: {its}; {own}" if its != own else None)
    if difference is not None:
        raise UserError(f"{saved.folder} cannot share a shelf with {source}: they differ in {difference}.")


def _copy_rows(path: Path, old: Contents, kept: Sequence[str], file: BinaryIO) -> None:
    """Copy rows of the shelf at `path`, neighbours together, in blocks."""
    places = {name: index for index, name in enumerate(old.digests)}
    with path.open("rb") as shelf:
        start = 8 + struct.unpack("<Q", shelf.read(8))[0]
        index = 0
        while index < len(kept):
            place = places[kept[index]]
            count = 1
            while index + count < len(kept) and places[kept[index + count]] == place + count:
                count += 1
            shelf.seek(start + place * old.row_bytes)
            left = count * old.row_bytes
            while left:
                block = shelf.read(min(left, BLOCK))
                if not block:
                    raise UserError(f"{path}: the file ends before its last adapter; it is damaged.")
                file.write(block)
                left -= len(block)
            index += count


def _locked(path: Path) -> FileLock:
    """One writer of a shelf at a time on this machine: two would each write a file without the other's adapters."""
    return FileLock(Path(tempfile.gettempdir()) / f"ether_diffusion-{short_digest(str(path.resolve()))}.lock")
