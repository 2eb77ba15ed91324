"""Retries: requests that ask for the same images while these are sampled wait for one job, which runs once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .image_requests import Failure, Images, ImagesRequest

GRACE = 15.0
"""Seconds for which a job goes on whose client has left: the `openai` client retries after at most 8."""
KEPT_SECONDS, KEPT_BYTES = 60.0, 64 * 2**20
"""How long, and how much, finished jobs are kept for a retry with their client's key."""


class KeyReused(Exception):
    """A key came with another request than before."""


@dataclass(eq=False)
class SharedJob:
    """A request that is being answered."""

    request: ImagesRequest
    body: str
    """The digest of what the client sent."""
    task: asyncio.Task[Images | Failure]
    waiting: int = 0
    """Clients that wait for it."""


class SharedJobs:
    """Jobs by what their clients identify them with.

    A key of the client's (`Idempotency-Key`) stands for one request: with it a retry finds its job while it runs, and
    for a minute its images. Without a key, equal requests that state a seed share a job while it runs; of those without
    a seed only a retry, which the `openai` client marks, joins the job of an equal one.
    """

    def __init__(self, generate: Callable[[ImagesRequest], Awaitable[Images | Failure]]) -> None:
        self._generate = generate
        self._running: dict[tuple[str, str], SharedJob] = {}
        self._finished: OrderedDict[tuple[str, str], tuple[float, SharedJob]] = OrderedDict()
        self.images = 0
        """Of all jobs that are not finished."""

    def find(self, body: str, key: str | None, *, joins: bool) -> SharedJob | None:
        """The job that a request joins.

        Args:
            joins: Without a key: whether an equal request's job will do.

        Raises:
            KeyReused: the key belongs to another request.
        """
        self._forget()
        if key is None:
            return self._running.get(("body", body)) if joins else None
        place = ("key", key)
        job = self._running.get(place) or self._finished.get(place, (0.0, None))[1]
        if job is not None and job.body != body:
            raise KeyReused
        return job

    def start(self, request: ImagesRequest, body: str, key: str | None) -> SharedJob:
        """A new job."""
        job = SharedJob(request, body, asyncio.ensure_future(self._generate(request)))
        place = ("body", body) if key is None else ("key", key)
        self._running[place] = job
        self.images += request.num_images
        job.task.add_done_callback(lambda task: self._finish(place, job))
        return job

    async def wait(self, job: SharedJob, until: asyncio.Future[None], seconds: float) -> bool:
        """Wait for a job's end, or for `until`, at most so long. Whether it has ended."""
        job.waiting += 1
        try:
            await asyncio.wait({job.task, until}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            job.waiting -= 1
            if job.waiting == 0 and not job.task.done():
                asyncio.get_running_loop().call_later(GRACE, self._abandon, job)
        return job.task.done()

    def _abandon(self, job: SharedJob) -> None:
        if job.waiting == 0:
            job.task.cancel()

    def _finish(self, place: tuple[str, str], job: SharedJob) -> None:
        self.images -= job.request.num_images
        if self._running.get(place) is job:
            del self._running[place]
        has_result = not job.task.cancelled() and job.task.exception() is None
        if place[0] == "key" and has_result and isinstance(job.task.result(), Images):
            self._finished[place] = (time.monotonic(), job)
            self._forget()

    def _forget(self) -> None:
        """Drop finished jobs, the oldest first, that are too old or too many."""
        size = sum(_size(job) for _, job in self._finished.values())
        for place, (ended, job) in list(self._finished.items()):
            if time.monotonic() - ended < KEPT_SECONDS and size <= KEPT_BYTES:
                return
            size -= _size(job)
            del self._finished[place]


def _size(job: SharedJob) -> int:
    images = job.task.result()
    return sum(map(len, images.files)) if isinstance(images, Images) else 0
