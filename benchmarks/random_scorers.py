"""Write the scorers of `s2i/csail-v1` with random weights, as files of the published names, keys and shapes.

python benchmarks/random_scorers.py /path/outside/the/repository/scorers-random

For machines without the real weights (CSAIL's UPerNet-101, torch-fidelity's Inception; 430 MB): everything runs as with
those, and the numbers mean nothing.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from ether_diffusion.metrics.csail_upernet import Decoder, Encoder
from ether_diffusion.metrics.segmenters import CSAIL_FILES

INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]


class RandomInception(FeatureExtractorInceptionV3):
    """Keeps its random weights: it loads none."""

    def load_state_dict(self, *_args: object, **_options: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None


def rescaled(network: nn.Module) -> nn.Module:
    """The network with weights under which activations neither vanish nor explode: outputs depend on the image."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d) and name.endswith("bn3") and "layer" in name:
            nn.init.constant_(module.weight, 0.3)  # the branch that is added to the residual
    return network


def write_scorers(folder: Path) -> list[Path]:
    """Write the files, the same ones each time, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    empty = folder / ".empty.pth"
    torch.save({}, empty)  # torch-fidelity's class opens a file of weights, whatever it holds
    networks = {
        CSAIL_FILES["encoder"]: Encoder(),
        CSAIL_FILES["decoder"]: Decoder(),
        INCEPTION_FILE: RandomInception("random", ["2048"], str(empty)).requires_grad_(False),
    }
    for name, network in networks.items():
        torch.save(rescaled(network).state_dict(), folder / name)
    empty.unlink()
    return [folder / name for name in networks]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the scorers of s2i/csail-v1 with random weights.")
    parser.add_argument("folder", type=Path)
    for file in write_scorers(parser.parse_args().folder):
        print(file)


if __name__ == "__main__":
    main()
