"""What a server counts, for Prometheus. No label holds a prompt, a key, a seed or an adapter's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .image_requests import Images

_PREFIX = "ether_diffusion_"
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counters in a registry of their own.

    Args:
        waiting: Images that were accepted and are not finished.
    """

    def __init__(self, waiting: Callable[[], float]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry = CollectorRegistry()
        options: Any = {"registry": self._registry}
        self._requests = Counter(f"{_PREFIX}requests", "Requests for images, by HTTP status", ["status"], **options)
        self._seconds = Histogram(
            f"{_PREFIX}request_seconds", "From a request's arrival to its answer", buckets=_SECONDS, **options
        )
        self._images = Counter(f"{_PREFIX}images", "Images sent", **options)
        self._pass_images = Histogram(f"{_PREFIX}pass_images", "Images that share a pass", buckets=_SIZES, **options)
        self._pass_seconds = Histogram(f"{_PREFIX}pass_seconds", "Sampling of a pass", buckets=_SECONDS, **options)
        Gauge(f"{_PREFIX}waiting_images", "Images accepted and not finished", **options).set_function(waiting)
        self.seconds_per_image = 1.0
        """A moving average."""

    def count_request(self, status: int, seconds: float) -> None:
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)

    def count_images(self, images: Images) -> None:
        """What a finished job sampled."""
        self._images.inc(len(images.files))
        for one in images.passes:
            self._pass_images.observe(one.images)
            self._pass_seconds.observe(one.seconds)
            self.seconds_per_image += 0.1 * (one.seconds / one.images - self.seconds_per_image)

    def page(self) -> tuple[bytes, str]:
        """The page of metrics, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
