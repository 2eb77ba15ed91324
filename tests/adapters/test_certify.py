"""Adapters that do nothing, or not what was trained: each injected fault is found when it is saved, by its name."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ether_diffusion import EtherConfig, load_adapter, save_adapter
from ether_diffusion.adapters import attach as attaching
from ether_diffusion.adapters.attach import adapted_layers, attach, merge, trainable_parameters
from ether_diffusion.adapters.base_digest import base_digest
from ether_diffusion.adapters.certificate import CERTIFICATE, Certificate
from ether_diffusion.adapters.certify import Watch, certify, has_effect, start_fault
from ether_diffusion.adapters.saved_adapter import WEIGHTS, SavedAdapter, read_adapter
from ether_diffusion.adapters.saving import write_adapter
from ether_diffusion.errors import Notice, UserError
from ether_diffusion.models.bases import fingerprint
from support.adapted_unets import ADAPTERS, inputs, moved_unet, sample, settings_of
from support.unets import one_block_unet

Change = Callable[[Any], Any]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def nothing(_: Any) -> None:
    pass


def train(
    unet: Any,
    steps: int = 2,
    rate: float = 1e-2,
    made: Change = nothing,
    before: Change = nothing,
    after: Change = nothing,
) -> Watch:
    """Take some steps towards predicting nothing. Calls `made` before the start is read, the others around them."""
    made(unet)
    watch = Watch(unet)
    before(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=rate)
    x, t, text = inputs(unet.conv_in.weight.dtype)
    for _ in range(steps):
        unet(x, t, text).sample.square().mean().backward()
        watch.observe()
        optimizer.step()
        optimizer.zero_grad()
    after(unet)
    return watch


def adapted(method: str = "ether_plus", dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    unet = one_block_unet(dtype).requires_grad_(False)
    attach(unet, settings_of(method, **settings))
    return unet


def save(unet: Any, folder: Path, watch: Watch | None = None) -> Certificate:
    return write_adapter(unet, folder, base_model="tiny", watch=watch)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_trained_adapter_of_every_method_is_certified(method: str, tmp_path: Path) -> None:
    unet = adapted(method)
    certificate = save(unet, tmp_path / "adapter", train(unet))
    assert certificate.faults == {}
    assert certificate.measured["layers"] == len(adapted_layers(unet)) == 8
    assert certificate.measured["share_below_1e-7"] == 0
    assert len(certificate.measured["changes"]) == 3
    assert all(change > 1e-6 for change in certificate.measured["changes"].values())
    assert read_adapter(tmp_path / "adapter").certificate == certificate


# Faults in training: what is done to a UNet around its steps -> the name of the fault.


def first(unet: Any) -> Any:
    return next(iter(adapted_layers(unet).values()))


def freeze(unet: Any) -> None:
    for parameter in first(unet).ether_in.parameters():
        parameter.requires_grad_(False)


def detach_what_reads_it(unet: Any) -> None:
    first(unet).register_forward_hook(lambda module, args, output: output.detach())


def switch_off(unet: Any) -> None:
    first(unet).enable_adapters(False)


def switch_on(unet: Any) -> None:
    first(unet).enable_adapters(True)


def activate_another(unet: Any) -> None:
    unet.add_adapter(EtherConfig(target_modules=TARGETS, init_weights=False), adapter_name="other")


def store_in_bf16(unet: Any) -> None:
    for parameter in trainable_parameters(unet).values():
        parameter.data = parameter.data.bfloat16()


IN_TRAINING: dict[str, tuple[dict[str, Any], str, str]] = {
    "frozen by mistake": ({"before": freeze}, "frozen", "1 of 8 layers"),
    "rate 0": ({"rate": 0.0}, "unmoved", "8 of 8 layers"),
    "detached": ({"before": detach_what_reads_it}, "gradient", "1 of 8 layers"),
    "disabled": ({"before": switch_off, "after": switch_on}, "disabled", "1 of 8 layers"),
    "wrong adapter active": ({"before": activate_another}, "inactive", "8 of 8 layers"),
    "underflow of a step": ({"made": store_in_bf16, "rate": 1e-7}, "underflow", "8 of 8 layers"),
}


@pytest.mark.parametrize("fault", IN_TRAINING)
def test_a_fault_in_training_is_found_by_name(fault: str, tmp_path: Path) -> None:
    options, name, sentence = IN_TRAINING[fault]
    unet = adapted()
    certificate = save(unet, tmp_path / "adapter", train(unet, **options))
    assert sentence in certificate.faults[name]
    assert "\n" not in certificate.line
    assert set(certificate.faults) <= {name, "effect"}
    assert (tmp_path / "adapter" / WEIGHTS).is_file()  # nothing is discarded
    assert read_adapter(tmp_path / "adapter").certificate == certificate


def test_a_change_that_the_models_precision_cannot_show_is_underflow(tmp_path: Path) -> None:
    unet = adapted(dtype=torch.bfloat16)
    certificate = save(unet, tmp_path / "adapter", train(unet, steps=3, rate=1e-7))
    assert certificate.measured["largest_change"] > 1e-7
    assert certificate.faults == {"underflow": "the adapter changes nothing measurable"}


def test_nothing_that_is_trained_is_a_fault() -> None:
    assert Watch(one_block_unet().requires_grad_(False)).faults() == {"nothing": "no layer is trained"}
    with pytest.raises(UserError, match=r"adapter\.target: 'nowhere' matches no linear or convolution layer"):
        attach(one_block_unet(), settings_of("ether_plus", target="nowhere"))


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_start_is_a_function_of_the_seed(method: str) -> None:
    unet = one_block_unet()
    attach(unet, settings_of(method), seed=3)
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    names = [name for name, _ in unet.named_parameters()]
    torch.manual_seed(int(torch.randint(1000, ())))
    assert start_fault(unet, settings_of(method), seed=3) == {}
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert [name for name, _ in unet.named_parameters()] == names


def test_a_start_that_depends_on_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = adapted()
    assert "8 of 8 layers" in start_fault(unet, settings_of("ether_plus"), seed=4)["start"]
    monkeypatch.setattr(attaching, "seeded", lambda seed: contextlib.nullcontext())  # the global one decides
    unet = adapted()
    fault = start_fault(unet, settings_of("ether_plus"), seed=0)
    assert Watch(unet, start_faults=fault).faults()["start"] == fault["start"]


# Faults in what is written: what is done to the tensors of a saved adapter -> the name of the fault.


def renamed(old: str, new: str) -> Change:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: (8 * tensor).round() / 8 for key, tensor in tensors.items()}


WRITTEN: dict[str, tuple[Change, str]] = {
    "compiled": (renamed("base_model.model.", "base_model.model._orig_mod."), "wrapper"),
    "one compiled block": (renamed("down_blocks.0.", "down_blocks.0._orig_mod."), "wrapper"),
    "data parallel": (renamed("base_model.model.", "base_model.model.module."), "wrapper"),
    "fully sharded": (renamed("base_model.model.", "base_model.model._fsdp_wrapped_module."), "wrapper"),
    "inner layer": (renamed(".ether_in", ".base_layer.ether_in"), "keys"),
    "renamed layers": (renamed("down_blocks", "down.blocks"), "keys"),
    "renamed tensors": (renamed("ether_in", "ether_input"), "keys"),
    "no prefix": (renamed("base_model.model.", ""), "keys"),
    "layers left out": (lambda tensors: {k: v for k, v in tensors.items() if "attn2" in k}, "keys"),
    "zero-filled": (zeros, "file"),
    "too few digits": (rounded, "file"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> SavedAdapter:
    folder = save_adapter(moved_unet("ether_plus"), tmp_path_factory.mktemp("saved") / "adapter", base_model="tiny")
    return read_adapter(folder)


@pytest.mark.parametrize("fault", WRITTEN)
def test_a_fault_in_the_file_is_found_by_name(fault: str, saved: SavedAdapter) -> None:
    change, name = WRITTEN[fault]
    unet = moved_unet("ether_plus")
    assert certify(unet, saved)[0] == {}
    written = dataclasses.replace(saved, tensors=change(saved.tensors))
    faults, changes = certify(unet, written)
    assert list(faults) == [name]
    assert "\n" not in faults[name]
    assert has_effect(unet, written, changes) == (fault != "zero-filled")


def test_a_file_that_was_zero_filled_later_is_not_what_was_certified(tmp_path: Path) -> None:
    folder = save_adapter(moved_unet("ether_plus"), tmp_path / "adapter", base_model="tiny")
    save_file(zeros(read_adapter(folder).tensors), folder / WEIGHTS, metadata={"format": "pt"})
    certificate = read_adapter(folder).certificate
    assert certificate is not None
    assert certificate.faults == {"record": f"the weights are not those that {CERTIFICATE} is about"}
    with pytest.warns(Notice, match="the adapter changes nothing measurable in this UNet2DConditionModel"):
        load_adapter(one_block_unet(), folder)


@pytest.mark.parametrize("content", ["{}", "[]", "null", "", "\xff", "[" * 10000])
def test_a_changed_certificate_is_no_certificate_and_no_error(content: str, tmp_path: Path) -> None:
    folder = save_adapter(moved_unet("ether_plus"), tmp_path / "adapter", base_model="tiny")
    text = (folder / CERTIFICATE).read_text()
    for changed in (content, text.replace('"passed": true', '"passed": false'), text.replace("tiny", "other")):
        (folder / CERTIFICATE).write_text(changed, encoding="latin-1")
        certificate = read_adapter(folder).certificate
        assert certificate is not None
        assert list(certificate.faults) == ["record"]
    (folder / CERTIFICATE).unlink()
    assert read_adapter(folder).certificate is None  # as of an earlier version, or of PEFT


def lora_over_ours(unet: Any) -> None:
    attach(unet, settings_of("ether_plus"))
    unet.add_adapter(LoraConfig(target_modules=TARGETS, r=2), adapter_name="lora")


def ours_over_lora(unet: Any) -> None:
    unet.add_adapter(LoraConfig(target_modules=TARGETS, r=2), adapter_name="lora")
    attach(unet, settings_of("ether_plus"), name="ours")


@pytest.mark.parametrize("name", ["default", "lora"])
def test_lora_over_ours_is_neither_saved_nor_merged(name: str, tmp_path: Path) -> None:
    unet = one_block_unet()
    lora_over_ours(unet)
    for refused in (merge, lambda unet: save_adapter(unet, tmp_path / "adapter", base_model="tiny", name=name)):
        with pytest.raises(UserError, match="a EtherLayer lies inside a Linear, and cannot be merged or saved"):
            refused(unet)
    assert not any(tmp_path.iterdir())


def test_ours_is_not_put_over_lora() -> None:
    with pytest.raises(UserError, match="already carries an adapter of another method"):
        ours_over_lora(one_block_unet())


# From Python


@pytest.mark.parametrize("method", [method for method in ADAPTERS if settings_of(method).starts_at_base])
def test_an_adapter_that_does_nothing_is_saved_with_a_notice_and_loaded_with_one(method: str, tmp_path: Path) -> None:
    unet = adapted(method)
    with pytest.warns(Notice, match=r"not certified: effect: the adapter changes nothing measurable"):
        folder = save_adapter(unet, tmp_path / "adapter", base_model="tiny")
    assert json.loads((folder / CERTIFICATE).read_text())["passed"] is False
    other = one_block_unet()
    with pytest.warns(Notice) as caught:
        load_adapter(other, folder)
    (line,) = [str(one.message) for one in caught if one.category is Notice]
    assert line == (f"{folder}: the adapter changes nothing measurable in this UNet2DConditionModel; was it trained?")
    assert torch.allclose(sample(other), sample(one_block_unet()), atol=1e-5)


@pytest.mark.parametrize("method", ADAPTERS)
def test_an_adapter_that_does_something_is_saved_and_loaded_without_notice(method: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        for dtype in (torch.float32, torch.bfloat16):
            unet = moved_unet(method, dtype)
            folder = save_adapter(unet, tmp_path / "adapter", base_model="tiny")
            load_adapter(one_block_unet(dtype), folder, "named")


def test_a_part_of_an_adapter_that_does_something_is_enough(tmp_path: Path) -> None:
    """Not the three layers that are looked at first."""
    unet = adapted()
    layers = list(adapted_layers(unet).values())
    with torch.no_grad():
        layers[1].ether_in["default"].u.add_(0.1)
    assert save(unet, tmp_path / "adapter").faults == {}


def test_an_adapter_is_certified_whichever_is_active_and_at_which_strength(tmp_path: Path) -> None:
    unet = moved_unet("ether_plus")
    unet.add_adapter(EtherConfig(target_modules=TARGETS, init_weights=False), adapter_name="other")
    assert save(unet, tmp_path / "adapter").faults == {}
    unet.disable_adapters()
    assert save(unet, tmp_path / "adapter").faults == {}
    unet.enable_adapters()
    unet.set_adapters(["default"], [0.3])
    assert save(unet, tmp_path / "adapter").faults == {}


def test_certifying_leaves_model_and_generators_as_they_are(tmp_path: Path) -> None:
    unet = moved_unet("lora", dropout=0.5).train()
    unet.requires_grad_(True)
    state = {key: value.clone() for key, value in unet.state_dict().items()}
    modes = [module.training for module in unet.modules()]
    flags = [parameter.requires_grad for parameter in unet.parameters()]
    before = torch.get_rng_state()
    assert save(unet, tmp_path / "adapter").faults == {}
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in unet.modules()] == modes
    assert [parameter.requires_grad for parameter in unet.parameters()] == flags
    assert state.keys() == unet.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in unet.state_dict().items())


def test_the_marked_folder_is_loaded_by_plain_peft(tmp_path: Path) -> None:
    unet = adapted()
    certificate = save(unet, tmp_path / "adapter", train(unet, before=freeze))
    assert certificate.faults
    model = PeftModel.from_pretrained(one_block_unet(), str(tmp_path / "adapter"))
    assert torch.equal(sample(model.base_model.model), sample(unet))


# A run that was stopped in between


def test_a_resumed_watch_finds_what_an_uninterrupted_one_finds() -> None:
    whole, parts = adapted(), adapted()
    expected = train(whole, steps=4)
    seen = train(parts, steps=2)
    state = seen.state()
    again = Watch(adapted())
    again.resume(state)
    assert torch.equal(again.start, expected.start)
    again.tensors[:] = [*trainable_parameters(whole).values()]
    assert again.steps == 2
    assert {key: value.shape for key, value in again.state().items()} == {
        key: value.shape for key, value in expected.state().items()
    }
    assert again.changes() == expected.changes()
    assert (again.state()["gradients"] > 0).all()


def test_a_watch_without_the_start_blames_nobody() -> None:
    unet = adapted()
    train(unet)
    watch = Watch(unet)
    watch.resume(None)
    assert watch.faults() == {}


# The base


@pytest.mark.parametrize("method", ["ether_plus", "lora", "vera"])
def test_the_digest_of_a_base_is_the_same_with_an_adapter_in_it(method: str, tmp_path: Path) -> None:
    bare = one_block_unet()
    assert base_digest(bare) == fingerprint(bare) == base_digest(moved_unet(method))
    half = one_block_unet(torch.bfloat16)
    assert base_digest(half) == base_digest(bare, "bfloat16") != base_digest(bare)
    save_adapter(moved_unet(method, torch.bfloat16), tmp_path / "adapter", base_model="tiny")
    certificate = read_adapter(tmp_path / "adapter").certificate
    assert certificate is not None
    assert certificate.base == {"name": "tiny", "digest": base_digest(half), "dtype": "bfloat16"}


def test_a_base_whose_weights_are_not_its_own_has_no_digest() -> None:
    unet = moved_unet("ether_plus")
    for layer in adapted_layers(unet).values():
        layer.merge()
    assert base_digest(unet) is None
    with torch.device("meta"):
        assert base_digest(nn.Linear(2, 2)) is None
