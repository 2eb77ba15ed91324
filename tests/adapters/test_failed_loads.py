"""Adapters with modules that are trained whole; and loads that fail, in whatever way: the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from ether_diffusion import EtherConfig, load_adapter, save_adapter
from ether_diffusion.adapters import attach as attaching
from ether_diffusion.adapters import loading
from ether_diffusion.adapters.attach import adapted_layers, attach, detach, inject, merge, remove, saved_modules
from ether_diffusion.adapters.loading import merge_saved
from ether_diffusion.adapters.saved_adapter import read_adapter, read_previous_adapter
from ether_diffusion.errors import UserError
from support.adapted_unets import move, moved_unet, sample, settings_of
from support.unets import one_block_unet

TARGETS = ["to_q", "to_v"]
WHOLE = EtherConfig(variant="ether", target_modules=TARGETS, modules_to_save=["conv_out", "time_embedding"])


def unet_with_whole_modules(name: str = "default") -> Any:
    unet = one_block_unet()
    inject(unet, WHOLE, name)
    move(unet, 0.3)
    return unet


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, Tensor]:
    """A saved adapter with two modules that are trained whole, and its model's output."""
    unet = unet_with_whole_modules()
    return save_adapter(unet, tmp_path / "whole", base_model="tiny"), sample(unet)


def test_modules_that_are_trained_whole_are_loaded(whole: tuple[Path, Tensor]) -> None:
    folder, expected = whole
    unet = one_block_unet()
    plain = sample(unet)
    saved = load_adapter(unet, folder)
    assert torch.equal(sample(unet), expected)
    assert not saved.has_scale  # the modules are the trained ones at any scale
    model = PeftModel.from_pretrained(one_block_unet(), str(folder))
    assert torch.equal(sample(model.base_model.model), expected)
    load_adapter(unet, folder)  # in the place of itself
    assert torch.equal(sample(unet), expected)
    remove(unet, "default")
    assert torch.equal(sample(unet), plain)
    assert unet.state_dict().keys() == one_block_unet().state_dict().keys()


def test_the_modules_of_the_active_adapter_alone_are_used(whole: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = whole
    trained = moved_unet("ether", target=TARGETS)
    other = save_adapter(trained, tmp_path / "other", base_model="tiny")
    unet = one_block_unet()
    load_adapter(unet, folder, name="whole")
    load_adapter(unet, other, name="other")
    assert torch.equal(sample(unet), sample(trained))
    remove(unet, "other")
    load_adapter(unet, folder, name="whole")
    assert torch.equal(sample(unet), expected)


def test_modules_that_are_trained_whole_are_merged_with_their_adapter(whole: tuple[Path, Tensor]) -> None:
    folder, expected = whole
    unet = one_block_unet()
    load_adapter(unet, folder)
    merge(unet)
    assert unet.state_dict().keys() == one_block_unet().state_dict().keys()
    torch.testing.assert_close(sample(unet), expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_a_whole_module_of_another_shape_is_refused(whole: tuple[Path, Tensor]) -> None:
    other: Any = one_block_unet()
    other.conv_out = nn.Conv2d(16, 5, 3, padding=1)
    names = list(other.state_dict())
    with pytest.raises(UserError, match=r"of another shape, e\.g\. conv_out"):
        load_adapter(other, whole[0])
    assert list(other.state_dict()) == names


def state_of(model: Any) -> dict[str, Any]:
    """All that a failed load could have changed."""
    layers = [*adapted_layers(model).values(), *saved_modules(model).values()]
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "parameters": [(name, id(one), one.requires_grad, one.dtype) for name, one in model.named_parameters()],
        "weights": {key: value.clone() for key, value in model.state_dict().items()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "adapters": list(getattr(model, "peft_config", {})),
        "loaded": getattr(model, "_hf_peft_config_loaded", None),
        "active": [(layer.active_adapters, dict(getattr(layer, "scaling", {}) or {})) for layer in layers],
        "merged": [list(layer.merged_adapters) for layer in layers],
        "random": torch.get_rng_state(),
        "output": sample(model),
    }


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def plain() -> Any:
    return one_block_unet()


def with_one_of_that_name() -> Any:
    return moved_unet("ether")


def with_another() -> Any:
    unet = one_block_unet()
    attach(unet, settings_of("ether"), name="other")
    return unet


def with_whole_modules() -> Any:
    return unet_with_whole_modules("other")


class Stop(BaseException):
    """Not an error of ours: Ctrl-C, for example."""


POINTS: list[tuple[Any, str]] = [
    (loading, "check_fits"),
    (loading, "meta_copy"),
    (loading, "check_same_tensors"),
    (loading, "remove"),
    (loading, "inject"),
    (loading, "fill_adapter"),
    (loading, "fill"),
    (loading, "set_peft_model_state_dict"),
    (loading, "previous_adapter"),
    (attaching, "replace_layers"),
    (attaching, "refuse_scales"),
    (attaching, "detach"),
]


@pytest.fixture(scope="module")
def ether_plus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(moved_unet("ether_plus"), tmp_path_factory.mktemp("saved") / "adapter", base_model="tiny")


WAYS = [(KeyError, True), (Stop, False), (KeyError, False), (Stop, True)]
"""Errors, and whether they come before the point acts. Each point fails in all; of the quick tests, in one or the other
of the first two."""


@pytest.mark.parametrize(
    ("module", "function", "error", "before"),
    [
        pytest.param(
            *(module, function, error, before),
            id=f"{function}-{error.__name__}, {'before it acts' if before else 'after it has acted'}",
            marks=() if way == number % 2 else pytest.mark.slow,
        )
        for number, (module, function) in enumerate(POINTS)
        for way, (error, before) in enumerate(WAYS)
    ],
)
def test_a_load_that_fails_at_any_point_changes_nothing(
    module: Any,
    function: str,
    error: type[BaseException],
    before: bool,
    ether_plus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for make in (plain, with_one_of_that_name, with_another, with_whole_modules):
        for call in (1, 2):
            unet = make()
            expected = state_of(unet)
            with monkeypatch.context() as patch:
                patch.setattr(module, function, failing(getattr(module, function), error, call, before))
                try:
                    load_adapter(unet, ether_plus)
                except (error, UserError):
                    assert_same(state_of(unet), expected)
            load_adapter(unet, ether_plus)  # the model still takes it


def failing(function: Callable[..., Any], error: type[BaseException], call: int, before: bool) -> Callable[..., Any]:
    """The function, whose n-th call fails."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and before:
            raise error("injected")
        result = function(*args, **kwargs)
        if calls == call:
            raise error("injected")
        return result

    return wrapper


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("function", ["inject", "fill_adapter", "fill", "merge", "set_previous_adapter"])
def test_a_load_that_fails_after_the_merge_of_a_previous_adapter_restores_the_weights(
    function: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_adapter(moved_unet("lora"), tmp_path / "first", base_model="tiny")
    unet = one_block_unet()
    merge_saved(unet, read_previous_adapter(first))
    attach(unet, settings_of("magnitude"))
    move(unet)
    expected_output = sample(unet)
    saved = read_adapter(save_adapter(unet, tmp_path / "second", base_model="tiny"))
    for call in (1, 2):
        for before in (True, False):
            unet = one_block_unet()
            expected = state_of(unet)
            with monkeypatch.context() as patch:
                patch.setattr(loading, function, failing(getattr(loading, function), error, call, before))
                try:
                    load_adapter(unet, saved)
                except (error, UserError):
                    assert_same(state_of(unet), expected)
                    load_adapter(unet, saved)
            assert torch.equal(sample(unet), expected_output)


def test_a_merge_or_an_attachment_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = moved_unet("ether_plus")
    expected = state_of(unet)
    with monkeypatch.context() as patch:
        patch.setattr(attaching, "detach", failing(detach, Stop, 1, False))
        with pytest.raises(Stop):
            merge(unet)
    assert_same(state_of(unet), {**expected, "merged": state_of(unet)["merged"]})
    unet = one_block_unet()
    expected = state_of(unet)
    for function in ("replace_layers", "refuse_scales", "at_least_single", "inject"):
        with monkeypatch.context() as patch:
            patch.setattr(attaching, function, failing(getattr(attaching, function), Stop, 1, False))
            with pytest.raises(Stop):
                attach(unet, settings_of("ether_plus"))
        assert_same(state_of(unet), expected)
