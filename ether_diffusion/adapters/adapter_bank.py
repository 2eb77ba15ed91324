"""Saved ETHER and ETHER+ adapters in a bank: every image of a batch is generated with an adapter of its own."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.ether.bank import Bank, Layout
from ether_diffusion.ether.frozen import ATTACH_FIRST, group_hook, is_offloaded
from ether_diffusion.weight_files import unwrapped

from .attach import detach
from .bankable import bankable
from .loading import check_fits
from .saved_adapter import SavedAdapter, read_adapter
from .shelf import Shelf
from .undo import undone_on_failure


class AdapterBank:
    """Adapters on one UNet, of which each image of a batch takes its own.

    They have the same variant, layers, sides and blocks, which the first one loaded determines. An adapter takes the
    memory of its vectors; all of it is there from the first one, so that loading and removing change no shape and a
    compiled model stays compiled. Outside `select` the model is the base.

    Args:
        model: The UNet, without adapters; changed in place by the first `load`.
        capacity: The most adapters that the bank holds.
        dtype: That the adapters are kept in; default: single precision. `torch.bfloat16` takes half the memory, and
            rounds each coefficient to 8 bits; products are computed in single precision in any case.
        device: Where they are kept; default: that of the model's first adapted layer.

    Example:
        >>> bank = ether_diffusion.AdapterBank(pipeline.unet, capacity=64)
        >>> bank.load("robot", "runs/robot")
        >>> bank.load("cat", "runs/cat")
        >>> with bank.select(["robot", "cat", None]):
        ...     images = pipeline(["a qwe toy", "a qwe cat", "a dog"]).images
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int = 64,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if capacity < 1:
            raise UserError(f"AdapterBank: capacity={capacity}; expected at least 1.")
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"AdapterBank: dtype={dtype}; expected a floating one.")
        self.model, self.capacity = model, capacity
        self._dtype, self._device = dtype, device
        self._bank: Bank | None = None
        self._shelf: Shelf | None = None
        self._source = ""
        self._digests: dict[str, str] = {}
        self._recent: OrderedDict[str, None] = OrderedDict()
        """The shelf's adapters in the bank, the one used last at the end."""

    @classmethod
    def open(
        cls,
        file: str | Path | Shelf,
        model: nn.Module,
        capacity: int | None = None,
        *,
        memory: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> AdapterBank:
        """A bank over a shelf, a file of `ether-diffusion shelf build`: `select` takes any of its adapters.

        They are in the file, mapped into memory. Those in use are in the bank; where it is full, the one that has not
        been used for longest makes room.

        Args:
            file: Its path, or the shelf that was opened already.
            capacity: The most adapters in the bank at a time; default: 64, or what `memory` allows.
            memory: Bytes of the model's device that the bank may take.

        Raises:
            UserError: no shelf there, or its adapters do not fit the model.
        """
        shelf = file if isinstance(file, Shelf) else Shelf(file)
        kind = torch.float32 if dtype is None else dtype
        if memory is not None:
            row = shelf.layout.size * kind.itemsize
            if memory // row < 1:
                raise UserError(f"AdapterBank: memory={memory:,}; an adapter of {shelf.path} takes {row:,} bytes.")
            capacity = min(capacity or memory // row, memory // row, len(shelf))
        bank = cls(model, 64 if capacity is None else capacity, dtype=dtype, device=device)
        bank._source = str(shelf.path)
        bank._put_in(shelf.contents.config)
        try:
            bank._check_layout(f"{type(model).__name__}", shelf.layout)
        except UserError:
            bank.detach()
            raise
        bank._shelf = shelf
        return bank

    @property
    def names(self) -> list[str]:
        """All adapters that `select` takes: those loaded, in the order in which they came, and the shelf's."""
        return [*self._digests, *(self._shelf.names if self._shelf else ())]

    @property
    def bytes_per_adapter(self) -> int:
        """Memory that an adapter takes; 0 before the first one is loaded."""
        return self._bank.layout.size * self._bank.table.element_size() if self._bank else 0

    def digest(self, name: str) -> str:
        """SHA-256 of everything that determines an adapter's function, as `SavedAdapter.digest`."""
        self._check_names([name])
        return (
            self._digests[name] if self._shelf is None or name in self._digests else self._shelf.contents.digests[name]
        )

    def __contains__(self, name: object) -> bool:
        return name in self._digests or (self._shelf is not None and name in self._shelf)

    def load(self, name: str, adapter: str | Path | SavedAdapter) -> None:
        """Put a saved adapter into the bank; one of this name is replaced. If that fails, nothing has changed.

        Args:
            adapter: A path for `read_adapter`, or what that returned.

        Raises:
            UserError: as `read_adapter`; no ETHER or ETHER+ adapter; one with parts that a bank does not hold; one that
                differs from the others in more than its vectors; one that does not fit the model; or the bank is full.
        """
        if not isinstance(adapter, SavedAdapter):
            adapter = read_adapter(adapter)
        vectors, layout = bankable(adapter)
        self._check_layout(str(adapter.folder), layout)
        if name not in self._digests and len(self._digests) >= self.capacity:
            raise UserError(f"{adapter.folder}: the bank is full (capacity={self.capacity}); remove an adapter first.")
        row = layout.row(vectors)
        if self._bank is None:
            with unwrapped(self.model) as bare:
                check_fits(bare, adapter)
            self._source = str(adapter.folder)
            self._put_in(adapter.config)
        self._recent.pop(name, None)  # of the shelf, whose place it takes
        self._put(name, row, keep=[])
        self._digests[name] = adapter.digest

    def remove(self, name: str) -> None:
        """Free the place of an adapter that was loaded. Raises UserError: there is none of this name."""
        if name not in self._digests:
            raise UserError(f"no adapter {name!r} was loaded.{did_you_mean(name, self._digests)}")
        assert self._bank is not None
        self._bank.remove(name)
        del self._digests[name]

    @contextlib.contextmanager
    def select(self, names: Sequence[str | None], scales: Sequence[float] | None = None) -> Iterator[None]:
        """Within the block each image of a batch takes its adapter.

        Args:
            names: One an image, in the order of the batch: in a pipeline each prompt's name as often as it has images.
                None: the base, exactly. The batch is as long, or twice as long for guidance.
            scales: Strengths, as many; default: 1. With adapters on both sides of the layers (ETHER+), a strength other
                than 1 runs these layers twice.

        Raises:
            UserError: no adapter of one of these names, or other numbers of names and scales.
            ValueError: a pass within the block has another batch.
        """
        if isinstance(names, str) or not names:
            raise UserError(f"select: {names!r:.80}; expected a list with one name an image.")
        if scales is not None and len(scales) != len(names):
            raise UserError(f"select: {len(scales)} scales for {len(names)} names; expected as many.")
        self._check_names(names)
        if self._bank is None:  # each of them is the base
            yield
            return
        self._fetch([name for name in dict.fromkeys(names) if name is not None and name not in self._digests])
        with self._bank.select(names, scales):
            yield

    def detach(self) -> None:
        """Take the bank's layers out: the model is as it was, and the bank is empty."""
        if self._bank is not None:
            with unwrapped(self.model) as bare:
                detach(bare)
        self._bank = self._shelf = None
        self._digests.clear()
        self._recent.clear()

    def _fetch(self, names: Sequence[str]) -> None:
        """Have these adapters of the shelf in the bank."""
        if len(names) > self.capacity - len(self._digests):
            raise UserError(
                f"select: {len(names)} adapters of {self._source} in one batch; the bank has room for "
                f"{self.capacity - len(self._digests)} (capacity={self.capacity})."
            )
        for name in names:
            if name not in self._recent:
                assert self._shelf is not None
                self._put(name, self._shelf.row(name), keep=names)
            self._recent[name] = None
            self._recent.move_to_end(name)

    def _put(self, name: str, row: Tensor, keep: Sequence[str]) -> None:
        """Write a row into the table; where that is full, in the place of what was not used for longest."""
        assert self._bank is not None
        if name not in self._bank.rows and len(self._bank.rows) >= self.capacity:
            oldest = next(other for other in self._recent if other not in keep)
            self._bank.remove(oldest)
            del self._recent[oldest]
        self._bank.put(name, row)

    def _check_names(self, names: Sequence[str | None]) -> None:
        unknown = next((name for name in names if name is not None and name not in self), None)
        if unknown is not None:
            known = self.names
            near = did_you_mean(unknown, known[:10_000])
            raise UserError(f"the bank holds no adapter {unknown!r}.{near} It holds {_listed(known)}.")

    def _check_layout(self, source: str, layout: Layout) -> None:
        difference = self._bank.layout.difference(layout) if self._bank else None
        if difference is not None:
            raise UserError(
                f"{source} cannot share a bank with {self._source}: they differ in {difference}. Adapters of a bank "
                "have the same variant, layers, sides and blocks."
            )

    def _put_in(self, config: Any) -> None:
        if any(is_offloaded(module) or group_hook(module) is not None for module in self.model.modules()):
            raise UserError(f"{type(self.model).__name__} is offloaded: {ATTACH_FIRST}")
        with unwrapped(self.model) as bare, undone_on_failure(bare):
            try:
                self._bank = Bank(bare, config, self.capacity, dtype=self._dtype, device=self._device)
            except ValueError as error:
                raise UserError(f"AdapterBank: {error}") from error


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
