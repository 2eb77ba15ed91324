"""Fine-tuning Stable Diffusion with ETHER and ETHER+ adapters. Importing the package registers ETHER with PEFT."""

from .adapters.loading import load_adapter
from .adapters.saving import save_adapter
from .ether import EtherConfig, EtherModel
from .version import __version__

__all__ = ["EtherConfig", "EtherModel", "__version__", "load_adapter", "save_adapter"]
