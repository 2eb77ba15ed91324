"""The host in one process: uvicorn, and an engine in a thread."""

from __future__ import annotations

import signal
import socket
from typing import Any

from ether_diffusion.errors import UserError

from .application import Service, build_application
from .catalogue import open_catalogue
from .engine import Engine
from .engine_queue import EngineQueue
from .serve_settings import ServeSettings


def serve_here(settings: ServeSettings, host: str, port: int, key: bytes | None, announce: Any) -> None:
    """Serve until SIGINT or SIGTERM; requests that were accepted are answered first.

    Args:
        port: 0: any free one.
        announce: Called with the address once requests are answered.

    Raises:
        UserError: as `Engine` and `open_catalogue`; or the address cannot be listened on.
    """
    import uvicorn

    with bound(host, port) as listening:  # before the base is loaded, which takes longer
        catalogue = open_catalogue(settings)
        queue = EngineQueue(Engine(settings, catalogue))
        application = build_application(Service(queue, settings, catalogue, key), queue.closing)
        config = uvicorn.Config(
            application,
            http="h11",  # which limits the size of headers
            loop="asyncio",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.limits.seconds) + 1,
        )
        server = uvicorn.Server(config)
        # uvicorn handles both signals, and sends itself those that it got once more when it is done.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        listening.listen(2048)  # from here on clients wait for the answer
        announce(*listening.getsockname()[:2])
        server.run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address. Raises UserError: that is impossible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: cannot listen there: {reason}") from None
    listening.set_inheritable(True)
    return listening
