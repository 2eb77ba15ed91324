"""The web application, the same in every host: routes, keys and limits over whatever generates the images."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

from ether_diffusion.files import Digest, digest_of

from .catalogue import FolderCatalogue, ShelfCatalogue
from .image_requests import UNUSABLE, BaseFacts, Failure, Images, ImagesRequest, unknown_model
from .images_api import ApiError, answer, read_body, to_request
from .serve_settings import ServeSettings
from .server_metrics import ServerMetrics
from .shared_jobs import KeyReused, SharedJob, SharedJobs

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

BODY_SECONDS = 30.0
"""In which a client has to send its body."""
DISCARDED = 16
"""A body that is too large is read to its end, at most so many times the limit, because a client that is still sending
may not see the answer."""
LONGEST_KEY = 255
GONE = 499
"""The status, in the metrics, of a request whose client left."""


class Backend(Protocol):
    """What generates the images: an engine here, or replicas elsewhere."""

    async def facts(self) -> BaseFacts: ...

    async def is_ready(self) -> bool: ...

    async def generate(self, request: ImagesRequest) -> Images | Failure: ...


class Service:
    """What the routes do.

    Args:
        key: What clients must send as `Authorization: Bearer …`, as `key_digest` returns it; None: nothing.
    """

    def __init__(
        self,
        backend: Backend,
        settings: ServeSettings,
        catalogue: FolderCatalogue | ShelfCatalogue,
        key: bytes | None = None,
    ) -> None:
        self._backend, self._limits, self._catalogue, self._key = backend, settings.limits, catalogue, key
        self._facts: BaseFacts | None = None
        self._jobs = SharedJobs(backend.generate)
        self._metrics = ServerMetrics(lambda: self._jobs.images)
        self._started = int(time.time())
        self._is_stopping = False

    async def drain(self) -> None:
        """Refuse further requests for images, and return when those that were accepted are answered."""
        self._is_stopping = True
        while self._jobs.images:
            await asyncio.sleep(0.05)

    async def generate(self, request: Request) -> Response:
        """`POST /v1/images/generations`."""
        from fastapi.responses import JSONResponse, Response

        began, status = time.perf_counter(), 500
        try:
            job, model = await self._job(request)
            left = self._limits.seconds - (time.perf_counter() - began)
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                has_ended = await self._jobs.wait(job, gone, left)
            finally:
                gone.cancel()
            if not has_ended and gone.done() and not gone.cancelled():
                status = GONE
                return Response(status_code=GONE)
            if not has_ended:
                raise ApiError(408, f"no image within {self._limits.seconds:g} s", "timeout", retry_after=1)
            images = self._result(job)
            status = 200
            return JSONResponse(answer(job.request, images, model))
        except ApiError as error:
            status = error.status
            raise
        finally:
            self._metrics.count_request(status, time.perf_counter() - began)

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: the base, and every adapter that is there."""
        from fastapi.responses import JSONResponse

        self._check_key(request)
        base = (await self._base()).name
        made = await asyncio.to_thread(self._catalogue.list)
        models = {base: self._started, **{name: time for name, time in made.items() if name != base}}
        return JSONResponse({"object": "list", "data": [_model(name, time) for name, time in models.items()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/NAME`."""
        from fastapi.responses import JSONResponse

        self._check_key(request)
        name = request.path_params["name"]
        adapter = await self._adapter(name)
        mark = None if adapter is None else self._catalogue.mark(adapter)
        return JSONResponse(_model(name, self._started if mark is None else mark[-1] // 10**9))

    async def health(self, request: Request) -> Response:
        """`GET /health`: 200 while requests are answered, else 503."""
        from fastapi.responses import JSONResponse

        is_ready = not self._is_stopping and await self._backend.is_ready()
        return JSONResponse({"status": "ok" if is_ready else "unavailable"}, 200 if is_ready else 503)

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`, for Prometheus."""
        from fastapi.responses import Response

        content, kind = self._metrics.page()
        return Response(content, media_type=kind)

    async def _job(self, request: Request) -> tuple[SharedJob, str]:
        """The job that gives a request its images, started or joined; and the name of its model.

        Raises:
            ApiError: the request is refused.
        """
        self._check_key(request)
        if self._is_stopping:
            raise ApiError(503, "the server is stopping", "stopping", retry_after=5)
        body = read_body(await self._read(request))
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= LONGEST_KEY:
            raise ApiError(400, f"Idempotency-Key: expected 1 to {LONGEST_KEY} characters", "invalid_value")
        is_retry = request.headers.get("x-stainless-retry-count", "0") not in ("", "0")
        facts = await self._base()
        adapter = await self._adapter(facts.name if body.model is None else body.model)
        wanted = to_request(body, facts, self._limits, adapter=adapter, key=key)
        # A retry with a key may find its job although the adapter has changed since.
        digest = body.digest if key else digest_of(body.digest, repr(adapter and self._catalogue.mark(adapter)))
        try:
            # From here to the start of the job nothing else runs: two equal requests cannot both start one.
            job = self._jobs.find(digest, key, joins=body.seed is not None or is_retry)
        except KeyReused:
            message = "Idempotency-Key: this key was sent with another request"
            raise ApiError(422, message, "idempotency_key_reused") from None
        if job is None:
            self._check_queue(wanted)
            job = self._jobs.start(wanted, digest, key)
            job.task.add_done_callback(self._count)
        return job, facts.name if adapter is None else adapter

    def _result(self, job: SharedJob) -> Images:
        """A job's images. Raises ApiError: it failed."""
        if job.task.cancelled():
            raise ApiError(503, "the server is stopping", "stopping", retry_after=5)
        error = job.task.exception()
        if error is not None:
            traceback.print_exception(error)
            raise ApiError(500, "the server failed", "internal_error")
        outcome = job.task.result()
        if isinstance(outcome, Failure):
            adapter = job.request.adapter
            if outcome.code == UNUSABLE and adapter is not None and isinstance(self._catalogue, FolderCatalogue):
                self._catalogue.refuse(adapter, outcome.message)
            raise ApiError.of(outcome)
        return outcome

    def _count(self, task: asyncio.Task[Images | Failure]) -> None:
        if not task.cancelled() and task.exception() is None and isinstance(images := task.result(), Images):
            self._metrics.count_images(images)

    async def _base(self) -> BaseFacts:
        if self._facts is None:
            self._facts = await self._backend.facts()
        return self._facts

    async def _adapter(self, model: str) -> str | None:
        """The adapter that a model is; None: the base. Raises ApiError: there is no such model."""
        if model == (await self._base()).name:
            return None
        if self._catalogue.mark(model) is None:
            raise ApiError.of(unknown_model(model))
        return model

    def _check_key(self, request: Request) -> None:
        """Raises ApiError: the request does not carry the key. The time it takes says nothing about the key."""
        if self._key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        matches = secrets.compare_digest(key_digest(token.strip()), self._key)
        if scheme.lower() != "bearer" or not matches:
            raise ApiError(401, "expected the server's key as Authorization: Bearer KEY", "invalid_api_key")

    def _check_queue(self, wanted: ImagesRequest) -> None:
        """Raises ApiError: too many images were accepted already; with the time after which there may be room."""
        if self._jobs.images and self._jobs.images + wanted.num_images > self._limits.queue:
            seconds = min(60, max(1, math.ceil(self._jobs.images * self._metrics.seconds_per_image / 2)))
            message = f"{self._jobs.images} images wait already, of at most {self._limits.queue}"
            raise ApiError(429, message, "queue_full", retry_after=seconds)

    async def _read(self, request: Request) -> bytes:
        """The body of a request. Raises ApiError: it is too large, or does not come."""
        limit = self._limits.body
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size <= limit:
                        body += part
                    if size > DISCARDED * limit:
                        break
        except TimeoutError:
            raise ApiError(408, f"no whole body within {BODY_SECONDS:g} s", "timeout") from None
        if size > limit:
            raise ApiError(413, f"a body of more than {limit:,} bytes", "body_too_large")
        return bytes(body)


def key_digest(key: str) -> bytes:
    """A key in the form in which it is kept and compared."""
    return Digest().update(key).bytes()


def build_application(
    service: Service, running: Callable[[], AbstractAsyncContextManager[Any]] | None = None
) -> FastAPI:
    """The application.

    Args:
        running: What has to be entered while it runs.
    """
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if running is None:
            yield
            return
        async with running():
            yield

    async def no_route(request: Request, error: Any) -> Response:
        what = f"{request.method} {request.url.path[:200]}"
        code = "unknown_url" if error.status_code == 404 else "method_not_supported"
        return _shown(ApiError(error.status_code, f"{what}: {error.detail}", code), error.headers)

    async def any_error(_: Request, error: Exception) -> Response:
        return _shown(ApiError(500, "the server failed", "internal_error"))

    handlers: dict[Any, Any] = {404: no_route, 405: no_route, Exception: any_error}
    application = FastAPI(
        exception_handlers=handlers, lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None
    )
    application.add_route("/v1/images/generations", _named(service.generate), methods=["POST"])
    application.add_route("/v1/models", _named(service.models))
    application.add_route("/v1/models/{name:path}", _named(service.model))
    application.add_route("/health", service.health)
    application.add_route("/metrics", service.metrics)
    application.state.service = service
    return application


def _named(answer_to: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """The same, with errors in OpenAI's shape, and a number in each answer, which its client shows as `request_id`."""

    async def named(request: Request) -> Response:
        try:
            response = await answer_to(request)
        except ApiError as error:
            response = _shown(error)
        response.headers["x-request-id"] = f"req_{uuid.uuid4().hex}"
        return response

    return named


def _shown(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    from fastapi.responses import JSONResponse

    return JSONResponse(error.content, error.status, {**error.headers, **(headers or {})})


async def _disconnected(request: Request) -> None:
    """Returns when the client has left. To be called after its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _model(name: str, made: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": made, "owned_by": "ether_diffusion"}
