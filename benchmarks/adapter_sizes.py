"""Size of an adapter's file on Stable Diffusion v1.5's attention, and of the LoRA file with the same change of weights.

    python benchmarks/adapter_sizes.py

The UNet is on torch's meta device, without weights: files of zeros are as large as files of trained numbers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saved_adapter import with_prefix
from ether_diffusion.models.families.stable_diffusion_v1 import build_unet

# A method, its settings, and the rank of the LoRA that can hold the same change of the weights.
ADAPTERS: list[tuple[str, dict[str, Any], int]] = [
    ("ether", {}, 1),
    ("ether_plus", {"sides": "in"}, 2),
    ("ether_plus", {}, 4),
]


def main() -> None:
    """Print the table."""
    print("| adapter | parameters | its file, MB | as LoRA of rank | that file, MB |\n|---|---|---|---|---|")
    for method, settings, rank in ADAPTERS:
        numbers, size = measure(method, settings)
        title = " ".join([method, *(f"{key}={value}" for key, value in settings.items())])
        print(
            f"| `{title}` | {numbers:,} | {size / 1e6:.2f} | {rank} | {measure('lora', {'rank': rank})[1] / 1e6:.2f} |"
        )


def measure(method: str, settings: dict[str, Any]) -> tuple[int, int]:
    """Parameters of an adapter, and bytes of its file, header included."""
    with torch.device("meta"):
        unet: Any = build_unet()
    attach(unet, METHODS[method](**settings))
    state = get_peft_model_state_dict(unet, adapter_name="default")
    zeros = {with_prefix(key): torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"
        save_file(zeros, path, metadata={"format": "pt"})
        return sum(tensor.numel() for tensor in zeros.values()), path.stat().st_size


if __name__ == "__main__":
    main()
