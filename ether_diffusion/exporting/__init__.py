"""Adapters as files of other programs: LoRA files in closed form, or the whole model with the adapter merged."""

from .export_run import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
