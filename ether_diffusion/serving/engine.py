"""The engine of a server: one base, banks of adapters, and requests -> images, in batches across the adapters.

It knows no network and no event loop. One thread at a time may call `sample`; `encode` may run beside it.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from PIL import Image

from ether_diffusion.adapters.adapter_bank import AdapterBank
from ether_diffusion.adapters.attach import sharing_copy
from ether_diffusion.adapters.bankable import bankable
from ether_diffusion.adapters.saved_adapter import SavedAdapter, read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.ether.bank import Layout
from ether_diffusion.generation.jobs import fault, sample_images
from ether_diffusion.generation.pipelines import load_pipeline
from ether_diffusion.models.bases import Base, check_resolution
from ether_diffusion.models.families.table import denoiser_of

from .catalogue import FolderCatalogue, Mark, ShelfCatalogue, base_id
from .image_requests import BaseFacts, Failure, Images, ImagesRequest, Pass, png, unknown_model, unusable_model
from .serve_settings import ServeSettings


@dataclass(eq=False)
class Lane:
    """The base's modules, with its own weights and a bank of one kind of adapters on them."""

    pipeline: DiffusionPipeline
    bank: AdapterBank | None = None
    held: OrderedDict[str, Mark] = field(default_factory=OrderedDict)
    """The folder's adapters in the bank, the one used last at the end."""


@dataclass(frozen=True)
class Sampled:
    """A request's images, to be encoded."""

    images: tuple[Image.Image, ...]
    passes: tuple[Pass, ...]


class Engine:
    """Generates the images of requests. An image is the one that `generate` makes with its adapter, to rounding.

    Adapters that differ in variant, layers, sides or blocks are in banks of their own, which share the base's weights.

    Args:
        catalogue: Where it finds the adapters. It may be shared with other threads.

    Raises:
        UserError: as `load_pipeline`; or the base does not generate images of the largest size of the settings.
    """

    def __init__(self, settings: ServeSettings, catalogue: FolderCatalogue | ShelfCatalogue) -> None:
        self.settings, self.catalogue = settings, catalogue
        pipeline, _ = load_pipeline(
            base_model=settings.base,
            revision=settings.revision,
            vae=settings.vae,
            device=settings.device,
            dtype=settings.dtype,
        )
        self._base = Base.of(settings.base, pipeline)
        if settings.limits.size is not None:
            check_resolution(settings.limits.size, self._base, "--max-size")
        self._plain = Lane(pipeline)
        self._lanes: dict[Any, Lane] = {}
        """By the kind of their adapters: a layout's shapes, or the mark of a shelf's file."""

    @property
    def facts(self) -> BaseFacts:
        multiple = self._base.vae_factor * self._base.family.latent_multiple(self._base.denoiser)
        return BaseFacts(base_id(self.settings.base), self._base.resolution, multiple, self._base.scheduler_config)

    def sample(self, requests: Sequence[ImagesRequest]) -> list[Sampled | Failure]:
        """The images of each request, or why it has none. Those of one group and kind of adapter share passes."""
        step = self.settings.capacity
        parts = [requests[start : start + step] for start in range(0, len(requests), step)]
        return [outcome for part in parts for outcome in self._sample(part)]

    def encode(self, outcome: Sampled | Failure) -> Images | Failure:
        """The images as PNG files. One that holds NaN makes its request fail."""
        if isinstance(outcome, Failure):
            return outcome
        if any(fault(image) == "nan" for image in outcome.images):
            return Failure(500, "an image holds NaN; the server needs another --dtype", "image_nan")
        return Images(tuple(map(png, outcome.images)), outcome.passes)

    def _sample(self, requests: Sequence[ImagesRequest]) -> list[Sampled | Failure]:
        outcomes: dict[int, Sampled | Failure] = {}
        lanes: dict[int, Lane | None] = {}
        together = {request.adapter for request in requests}
        for index, request in enumerate(requests):
            try:
                lanes[index] = self._lane_with(request.adapter, together)
            except _NoAdapter as missing:
                outcomes[index] = missing.failure
        for lane, indices in self._parts(requests, lanes):
            try:
                found: Sequence[Sampled | Failure] = self._pass([requests[index] for index in indices], lane)
            except Exception as error:  # other parts still have their images
                _print_error(error)
                found = [Failure(500, "the images could not be sampled", "sampling_failed")] * len(indices)
            outcomes |= dict(zip(indices, found, strict=True))
        return [outcomes[index] for index in range(len(requests))]

    def _parts(
        self, requests: Sequence[ImagesRequest], lanes: Mapping[int, Lane | None]
    ) -> Iterator[tuple[Lane, list[int]]]:
        """Indices of requests that share passes. Those for the base alone go with the first adapters of their group."""
        groups: dict[Any, list[int]] = {}
        for index in lanes:
            groups.setdefault(requests[index].group, []).append(index)
        for indices in groups.values():
            parts: dict[Lane, list[int]] = {lane: [] for index in indices if (lane := lanes[index]) is not None}
            parts = parts or {self._plain: []}
            for index in indices:
                parts[lanes[index] or next(iter(parts))].append(index)
            yield from parts.items()

    def _pass(self, requests: Sequence[ImagesRequest], lane: Lane) -> list[Sampled]:
        """The images of requests of one group, in passes of at most `batch_size`."""
        jobs = [(place, job) for place, request in enumerate(requests) for job in request.jobs()]
        images: list[list[Image.Image]] = [[] for _ in requests]
        passes: list[list[Pass]] = [[] for _ in requests]
        # Each pass starts from the base's own scheduler: what one request chose has no effect on the next one.
        scheduler = lane.pipeline.scheduler
        for start in range(0, len(jobs), self.settings.batch_size):
            part = jobs[start : start + self.settings.batch_size]
            began = time.perf_counter()
            try:
                sampled = sample_images(
                    lane.pipeline,
                    [job for _, job in part],
                    requests[0].sampling,
                    seed=0,
                    resolution=requests[0].size,
                    batch_size=len(part),
                    bank=lane.bank,
                )
                for (place, _), (_, image) in zip(part, sampled, strict=True):
                    images[place].append(image)
            finally:
                lane.pipeline.scheduler = scheduler
            passes[part[0][0]].append(Pass(len(part), time.perf_counter() - began))
        return [Sampled(tuple(own), tuple(counted)) for own, counted in zip(images, passes, strict=True)]

    def _lane_with(self, name: str | None, together: set[str | None]) -> Lane | None:
        """The lane whose bank holds an adapter, which is put there if it is not; None: for the base.

        Args:
            together: Adapters that stay in the bank.

        Raises:
            _NoAdapter: there is none of this name, or it cannot be used.
        """
        if name is None:
            return None
        mark = self.catalogue.mark(name)
        if mark is None:
            raise _NoAdapter(unknown_model(name))
        if isinstance(self.catalogue, ShelfCatalogue):
            return self._shelf_lane(self.catalogue)
        for lane in self._lanes.values():
            if lane.held.get(name) == mark:
                lane.held.move_to_end(name)
                return lane
        try:
            return self._loaded(name, mark, together)
        except UserError as error:
            self.catalogue.refuse(name, str(error))
            raise _NoAdapter(unusable_model(name)) from error

    def _loaded(self, name: str, mark: Mark, together: set[str | None]) -> Lane:
        """Read an adapter of the folder into the bank of its kind."""
        saved = read_adapter(self.settings.adapters / name)
        _, layout = bankable(saved)
        for other in self._lanes.values():  # the adapter of this name that it replaces
            if other.held.pop(name, None) is not None and other.bank is not None:
                other.bank.remove(name)
        lane = self._lane_of(layout, saved)
        assert lane.bank is not None
        if len(lane.held) >= lane.bank.capacity:
            oldest = next(other for other in lane.held if other not in together)
            lane.bank.remove(oldest)
            del lane.held[oldest]
        lane.bank.load(name, saved)
        lane.held[name] = mark
        return lane

    def _lane_of(self, layout: Layout, saved: SavedAdapter) -> Lane:
        """The lane of a kind of adapters. A new one only if the adapter fits the base."""
        kind = tuple(layout.shapes.items())
        if kind not in self._lanes:
            lane = self._new_lane()
            bank = AdapterBank(denoiser_of(lane.pipeline), self.settings.capacity)
            bank.load(_FIRST, saved)
            bank.remove(_FIRST)
            lane.bank = bank
            self._lanes[kind] = lane
        return self._lanes[kind]

    def _shelf_lane(self, catalogue: ShelfCatalogue) -> Lane:
        mark = catalogue.opened
        if mark not in self._lanes:
            lane = self._new_lane()
            lane.bank = AdapterBank.open(catalogue.shelf, denoiser_of(lane.pipeline), self.settings.capacity)
            self._lanes = {mark: lane}
        return self._lanes[mark]

    def _new_lane(self) -> Lane:
        return Lane(self._base.with_denoiser(sharing_copy(self._base.denoiser)).pipeline())


_FIRST = "."
"""No adapter of a folder has this name."""


class _NoAdapter(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def _print_error(error: Exception) -> None:
    if isinstance(error, UserError):
        print(f"ether-diffusion: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
