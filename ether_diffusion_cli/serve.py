"""`ether-diffusion serve`: many adapters on one base over HTTP, as the OpenAI images interface."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from .arguments import Commands, add_device, add_dtype, amount, count, port, positive

if TYPE_CHECKING:
    from ether_diffusion.serving import ServeSettings

KEY = "ETHER_DIFFUSION_API_KEY"
"""The variable of the environment that holds the key."""
LOOPBACK = ("127.", "::1", "localhost")


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "serve",
        run,
        "serve images with many adapters over HTTP",
        "Serve images with many ETHER and ETHER+ adapters on one base, in batches across the adapters: POST "
        "/v1/images/generations as in OpenAI's interface, GET /v1/models, /health and /metrics. Adapters appear and "
        f"vanish with the folder. With {KEY} in the environment clients need that key. In one process, or with "
        "--replicas on Ray Serve. No safety checker runs. Ctrl-C stops it once running requests are answered.",
    )
    add = parser.add_argument
    add("--base", required=True, metavar="NAME", help="a hub name, a folder, a single file, or tiny")
    add(
        "--adapters",
        required=True,
        metavar="DIR|SHELF",
        help="a folder of run folders, each served under its own name, or a shelf",
    )
    add("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine alone")
    add("--port", type=port, default=8000, metavar="P", help="default: 8000; 0: any free one")
    add("--revision", metavar="NAME", help="branch, tag or commit of the base on the hub")
    add("--vae", metavar="NAME", help="another VAE than the base's own")
    add_device(parser)
    add_dtype(parser)
    add("--batch-size", type=positive, default=8, metavar="N", help="most images of a pass (default: 8)")
    add(
        "--batch-wait",
        type=amount,
        default=0.01,
        metavar="SECONDS",
        help="how long the first request of an idle server waits for others (default: 0.01)",
    )
    add(
        "--capacity",
        type=positive,
        default=64,
        metavar="N",
        help="adapters in the device's memory at a time (default: 64)",
    )
    _add_limits(parser)
    ray = parser.add_argument_group("on Ray Serve", "For several devices and machines (pip install 'ray[serve]').")
    ray.add_argument("--replicas", type=count, metavar="N", help="processes with a base each, one a GPU")
    ray.add_argument(
        "--ray-address", metavar="A", help="of a running cluster; auto: this machine's (default: Ray is started here)"
    )


def _add_limits(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("limits", "What lies beyond is answered with an error.")
    add = group.add_argument
    add("--max-queue", type=positive, default=256, metavar="N", help="images that wait (default: 256), else 429")
    add("--max-images", type=positive, default=10, metavar="N", help="images of a request (default: 10)")
    add("--max-steps", type=positive, default=100, metavar="N", help="sampling steps (default: 100)")
    add("--max-size", type=positive, metavar="PIXELS", help="longer side of an image (default: the base's own)")
    add("--max-body", type=positive, default=1_000_000, metavar="BYTES", help="of a request's body (default: 1 MB)")
    add("--max-seconds", type=amount, default=300.0, metavar="S", help="from a request to its answer (default: 300)")


def run(arguments: Namespace) -> None:
    """Serve until a signal stops it.

    Raises:
        UserError: as the hosts; a setting out of range; or a package is missing.
    """
    key = _key()
    settings = _settings(arguments)
    _check_packages()
    if not arguments.host.startswith(LOOPBACK):
        needs = "" if key else f", without a key; set {KEY} to require one"
        _say(f"--host {arguments.host}: other machines can reach this server{needs}.")
    where = settings, arguments.host, arguments.port, key

    def announce(host: str, port: int) -> None:
        name = f"[{host}]" if ":" in host else host
        print(
            f"Serving {settings.base} and {settings.adapters} at http://{name}:{port}/v1; Ctrl-C stops it.", flush=True
        )

    if arguments.replicas is None and arguments.ray_address is None:
        from ether_diffusion.serving.uvicorn_host import serve_here

        serve_here(*where, announce)
    else:
        from ether_diffusion.serving.ray_host import serve_on_ray

        serve_on_ray(*where, announce, replicas=arguments.replicas or 1, address=arguments.ray_address)
    print("Stopped.")


def _settings(arguments: Namespace) -> ServeSettings:
    from pathlib import Path

    import pydantic

    from ether_diffusion.errors import UserError
    from ether_diffusion.serving import Limits, ServeSettings

    given = {name: getattr(arguments, name) for name in ServeSettings.model_fields if hasattr(arguments, name)}
    limits = {name: getattr(arguments, f"max_{name}") for name in Limits.model_fields}
    try:
        return ServeSettings(**{**given, "adapters": Path(arguments.adapters)}, limits=Limits(**limits))
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        prefix = "--max-" if fault["loc"] and fault["loc"][-1] in Limits.model_fields else "--"
        flag = "".join(f"{prefix}{str(name).replace('_', '-')} {fault['input']}: " for name in fault["loc"][-1:])
        raise UserError(f"serve: {flag}{fault['msg'].removeprefix('Value error, ')}.") from error


def _key() -> bytes | None:
    """What clients must send, in the form in which it is kept; None: nothing."""
    import os

    from ether_diffusion.errors import UserError
    from ether_diffusion.serving.application import key_digest

    key = os.environ.get(KEY)
    if key is None:
        return None
    if not key.strip() or not key.isascii() or not key.isprintable():
        raise UserError(f"{KEY}: expected printable ASCII characters; unset it to serve without a key.")
    return key_digest(key.strip())


def _check_packages() -> None:
    from importlib.util import find_spec

    from ether_diffusion.errors import UserError

    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if find_spec(name) is None]
    if missing:
        names = " ".join(missing).replace("_", "-")
        raise UserError(f"serve needs a package that is not installed: pip install {names} (or the extra `serving`).")


def _say(line: str) -> None:
    print(f"ether-diffusion: {line}", file=sys.stderr, flush=True)
