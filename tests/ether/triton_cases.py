"""The Triton kernels through Triton's interpreter on the CPU, against the plain version.

`test_ether_triton.py` runs this file in a process of its own, because the interpreter has to be chosen before the first
import of Triton.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ether_diffusion.ether import transform as T
from support.ether_layers import VARIANTS, wrap
from support.unets import small_unet


@pytest.fixture
def kernels() -> ModuleType:
    from ether_diffusion.ether import kernels

    return kernels


@pytest.fixture
def with_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets the tuner take the interpreted kernels for CPU tensors, and counts their launches."""
    calls = []
    for name in ("forward", "backward"):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, real=real, name=name: calls.append(name) or real(*a))
    return lambda: monkeypatch.setattr(T, "_kernels", lambda *_: kernels) or calls


def outputs(layer: Any, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    g = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, *trained], g)]


@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-5),
        pytest.param(torch.bfloat16, 2e-2, marks=pytest.mark.slow),
        pytest.param(torch.float16, 3e-3, marks=pytest.mark.slow),
    ],
)
def test_a_linear_layer_is_that_of_the_plain_version(with_kernels, variant, sides, blocks, dtype, tolerance):
    layer = wrap(nn.Linear(40, 24).to(dtype), variant=variant, sides=sides, num_blocks=blocks)
    layer.set_scale("default", 0.7 if sides == "in" else 1.0)
    x = torch.randn(2, 37, 40, dtype=dtype)
    plain = outputs(layer, x)
    calls = with_kernels()
    for fused, expected in zip(outputs(layer, x), plain, strict=True):
        assert fused.dtype == expected.dtype
        assert (fused - expected).abs().max() <= tolerance * expected.abs().max()
    n = 1 if sides == "in" else 2
    assert {name: calls.count(name) for name in set(calls)} == {"forward": n, "backward": n}


@pytest.mark.slow
def test_no_variant_launches_more_than_lora(monkeypatch):
    """Of all 32 layers, forward and backward: launches, and operations of torch that compute or copy."""
    file = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", file)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)

    def added(adapter: str) -> dict[str, int]:
        counts = benchmark.added(adapter, small_unet().requires_grad_(False))
        return {name: round(32 * count) for name, count in counts.items()}

    lora = sum(added("lora r=4").values())
    for adapter, sides in (("ether", 1), ("ether_plus, one side", 1), ("ether_plus", 2)):
        with benchmark.with_triton():
            counts = added(adapter)
        launches = {name: counts[name] for name in counts if name.endswith("_kernel")}
        assert launches == dict.fromkeys(("_forward_kernel", "_backward_kernel", "_finish_kernel"), 32 * sides)
        assert sum(counts.values()) <= lora, (adapter, counts)


def test_more_positions_than_programs_are_all_summed(with_kernels, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    layer = wrap(nn.Linear(12, 8), variant="ether_plus")
    x = torch.randn(501, 12)
    plain = outputs(layer, x)
    with_kernels()
    torch.testing.assert_close(outputs(layer, x), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_that_of_the_plain_version(with_kernels, memory_format):
    layer = wrap(nn.Conv2d(12, 8, 3, padding=1), variant="ether_plus", num_blocks=2)
    x = torch.randn(2, 12, 5, 6).to(memory_format=memory_format)
    plain = outputs(layer, x)
    calls = with_kernels()
    torch.testing.assert_close(outputs(layer, x), plain, rtol=1e-4, atol=1e-4)
    assert ("forward" in calls) == (memory_format == torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ether_plus_changes_no_bit_at_the_start(with_kernels, dtype):
    layer = wrap(nn.Linear(40, 24).to(dtype), variant="ether_plus", init_weights=True)
    x = torch.randn(9, 40, dtype=dtype)
    with_kernels()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_zero_vectors_stay_finite(with_kernels):
    layer = wrap(nn.Linear(12, 8), variant="ether_plus")
    for p in layer.ether_in.parameters():
        p.data.zero_()
    with_kernels()
    assert all(t.isfinite().all() for t in outputs(layer, torch.randn(5, 12)))


def test_second_derivatives_and_a_trained_bias_are_right(with_kernels):
    base = nn.Linear(12, 8)
    layer = wrap(base, variant="ether_plus")
    base.bias.requires_grad_()
    x = torch.randn(5, 12, requires_grad=True)

    def second() -> torch.Tensor:
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), layer.ether_out["default"].v)[0]

    plain = [*outputs(layer, x), second()]
    calls = with_kernels()
    torch.testing.assert_close(outputs(layer, x), plain[:-1], rtol=1e-4, atol=1e-4)
    assert calls.count("backward") == 1
    torch.testing.assert_close(second(), plain[-1], rtol=1e-4, atol=1e-3)


def test_the_check_on_first_use_passes_and_notices_wrong_numbers(kernels, monkeypatch):
    kernels.check(torch.device("cpu"))
    right = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda *a: 2 * right(*a))
    with pytest.raises(RuntimeError, match="off by"):
        kernels.check(torch.device("cpu"))


def test_where_the_kernels_fail_the_plain_version_runs_with_one_warning():
    T._load_kernels.cache_clear()
    with pytest.warns(UserWarning, match=r"^ETHER's Triton kernels do not work here, the slower plain version runs: "):
        assert T._load_kernels(63) is None
    T._load_kernels.cache_clear()
