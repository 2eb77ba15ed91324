"""How many kernels an adapter adds to a training step, a layer: exact counts on a UNet built here, never timed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from support.unets import small_unet

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def count(benchmark: ModuleType, adapter: str, precision: str = "fp32") -> float:
    return sum(benchmark.added(adapter, small_unet().requires_grad_(False), precision).values())


@pytest.mark.parametrize(("adapter", "most"), [("ether", 1.5), ("ether_plus", 5), ("ether_plus, one side", 2.5)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_an_adapter_adds_few_kernels_compared_with_lora(benchmark, adapter, most, precision):
    assert count(benchmark, adapter, precision) <= most * count(benchmark, "lora r=4", precision)


# Of all 32 layers. Those that read texts need no gradient to their input; a fourth has a bias.
EXACT = {
    ("ether", "fp32"): 395,
    ("ether_plus", "fp32"): 1347,
    ("ether", "bf16"): 544,
    ("ether_plus", "bf16"): 1664,
}


@pytest.mark.parametrize(("adapter", "precision"), EXACT)
def test_the_number_of_kernels_is_exact(benchmark, adapter, precision):
    assert round(32 * count(benchmark, adapter, precision)) == EXACT[adapter, precision]
