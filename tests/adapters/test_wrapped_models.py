"""Models in wrappers, models that are pickled, and adapters inside adapters: nothing is lost or changed in silence."""

from __future__ import annotations

import io
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from ether_diffusion import EtherConfig, load_adapter, save_adapter
from ether_diffusion.adapters.attach import attach, merge
from ether_diffusion.adapters.attention_processor import set_ether_processors
from ether_diffusion.adapters.loading import fill_adapter
from ether_diffusion.adapters.saved_adapter import WEIGHTS, read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.module_files import WEIGHTS as MODULE_WEIGHTS
from ether_diffusion.models.module_files import save_module
from support.adapted_unets import ADAPTERS, move, moved_unet, sample, settings_of
from support.unets import one_block_unet

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def with_a_compiled_block(unet: Any) -> Any:
    unet.down_blocks[0] = compiled(unet.down_blocks[0])
    return unet


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "compiled": compiled,
    "one compiled block": with_a_compiled_block,
    "both": lambda unet: compiled(with_a_compiled_block(unet)),
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapped_model_saves_an_adapter_that_fits_the_bare_one(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    unet = moved_unet("ether_plus")
    expected = sample(unet)
    bare = save_adapter(unet, tmp_path / "bare", base_model="tiny")
    wrapped = wrap(unet)
    names = [name for name, _ in wrapped.named_modules()]
    folder = save_adapter(wrapped, tmp_path / "wrapped", base_model="tiny")
    assert (folder / WEIGHTS).read_bytes() == (bare / WEIGHTS).read_bytes()
    assert (folder / "README.md").read_bytes() == (bare / "README.md").read_bytes()
    assert [name for name, _ in wrapped.named_modules()] == names
    model = PeftModel.from_pretrained(one_block_unet(), str(folder))
    assert torch.equal(sample(model.base_model.model), expected)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_an_adapter_is_loaded_into_a_wrapped_model(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    trained = moved_unet("ether_plus")
    folder = save_adapter(trained, tmp_path / "adapter", base_model="tiny")
    unet = one_block_unet()
    wrapped = wrap(unet)
    names = {name for name, _ in wrapped.named_modules()}
    load_adapter(wrapped, folder)
    assert names <= {name for name, _ in wrapped.named_modules()}
    close: Any = {"rtol": 0, "atol": 1e-6}  # compiled, the sums have another order
    torch.testing.assert_close(sample(unet), sample(trained), **close)
    move(unet)
    fill_adapter(wrapped, read_adapter(folder))
    torch.testing.assert_close(sample(unet), sample(trained), **close)


def test_a_compiled_model_that_has_run_uses_the_adapter_that_it_is_given(tmp_path: Path) -> None:
    trained = moved_unet("ether_plus")
    folder = save_adapter(trained, tmp_path / "adapter", base_model="tiny")
    unet = one_block_unet()
    wrapped = compiled(unet)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 24)
    with torch.no_grad():
        before = wrapped(x, t, text).sample
        load_adapter(wrapped, folder)
        assert not torch.allclose(wrapped(x, t, text).sample, before, atol=1e-3)
        assert torch.allclose(wrapped(x, t, text).sample, trained(x, t, text).sample, atol=1e-5)


def test_a_compiled_text_encoder_saves_an_adapter_that_fits_the_bare_one(tmp_path: Path) -> None:
    base = load_base("tiny")
    attach(base.unet, settings_of("ether"))
    attach(base.text_encoder, settings_of("ether").for_text_encoder())
    folder = save_adapter(base.unet, tmp_path / "adapter", base_model="tiny", text_encoder=compiled(base.text_encoder))
    load_adapter(load_base("tiny").text_encoder, folder, text_encoder=True)


def test_a_compiled_module_is_saved_by_the_names_of_the_bare_one(tmp_path: Path) -> None:
    unet = one_block_unet()
    bare, wrapped = (save_module(one, tmp_path / name) for one, name in ((unet, "bare"), (compiled(unet), "wrapped")))
    assert (wrapped / MODULE_WEIGHTS).read_bytes() == (bare / MODULE_WEIGHTS).read_bytes()
    assert (wrapped / "config.json").read_bytes() == (bare / "config.json").read_bytes()


def torch_copy(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copy", [torch_copy, lambda model: pickle.loads(pickle.dumps(model))], ids=["torch", "pickle"])
@pytest.mark.parametrize("method", [*ADAPTERS, "constrained oft"])
def test_a_model_with_an_adapter_can_be_pickled(method: str, copy: Callable[[Any], Any]) -> None:
    constrained = {"constrained": True, "eps": 1e-3} if method == "constrained oft" else {}
    unet = moved_unet(method.removeprefix("constrained "), **constrained)
    restored = copy(unet)
    assert torch.equal(sample(restored), sample(unet))
    move(restored, 1.0)
    assert not torch.equal(sample(restored), sample(unet))  # nothing of it refers to the first one


def test_a_model_that_has_carried_an_adapter_can_be_pickled() -> None:
    model: Any = get_peft_model(one_block_unet(), EtherConfig(target_modules=TARGETS))  # pyright: ignore
    for plain in (model.merge_and_unload(), get_peft_model(one_block_unet(), model.peft_config["default"]).unload()):  # pyright: ignore
        assert torch.equal(sample(torch_copy(plain)), sample(plain))
    unet = one_block_unet()
    set_ether_processors(unet, EtherConfig(target_modules=TARGETS))
    assert torch.equal(sample(torch_copy(unet)), sample(unet))


def test_a_pipeline_with_an_adapter_can_be_pickled(tmp_path: Path) -> None:
    base = load_base("tiny")
    attach(base.unet, settings_of("ether_plus"))
    folder = save_adapter(base.unet, tmp_path / "adapter", base_model="tiny")
    pipeline = load_base("tiny").pipeline()
    load_adapter(pipeline.unet, folder)
    restored = torch_copy(pipeline)
    weights, expected = restored.unet.state_dict(), pipeline.unet.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], expected[key]) for key in expected)


def lora_over_ether() -> Any:
    unet = one_block_unet()
    unet.add_adapter(EtherConfig(target_modules=TARGETS), adapter_name="ours")
    unet.add_adapter(LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False), adapter_name="lora")
    unet.set_adapters(["ours", "lora"])
    return unet


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


MERGES: dict[str, Callable[[Any], Any]] = {
    "diffusers": lambda unet: unet.fuse_lora(),
    "ours": merge,
    "peft": lambda unet: [m.merge() for m in unet.modules() if type(m).__module__.startswith("peft.tuners.lora")],
    "peft, inside": lambda unet: [module.merge() for module in unet.modules() if type(module).__name__ == "EtherLayer"],
}


@pytest.mark.parametrize("merging", MERGES.values(), ids=MERGES)
def test_an_adapter_of_another_method_around_ours_is_not_merged(merging: Callable[[Any], Any]) -> None:
    unet = lora_over_ether()
    expected, before = sample(unet), weights_of(unet)
    with pytest.raises(ValueError, match="inner"):
        merging(unet)
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
    assert torch.equal(sample(unet), expected)


@pytest.mark.parametrize("name", ["ours", "lora"])
def test_an_adapter_around_another_is_not_saved(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"to_\w+: a EtherLayer lies inside a Linear, and cannot be merged or saved"):
        save_adapter(lora_over_ether(), tmp_path / "adapter", base_model="tiny", name=name)
    assert not list(tmp_path.iterdir())


def test_peft_and_diffusers_do_not_save_ours_from_inside_another_method(tmp_path: Path) -> None:
    """Its tensors would have the keys `to_q.base_layer.ether_in.u`, which load nowhere."""
    says = "lies around a layer with ETHER, and what it holds cannot be saved"
    with pytest.raises(ValueError, match=says):
        lora_over_ether().save_lora_adapter(tmp_path / "diffusers", adapter_name="ours")
    inner: Any = get_peft_model(one_block_unet(), EtherConfig(target_modules=TARGETS))  # pyright: ignore
    inner.save_pretrained(tmp_path / "alone")
    assert all("base_layer" not in key for key in load_file(tmp_path / "alone/adapter_model.safetensors"))
    outer: Any = get_peft_model(inner.base_model.model, LoraConfig(target_modules=TARGETS, r=2), "lora")
    with pytest.raises(ValueError, match=says):
        inner.save_pretrained(tmp_path / "peft")
    assert not [*tmp_path.glob("diffusers/*.safetensors"), *tmp_path.glob("peft/*.safetensors")]
    # The outer method's file is PEFT's own, and holds that method alone.
    outer.save_pretrained(tmp_path / "outer", selected_adapters=["lora"])
    (file,) = (tmp_path / "outer").rglob("*.safetensors")
    assert all(".lora_A." in key or ".lora_B." in key for key in load_file(file))


def test_a_method_of_peft_around_another_is_neither_merged_nor_saved(tmp_path: Path) -> None:
    unet = moved_unet("lora")
    settings = settings_of("oft")
    unet.add_adapter(settings.peft_config(), adapter_name="outer")
    for refused in (merge, lambda model: save_adapter(model, tmp_path / "adapter", base_model="tiny")):
        with pytest.raises(UserError, match="lies inside"):
            refused(unet)


@pytest.mark.parametrize("method", ["lora", "oft", "boft", "hra", "vera", "delora", "dora"])
def test_another_method_is_not_attached_to_or_loaded_into_layers_that_carry_ours(method: str, tmp_path: Path) -> None:
    folder = save_adapter(moved_unet(method), tmp_path / method, base_model="tiny")
    unet = moved_unet("ether_plus")
    expected, names = sample(unet), list(unet.state_dict())
    for attaching in (lambda: attach(unet, settings_of(method), name="b"), lambda: load_adapter(unet, folder, "b")):
        with pytest.raises(UserError, match=r"lies inside|No layers types compatible with VeRA"):
            attaching()
        assert list(unet.state_dict()) == names
        assert list(unet.peft_config) == ["default"]
        assert torch.equal(sample(unet), expected)
    load_adapter(unet, folder)  # in the place of ours


def test_ours_around_another_method_is_refused_when_it_is_attached() -> None:
    unet = moved_unet("lora")
    expected, names = sample(unet), list(unet.state_dict())
    with pytest.raises(ValueError, match="already carries an adapter of another method"):
        unet.add_adapter(EtherConfig(target_modules=TARGETS), adapter_name="ours")
    assert torch.equal(sample(unet), expected)
    assert list(unet.state_dict()) == names


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_that_the_umask_leaves(mask: int, tmp_path: Path) -> None:
    unet = moved_unet("ether")
    before = os.umask(mask)
    try:
        save_adapter(unet, tmp_path / "adapter", base_model="tiny")
        save_module(one_block_unet(), tmp_path / "unet")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        whole = 0o777 if path.is_dir() else 0o666
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(whole & ~mask), path
