"""Fine-tuning Stable Diffusion with ETHER and ETHER+ adapters. Importing the package registers ETHER with PEFT."""

from typing import TYPE_CHECKING, Any

from .quiet import quiet_imports
from .version import __version__

with quiet_imports():
    from .adapters.adapter_bank import AdapterBank
    from .adapters.loading import load_adapter
    from .adapters.saving import save_adapter
    from .ether import EtherConfig, EtherModel

if TYPE_CHECKING:
    from .exporting import export

__all__ = ["AdapterBank", "EtherConfig", "EtherModel", "__version__", "export", "load_adapter", "save_adapter"]


def __getattr__(name: str) -> Any:
    if name == "export":  # needs diffusers' pipelines, which take seconds to import
        from .exporting import export

        return export
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
