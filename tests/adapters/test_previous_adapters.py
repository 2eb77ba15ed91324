"""Adapters that were trained after others: one folder holds all, and loading merges them in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.loading import fill_adapter, load_adapter, merge_saved
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.saved_adapter import read_adapter, read_previous_adapter
from ether_diffusion.adapters.saving import save_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from support.adapted_unets import ADAPTERS, inputs, move, moved_unet, sample, settings_of
from support.unets import one_block_unet

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def after(folder: Path, method: str = "magnitude") -> Any:
    """The small UNet, a saved adapter merged into it, with another adapter on it that has moved from its start."""
    unet = one_block_unet()
    merge_saved(unet, read_previous_adapter(folder))
    attach(unet, settings_of(method))
    move(unet)
    return unet


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_of_any_method_is_merged_first_and_saved_along(tmp_path: Path, method: str) -> None:
    first = moved_unet(method)
    save_adapter(first, tmp_path / "first", base_model="tiny")
    unet = after(tmp_path / "first")
    merge(first)  # the dense reference: the rows of the first adapter's weights, scaled
    for name, layer in unet.named_modules():
        if hasattr(layer, "magnitude_rows"):
            weight = first.get_submodule(name).weight
            weight.data = torch.diag(1 + layer.magnitude_rows["default"].change.detach()) @ weight.data
    torch.testing.assert_close(sample(unet), sample(first), rtol=0, atol=1e-5)

    folder = save_adapter(unet, tmp_path / "second", base_model="tiny")
    assert files(folder / "before") == files(tmp_path / "first")
    loaded = one_block_unet()
    saved = load_adapter(loaded, folder)
    assert torch.equal(sample(loaded), sample(unet))
    before = read_adapter(tmp_path / "first")
    assert saved.method == f"{METHODS[method].title} + Magnitude"
    assert saved.parameters == saved.own_parameters + before.parameters
    merge(loaded)
    torch.testing.assert_close(sample(loaded), sample(unet), rtol=0, atol=1e-5)


def test_a_loaded_adapter_is_saved_again_with_the_one_before_and_the_digest_covers_both(tmp_path: Path) -> None:
    save_adapter(moved_unet("ether"), tmp_path / "first", base_model="tiny")
    folder = save_adapter(after(tmp_path / "first"), tmp_path / "second", base_model="tiny")
    unet = one_block_unet()
    digest = load_adapter(unet, folder).digest
    assert read_adapter(save_adapter(unet, tmp_path / "again", base_model="tiny")).digest == digest
    assert files(tmp_path / "again" / "before") == files(tmp_path / "first")
    weights = folder / "before" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[min(tensors)] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert read_adapter(folder).digest != digest
    with pytest.raises(UserError, match=r"was trained after the adapter in its before/, which is not merged here"):
        fill_adapter(unet, read_adapter(folder))


def test_a_third_phase_after_a_second(tmp_path: Path) -> None:
    """Magnitudes after magnitudes after Naive: the scales multiply, and folders nest."""
    save_adapter(moved_unet("naive"), tmp_path / "first", base_model="tiny")
    save_adapter(after(tmp_path / "first"), tmp_path / "second", base_model="tiny")
    third = after(tmp_path / "second")
    expected = after(tmp_path / "first")
    for layer in expected.modules():
        if hasattr(layer, "magnitude_rows"):
            rows: Any = layer.magnitude_rows["default"].change  # pyright: ignore
            rows.data = (1 + rows.data) ** 2 - 1  # `move` moved both phases alike
    torch.testing.assert_close(sample(third), sample(expected), rtol=0, atol=1e-5)
    folder = save_adapter(third, tmp_path / "third", base_model="tiny")
    assert (folder / "before" / "before" / "adapter_config.json").is_file()
    loaded = one_block_unet()
    assert load_adapter(loaded, folder).method == "Naive + Magnitude + Magnitude"
    assert torch.equal(sample(loaded), sample(third))


def test_the_card_has_the_lines_for_plain_peft(tmp_path: Path) -> None:
    save_adapter(moved_unet("oft"), tmp_path / "first", base_model="tiny")
    unet = after(tmp_path / "first")
    folder = save_adapter(unet, tmp_path / "second", base_model="tiny")
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [line for line in code.replace("path/to/this/folder", str(folder)).splitlines() if "PeftModel" in line]

    class Pipeline:
        unet: Any = one_block_unet()

    exec("\n".join(lines), {"pipeline": Pipeline})
    assert len(lines) == 3
    with torch.no_grad():
        torch.testing.assert_close(Pipeline.unet(*inputs()).sample, sample(unet), rtol=0, atol=1e-6)
    assert isinstance(Pipeline.unet, PeftModel)


def test_no_previous_adapter_is_merged_into_a_model_with_an_adapter(tmp_path: Path) -> None:
    save_adapter(moved_unet("ether"), tmp_path / "first", base_model="tiny")
    folder = save_adapter(after(tmp_path / "first"), tmp_path / "second", base_model="tiny")
    unet = moved_unet("magnitude")
    expected = sample(unet)
    with pytest.raises(UserError, match=r"to be merged into a plain model; this UNet2DConditionModel has an adapter"):
        load_adapter(unet, folder, "second")
    assert torch.equal(sample(unet), expected)


def test_each_phase_may_have_a_part_for_the_text_encoder(tmp_path: Path) -> None:
    """The first adapter has a part for the text encoder, the second has none, the third has one again."""
    first, third, loaded = (load_base("tiny").text_encoder for _ in range(3))
    attach(first, settings_of("ether").for_text_encoder())
    move(first)
    save_adapter(moved_unet("ether"), tmp_path / "first", base_model="tiny", text_encoder=first)
    save_adapter(after(tmp_path / "first"), tmp_path / "second", base_model="tiny")
    merge_saved(third, read_previous_adapter(tmp_path / "second"), text_encoder=True)
    attach(third, settings_of("magnitude").for_text_encoder())
    move(third)
    folder = save_adapter(after(tmp_path / "second"), tmp_path / "third", base_model="tiny", text_encoder=third)
    ids = torch.arange(10).reshape(1, 10)
    load_adapter(loaded, folder / "text_encoder")
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], third(ids)[0])
        assert not torch.allclose(loaded(ids)[0], first(ids)[0], atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "ether_plus"])
def test_a_merge_that_fails_leaves_every_weight_as_it_was(tmp_path: Path, method: str) -> None:
    """Also those of layers, and of adapters before, that were merged when the fault showed."""
    first = moved_unet("oft")
    save_adapter(first, tmp_path / "first", base_model="tiny")
    second = one_block_unet()
    merge_saved(second, read_previous_adapter(tmp_path / "first"))
    attach(second, settings_of(method))
    move(second)
    folder = save_adapter(second, tmp_path / "second", base_model="tiny")
    unet = one_block_unet()
    adapted = sorted({key.split(".lora_")[0].split(".ether_")[0] for key in read_adapter(folder).tensors})[-1]
    last = unet.get_submodule(adapted.removeprefix("base_model.model."))
    last.weight.data.fill_(torch.finfo(torch.float32).max)  # pyright: ignore[reportCallIssue, reportArgumentType]
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with pytest.raises(UserError, match="merge"):
        merge_saved(unet, read_previous_adapter(folder))
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items())
    last.weight.data.zero_()  # pyright: ignore[reportCallIssue]
    merge_saved(unet, read_previous_adapter(folder))  # a failed merge leaves no mark


def test_a_merge_that_fails_keeps_the_adapter(tmp_path: Path) -> None:
    unet = moved_unet("ether_plus")
    shown = sample(unet)
    last = [module for module in unet.modules() if hasattr(module, "base_layer")][-1]
    kept = last.base_layer.weight.data.clone()  # pyright: ignore
    last.base_layer.weight.data.fill_(torch.finfo(torch.float32).max)  # pyright: ignore
    with pytest.raises(UserError, match="merge"):
        merge(unet)
    last.base_layer.weight.data.copy_(kept)  # pyright: ignore
    assert torch.equal(sample(unet), shown)
