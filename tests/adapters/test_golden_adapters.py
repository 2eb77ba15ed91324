"""Adapters that each version of the format wrote stay loadable, and do what they did.

`PYTHONPATH=.:tests python tests/adapters/test_golden_adapters.py` writes the files of the version at hand: run it when
the format changes, and leave the older folders as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ether_diffusion import load_adapter, save_adapter
from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import merge_saved
from ether_diffusion.adapters.saved_adapter import read_adapter, read_previous_adapter
from ether_diffusion.version import __version__
from support.adapted_unets import ADAPTERS, move, moved_unet, sample, settings_of
from support.unets import one_block_unet

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/*/output.safetensors"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(GOLDEN)))
def test_an_adapter_of_an_earlier_version_does_what_it_did(folder: Path) -> None:
    unet = one_block_unet()
    saved = load_adapter(unet, folder)
    assert saved.base_model == "one_block_unet"
    torch.testing.assert_close(sample(unet), load_file(folder / "output.safetensors")["output"], rtol=1e-4, atol=1e-5)


def test_there_are_files_of_every_method() -> None:
    newest = max(FOLDERS).parent
    assert {folder.name for folder in FOLDERS if folder.parent == newest} == {*ADAPTERS, "magnitude_after_lora"}


def test_the_recorded_digests_are_those_of_the_files() -> None:
    digests = {folder.name: read_adapter(folder).digest for folder in FOLDERS if folder.parent.name == "0.1.0"}
    recorded = dict(line.split(": ") for line in (GOLDEN / "0.1.0/digests.txt").read_text().splitlines())
    assert digests == recorded


def _write(root: Path) -> None:
    """Write an adapter of each method, and one after another, with the outputs of their models."""
    unets: dict[str, Any] = {method: moved_unet(method) for method in ADAPTERS}
    for method, unet in unets.items():
        save_adapter(unet, root / method, base_model="one_block_unet")
    unets["magnitude_after_lora"] = one_block_unet()
    merge_saved(unets["magnitude_after_lora"], read_previous_adapter(root / "lora"))
    attach(unets["magnitude_after_lora"], settings_of("magnitude"))
    move(unets["magnitude_after_lora"])
    save_adapter(unets["magnitude_after_lora"], root / "magnitude_after_lora", base_model="one_block_unet")
    for name, unet in unets.items():
        save_file({"output": sample(unet)}, root / name / "output.safetensors")
    lines = [f"{name}: {read_adapter(root / name).digest}\n" for name in sorted(unets)]
    (root / "digests.txt").write_text("".join(lines))


if __name__ == "__main__":
    _write(GOLDEN / __version__)
