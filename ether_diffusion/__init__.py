"""Fine-tuning Stable Diffusion with ETHER and ETHER+ adapters. Importing the package registers ETHER with PEFT."""

from importlib.metadata import PackageNotFoundError, version

from .ether import EtherConfig, EtherModel

try:
    __version__ = version("ether-diffusion")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["EtherConfig", "EtherModel", "__version__"]
