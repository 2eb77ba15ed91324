"""The host on several devices and machines: Ray Serve. One replica has the application, the others have an engine each.

The application's replica alone has the jobs, so that a retry finds its own whichever engine has it, and the metrics of
all engines. Engines are of one kind; Ray sends a request to the one that has fewer.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from packaging.version import Version

from ether_diffusion.errors import UserError
from ether_diffusion.limits import Workers

from .application import Service, build_application
from .catalogue import open_catalogue
from .engine import Engine
from .engine_queue import EngineQueue
from .image_requests import BaseFacts, Failure, Images, ImagesRequest
from .serve_settings import ServeSettings
from .uvicorn_host import bound

APPLICATION, ENGINES, FRONT = "ether_diffusion", "engines", "application"
OBJECT_STORE = 100 * 2**20
"""Bytes. What replicas exchange is smaller than what Ray puts there."""
OLDEST = "2.53"
QUIET = {"log_level": "WARNING"}
TOGETHER = 16
"""Batches of an engine that wait for its torch or run."""
STOPPING = 20.0
"""Seconds that Ray gives replicas to stop after all requests are answered."""
PORTS = (
    "Ray listens on ports of its own, on all interfaces of this machine, whatever --host is. Close them with a "
    "firewall (docs/serving.md): who is let in there can run code here."
)


class ReplicaEngine:
    """What an engine's replica does. `deployments` makes it a deployment, with `serve.batch` around `answers`."""

    def __init__(self, settings: ServeSettings, threads: int | None) -> None:
        import torch

        from ether_diffusion.quiet import quiet_dependencies

        quiet_dependencies()
        if threads is not None:
            torch.set_num_threads(threads)
        self._queue = EngineQueue(Engine(settings, open_catalogue(settings)))

    async def facts(self) -> BaseFacts:
        return await self._queue.facts()

    async def answers(self, requests: Sequence[ImagesRequest]) -> list[Images | Failure]:
        """The images of a batch.

        Ray forms a batch of what arrives within the wait, also while torch is busy. In the queue batches meet, so that
        the next pass is as full as it can be, and holds one group.
        """
        return list(await asyncio.gather(*map(self._queue.generate, requests)))


class RayEngines:
    """The engines' replicas, as the application's backend."""

    def __init__(self) -> None:
        from ray import serve

        self._handle: Any = serve.get_deployment_handle(ENGINES, APPLICATION)

    async def facts(self) -> BaseFacts:
        return await self._handle.facts.remote()

    async def is_ready(self) -> bool:
        from ray import serve

        status = await asyncio.to_thread(serve.status)
        application = status.applications.get(APPLICATION)
        states: Any = application.deployments[ENGINES].replica_states if application else {}
        return states.get("RUNNING", 0) > 0

    async def generate(self, request: ImagesRequest) -> Images | Failure:
        import ray.exceptions

        try:
            return await self._handle.generate.remote(request)
        except ray.exceptions.RayError as error:  # its process is gone; Ray starts another one
            print(f"ether-diffusion: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
            return Failure(503, "the process that had this request is gone", "replica_lost")


def deployments(settings: ServeSettings, replicas: int, key: bytes | None, threads: int | None, has_gpus: bool) -> Any:
    """The Ray Serve application."""
    from ray import serve as ray_serve

    serve: Any = ray_serve

    def build() -> Any:
        return build_application(Service(RayEngines(), settings, open_catalogue(settings), key))

    def images_of(requests: Sequence[ImagesRequest]) -> int:
        return sum(request.num_images for request in requests)

    most = max(settings.batch_size, settings.limits.images)

    class Engines(ReplicaEngine):
        @serve.batch(
            max_batch_size=most,
            batch_wait_timeout_s=settings.batch_wait,
            batch_size_fn=images_of,
            max_concurrent_batches=TOGETHER,
        )
        async def generate(self, requests: list[ImagesRequest]) -> list[Images | Failure]:
            return await self.answers(requests)

    class Front:
        def __init__(self, engines: Any) -> None:
            pass

        async def drain(self) -> None:
            await self.app.state.service.drain()  # type: ignore[attr-defined]

    engines = serve.deployment(Engines, name=ENGINES).options(
        num_replicas=replicas,
        max_ongoing_requests=TOGETHER * most,
        graceful_shutdown_timeout_s=STOPPING,
        ray_actor_options={"num_gpus": 1} if has_gpus else {"num_cpus": 1},
    )
    front = serve.deployment(serve.ingress(build)(Front), name=FRONT).options(
        num_replicas=1,
        max_ongoing_requests=10 * settings.limits.queue,  # the application refuses what is too much, in OpenAI's shape
        graceful_shutdown_timeout_s=STOPPING,
        ray_actor_options={"num_cpus": 0},
    )
    return front.bind(engines.bind(settings, threads))


def serve_on_ray(
    settings: ServeSettings,
    host: str,
    port: int,
    key: bytes | None,
    announce: Any,
    *,
    replicas: Workers = 1,
    address: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM; requests that were accepted are answered first.

    Args:
        address: Of a running cluster, as for `ray.init`; None: RAY_ADDRESS, or Ray is started on this machine, and
            stopped at the end.

    Raises:
        UserError: Ray is not installed or cannot be reached; or as `serve_here`.
    """
    ray, serve = _import_ray()
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        with bound(host, port) as free:
            port = free.getsockname()[1]
    settings = settings.model_copy(update={"adapters": settings.adapters.absolute()})
    open_catalogue(settings)
    print(f"ether-diffusion: {PORTS}", file=sys.stderr, flush=True)
    _start(ray, replicas, address)
    stop = threading.Event()
    # Once Ray has started: it sets handlers of its own, which abort the process.
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        has_gpus = settings.device in (None, "cuda") and ray.cluster_resources().get("GPU", 0) >= 1
        threads = None if has_gpus else max(1, (os.cpu_count() or 1) // replicas)
        # A request waits longest in the application, whose own limit comes first.
        options = {"host": host, "port": port, "request_timeout_s": settings.limits.seconds + 30}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(http_options=options, logging_config=QUIET)
        application = deployments(settings, replicas, key, threads, has_gpus)
        handle = serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)
        announce(host, port)
        stop.wait()
        handle.drain.remote().result(timeout_s=settings.limits.seconds)
    finally:
        _stop(ray, serve, is_ours=address is None)
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(ray: Any, replicas: int, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options: dict[str, Any] = {"address": address or "local", "logging_level": "warning"}
    if address is None:
        cores = max(os.cpu_count() or 1, replicas)
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        ray.init(**options)
    except Exception as error:  # on a machine too busy to start in time Ray raises no class of its own
        raise UserError(f"serve: Ray: {' '.join(str(error).split())}") from error


def _stop(ray: Any, serve: Any, *, is_ours: bool) -> None:
    """Take the application down: its replicas answer what they have; `serve.shutdown` alone would cut that off."""
    try:
        serve.delete(APPLICATION)
        if is_ours or not serve.status().applications:
            serve.shutdown()
    finally:
        ray.shutdown()


def _import_ray() -> tuple[Any, Any]:
    try:
        import ray
        from ray import serve
    except ImportError:
        raise UserError("serve --replicas: Ray Serve is not installed: pip install 'ray[serve]'") from None
    if Version(ray.__version__) < Version(OLDEST):  # whose `serve.batch` cannot count images
        raise UserError(f"serve --replicas: Ray is {ray.__version__}; expected {OLDEST} or newer.")
    return ray, serve
