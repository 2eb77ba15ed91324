"""What a server serves, and how much of it one request may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from ether_diffusion.config import Settings
from ether_diffusion.limits import Count, Side, Workers


class Limits(Settings):
    """What a server refuses to go beyond."""

    queue: Count = 256
    """Images that were accepted and not yet answered; further requests get 429."""
    images: Count = 10
    """Images of one request."""
    steps: Count = 100
    """Sampling steps."""
    size: Side | None = None
    """The longer side of an image in pixels; null: the base's own side."""
    body: Annotated[int, Field(ge=1024, le=1_000_000)] = 1_000_000
    """Bytes of a request's body."""
    seconds: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    """From the moment a request is accepted to its answer; then the client gets 408."""


class ServeSettings(Settings):
    """A server's base, adapters and batches."""

    base: str
    adapters: Path
    """A folder of run folders or PEFT folders, each served under its own name; or a shelf."""
    revision: str | None = None
    vae: str | None = None
    device: str | None = None
    dtype: str | None = None
    batch_size: Workers = 8
    """Most images of a pass."""
    batch_wait: Annotated[float, Field(ge=0, le=10)] = 0.01
    """Seconds for which the first request of an idle server waits for others."""
    capacity: Count = 64
    """Adapters in the device's memory; the one not used for longest makes room."""
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _check_capacity(self) -> ServeSettings:
        if self.capacity < self.batch_size:
            raise ValueError(
                f"capacity = {self.capacity} is below batch_size = {self.batch_size}; a batch may need as many adapters"
            )
        return self
