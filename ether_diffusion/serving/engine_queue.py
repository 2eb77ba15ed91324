"""Requests wait in a queue and share passes of one engine, whose torch code runs in a thread beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .engine import Engine, Sampled
from .image_requests import BaseFacts, Failure, Images, ImagesRequest


@dataclass
class _Waiting:
    request: ImagesRequest
    since: float
    answer: asyncio.Future[Images | Failure]


class EngineQueue:
    """An engine for an event loop.

    The request that has waited for longest determines the next pass; others of its group join in their order, up to
    `batch_size` images. One that is cancelled before its pass leaves the queue.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._settings = engine, engine.settings
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._torch = ThreadPoolExecutor(1, "torch")
        self._answering: set[asyncio.Task[None]] = set()
        self._running: asyncio.Task[None] | None = None

    async def facts(self) -> BaseFacts:
        return self._engine.facts

    async def is_ready(self) -> bool:
        return self._running is None or not self._running.done()

    async def generate(self, request: ImagesRequest) -> Images | Failure:
        """The images of a request, once its pass is done."""
        loop = asyncio.get_running_loop()
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        waiting = _Waiting(request, loop.time(), loop.create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.answer

    @contextlib.asynccontextmanager
    async def closing(self) -> AsyncIterator[None]:
        """At the end of the block the pass that is running is waited for, and no other begins."""
        try:
            yield
        finally:
            if self._running is not None:
                self._running.cancel()
                await asyncio.gather(self._running, *self._answering, return_exceptions=True)
            await asyncio.to_thread(self._torch.shutdown)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._next()
            batch = self._take()
            if not batch:
                continue
            requests = [waiting.request for waiting in batch]
            try:
                outcomes: Sequence[Sampled | Failure] = await loop.run_in_executor(
                    self._torch, self._engine.sample, requests
                )
            except Exception:  # a fault of the server's own, which the next batch may not have
                outcomes = [Failure(500, "the server failed", "internal_error")] * len(batch)
            # While these are encoded and sent, the next pass begins.
            task = asyncio.create_task(self._answer(batch, outcomes))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)

    async def _next(self) -> None:
        """Wait for a request; and then for others, until a pass is full or the first one has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            while self._waiting and self._waiting[0].answer.done():
                self._waiting.popleft()
            first = self._waiting[0] if self._waiting else None
            left = None if first is None else first.since + self._settings.batch_wait - loop.time()
            if left is not None and (left <= 0 or self._images_of(first) >= self._settings.batch_size):
                return
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _images_of(self, first: _Waiting | None) -> int:
        """Images that may share the first request's pass."""
        return sum(
            waiting.request.num_images
            for waiting in self._waiting
            if first is not None and waiting.request.group == first.request.group
        )

    def _take(self) -> list[_Waiting]:
        """The requests of the next pass, taken from the queue."""
        batch: list[_Waiting] = []
        others: deque[_Waiting] = deque()
        images, is_full = 0, False
        for waiting in self._waiting:
            if waiting.answer.done():
                continue
            alike = not batch or waiting.request.group == batch[0].request.group
            fits = not batch or images + waiting.request.num_images <= self._settings.batch_size
            if alike and fits and not is_full:
                batch.append(waiting)
                images += waiting.request.num_images
            else:
                is_full |= alike  # those behind it do not overtake it
                others.append(waiting)
        self._waiting = others
        return batch

    async def _answer(self, batch: list[_Waiting], outcomes: Sequence[Sampled | Failure]) -> None:
        for waiting, outcome in zip(batch, outcomes, strict=True):
            answer = await asyncio.to_thread(self._engine.encode, outcome)
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
