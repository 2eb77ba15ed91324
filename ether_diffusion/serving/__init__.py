"""A server of many adapters on one base: an engine, one web application, two hosts for it (extra `serving`)."""

from .engine import Engine
from .serve_settings import Limits, ServeSettings

__all__ = ["Engine", "Limits", "ServeSettings"]
