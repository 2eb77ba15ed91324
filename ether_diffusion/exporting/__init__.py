"""Adapters as files of other programs: LoRA files in closed form, or the whole model with the adapter merged."""

from .export import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
