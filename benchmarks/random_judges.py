"""Write the judges of `s2i/csail-v1` with random weights, under their published names and in their published forms.

python benchmarks/random_judges.py /path/outside/the/repository/judges-random

They stand in where the real weights (CSAIL's UPerNet-101, torch-fidelity's Inception; 430 MB) cannot be had: everything
runs as with these, and the numbers mean nothing.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from ether_diffusion.metrics.csail_upernet import Decoder, Encoder
from ether_diffusion.metrics.segmenters import CSAIL_FILES

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


class Unloaded(FeatureExtractorInceptionV3):
    """Keeps the weights it was made with."""

    def load_state_dict(self, *_args: object, **_options: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def lively(network: nn.Module) -> nn.Module:
    """Weights under which activations neither vanish nor explode, so that outputs depend on the image."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and name.endswith("bn3") and "layer" in name:
            nn.init.constant_(module.weight, 0.3)  # what a block adds to its residual
    return network


def write_judges(folder: Path) -> list[Path]:
    """The files that are written; the same each time."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    empty = folder / ".empty.pth"
    torch.save({}, empty)  # torch-fidelity's class reads a file, whatever is in it
    networks = {
        CSAIL_FILES["encoder"]: Encoder(),
        CSAIL_FILES["decoder"]: Decoder(),
        INCEPTION_FILE: Unloaded("random", ["2048"], str(empty)).requires_grad_(False),
    }
    for name, network in networks.items():
        torch.save(lively(network).state_dict(), folder / name)
    empty.unlink()
    return [folder / name for name in networks]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random judges in their published forms.")
    parser.add_argument("folder", type=Path)
    for file in write_judges(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
