"""A request for images as the engine takes it, and what it returns: plain values, which can be sent to a process."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ether_diffusion.generation.requests_file import Request
from ether_diffusion.generation.sampling import Sampling
from ether_diffusion.limits import Side


class ImagesRequest(Request):
    """A row of `generate --requests` together with what that command takes for all rows."""

    size: tuple[Side, Side]
    """Width and height in pixels."""
    sampling: Sampling = Sampling()
    """Requests of equal size and sampling share passes; the negative prompt is each request's own."""

    @property
    def group(self) -> tuple[Any, ...]:
        """What is equal in all requests of a pass."""
        return self.size, self.sampling


@dataclass(frozen=True)
class BaseFacts:
    """What a server's base determines about requests."""

    name: str
    resolution: int
    """The side in pixels of the images that it was trained on."""
    multiple: int
    """Sides of images are multiples of this number of pixels."""
    scheduler: dict[str, Any]
    """Its scheduler's config."""


@dataclass(frozen=True)
class Pass:
    """A batch that was sampled."""

    images: int
    seconds: float


@dataclass(frozen=True)
class Images:
    """The images of a request, as PNG files."""

    files: tuple[bytes, ...]
    passes: tuple[Pass, ...] = ()
    """Those that were counted for this request: each pass for one of the requests that shared it."""


UNKNOWN_MODEL, UNUSABLE = "model_not_found", "model_unusable"
"""Codes of failures that the application looks at."""


@dataclass(frozen=True)
class Failure:
    """Why a request has no images, for its client."""

    status: int
    """Of HTTP."""
    message: str
    code: str
    param: str | None = None


def unknown_model(name: str) -> Failure:
    """The answer to a request for a model that is not there."""
    return Failure(404, f"the model {name!r:.220} does not exist; GET /v1/models lists all", UNKNOWN_MODEL, "model")


def unusable_model(name: str) -> Failure:
    """The answer to a request for an adapter that is there and cannot be loaded; the reason names paths."""
    return Failure(
        404, f"the adapter {name!r:.220} cannot be loaded; the server's log has the reason", UNUSABLE, "model"
    )


def png(image: Image.Image) -> bytes:
    """An image as a PNG file, without its settings, which hold the prompt."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
