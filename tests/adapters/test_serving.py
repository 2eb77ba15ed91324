"""Many adapters on one base: loaded without noise, switched and overwritten under torch.compile."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ether_diffusion.adapters.attach import attach
from ether_diffusion.adapters.loading import fill_adapter, load_adapter
from ether_diffusion.adapters.methods import EtherPlusSettings
from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from support.unets import one_block_unet


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two saved ETHER+ adapters of one shape, "a" and "b", and one of two blocks."""
    made = {}
    for seed, (name, blocks) in enumerate({"a": 1, "b": 1, "blocks": 2}.items()):
        unet = one_block_unet()
        attach(unet, EtherPlusSettings(target=["to_q"], num_blocks=blocks), seed=seed)
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
        made[name] = save_adapter(unet, tmp_path / name, base_model="a small UNet")
    return made


def sample(run: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    with torch.no_grad():
        return run(x, torch.tensor(500), c).sample


def alone(folder: Path) -> Tensor:
    unet = one_block_unet()
    load_adapter(unet, folder)
    return sample(unet)


def compiled(unet: nn.Module) -> CompileCounter:
    torch.compiler.reset()
    counter = CompileCounter()
    unet.compile(backend=counter, fullgraph=True)
    return counter


def test_further_adapters_come_without_a_warning(folders: dict[str, Path]) -> None:
    unet = one_block_unet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, folder in folders.items():
            load_adapter(unet, folder, name)
        load_adapter(unet, folders["b"], "a")


def test_overwriting_a_compiled_adapter_compiles_nothing(folders: dict[str, Path]) -> None:
    unet = one_block_unet()
    load_adapter(unet, folders["a"])
    counter = compiled(unet)
    for name in ("a", "b", "a"):
        fill_adapter(unet, read_adapter(folders[name]))
        torch.testing.assert_close(sample(unet), alone(folders[name]), rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    with pytest.raises(UserError, match="of another shape"):
        fill_adapter(unet, read_adapter(folders["blocks"]))
    torch.testing.assert_close(sample(unet), alone(folders["a"]), rtol=0, atol=1e-5)


def test_a_compiled_unet_is_compiled_once_for_each_adapter(folders: dict[str, Path]) -> None:
    unet = one_block_unet()
    for name in ("a", "b"):
        load_adapter(unet, folders[name], name)
    counter = compiled(unet)
    for name in ("a", "b", "a", "b"):
        unet.set_adapters(name)
        torch.testing.assert_close(sample(unet), alone(folders[name]), rtol=0, atol=1e-5)
    assert counter.frame_count == 2
