"""A bank: samples of one batch with adapters of their own, each as it would be alone."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ether_diffusion import EtherConfig
from ether_diffusion.ether import Bank, mixed_batch
from ether_diffusion.ether import transform as T
from ether_diffusion.ether.bank import Layout
from support.ether_layers import VARIANTS

KINDS = [(*kind, blocks) for kind in VARIANTS for blocks in (1, 4)]
NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """A convolution, a linear layer on positions, and one on (B, features), which see a batch in three shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.positions = nn.Linear(16, 24)
        self.head = nn.Linear(24, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(x)).flatten(2).transpose(1, 2).contiguous()
        return self.head(torch.tanh(self.positions(z)).mean(1))


def net(dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().to(dtype).requires_grad_(False).eval()


def batch(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 8, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def config_of(variant: str, sides: str, blocks: int) -> EtherConfig:
    settings: Any = {"variant": variant, "sides": sides}
    return EtherConfig(**settings, num_blocks=blocks, target_modules=["conv", "positions", "head"], init_weights=False)


def adapted(config: EtherConfig, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """The network with one adapter of random vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_adapter_in_model(config, net(dtype)).eval()


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if ".default." in name}


def filled(
    config: EtherConfig,
    names: Sequence[str] = NAMES,
    dtype: torch.dtype = torch.float32,
    bank_dtype: torch.dtype | None = None,
) -> tuple[Any, Bank, dict[str | None, Any]]:
    """The network with a bank in it, the bank, and the network with each adapter alone; None: without one."""
    model, alone = net(dtype), {name: adapted(config, seed, dtype) for seed, name in enumerate(names)}
    bank = Bank(model, config, len(names), dtype=bank_dtype)
    for name, one in alone.items():
        bank.put(name, bank.layout.row(vectors(one)))
    return model, bank, {**alone, None: net(dtype)}


def one_by_one(alone: dict[str | None, Any], names: Sequence[str | None], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([alone[name](sample.unsqueeze(0)) for name, sample in zip(names, x, strict=True)])


def assert_near(found: Tensor, expected: Tensor, part: float = 1e-5) -> None:
    """Within this part of the range of the expected values."""
    assert found.dtype == expected.dtype
    span = (expected.max() - expected.min()).item()
    torch.testing.assert_close(found, expected, rtol=0, atol=part * span)


@pytest.mark.parametrize(("variant", "sides", "blocks"), KINDS)
def test_every_sample_is_as_alone(variant: str, sides: str, blocks: int) -> None:
    model, bank, alone = filled(config_of(variant, sides, blocks))
    x = batch(4)
    apart = one_by_one(alone, ["a", "b", "c", None], x)
    assert (apart[0] - one_by_one(alone, ["b"], x[:1])[0]).abs().max() > 0.01  # the adapters differ
    for names in itertools.islice(itertools.permutations(["a", "b", "c", None]), 0, 24, 5):
        with torch.no_grad(), bank.select(names):
            assert_near(model(x), one_by_one(alone, names, x))
    with torch.no_grad(), bank.select(["c", "c"]):
        assert_near(model(x[:2]), one_by_one(alone, ["c", "c"], x[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_none_is_the_base_bit_for_bit(dtype: torch.dtype) -> None:
    model, bank, _ = filled(config_of("ether_plus", "both", 1), dtype=dtype)
    x = batch(4, dtype)
    base = net(dtype)(x)
    assert torch.equal(model(x), base)  # outside of a selection
    with bank.select([None, "a", None, "b"]):
        mixed = model(x)
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])
    assert not torch.equal(mixed[1], base[1])
    with bank.select([None] * 4):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), base)


def test_an_untrained_adapter_of_ether_plus_is_the_base_bit_for_bit() -> None:
    config = config_of("ether_plus", "both", 2)
    config.init_weights = True
    model, bank, _ = filled(config, ["a"])
    with bank.select(["a", "a"]):
        assert torch.equal(model(batch(2)), net()(batch(2)))


def test_the_two_halves_of_guidance_take_the_names_twice() -> None:
    model, bank, alone = filled(config_of("ether_plus", "both", 1))
    x = batch(4)
    with torch.no_grad(), bank.select(["b", "a"]):
        assert_near(model(x), one_by_one(alone, ["b", "a", "b", "a"], x))
        for count in (1, 3):
            with pytest.raises(ValueError, match=f"a batch of {count} samples, and 2 names"):
                model(x[:count])


@pytest.mark.parametrize(("variant", "sides"), VARIANTS)
def test_scales_are_those_of_an_adapter(variant: str, sides: str) -> None:
    model, bank, alone = filled(config_of(variant, sides, 1))
    names, scales, x = ["a", "b", "c", None], [0.5, 1.0, -2.0, 0.3], batch(4)
    for name, scale in zip(names[:3], scales, strict=False):
        for layer in (alone[name].conv, alone[name].positions, alone[name].head):
            layer.set_scale("default", scale)
    with torch.no_grad(), bank.select(names, scales):
        assert_near(model(x), one_by_one(alone, names, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_half_precision(dtype: torch.dtype, autocast: bool) -> None:
    kind = torch.float32 if autocast else dtype
    model, bank, alone = filled(config_of("ether_plus", "both", 1), dtype=kind)
    x, names = batch(4, kind), ["a", None, "c", "b"]
    with torch.autocast("cpu", dtype, enabled=autocast), torch.no_grad(), bank.select(names):
        assert_near(model(x), one_by_one(alone, names, x), 4 * torch.finfo(dtype).eps)


def test_channels_last() -> None:
    model, bank, alone = filled(config_of("ether_plus", "both", 4))
    x = batch(3).contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad(), bank.select(NAMES):
        assert_near(model(x), one_by_one(alone, NAMES, x))


def test_a_table_in_bf16_takes_half_and_moves_the_output_by_its_rounding() -> None:
    config = config_of("ether_plus", "both", 1)
    model, bank, _ = filled(config)
    half, small, _ = filled(config, bank_dtype=torch.bfloat16)
    assert small.table.nbytes * 2 == bank.table.nbytes
    with torch.no_grad(), bank.select(NAMES), small.select(NAMES):
        assert_near(half(batch(3)), model(batch(3)), 4 * torch.finfo(torch.bfloat16).eps)
        assert not torch.allclose(half(batch(3)), model(batch(3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("variant", "sides"), [("ether", "in"), ("ether_plus", "both")])
def test_an_adapter_costs_its_vectors(variant: str, sides: str) -> None:
    config = config_of(variant, sides, 1)
    bank = Bank(net(), config, 1000)
    numbers = sum(vector.numel() for vector in vectors(adapted(config, 0)).values())
    assert bank.table.nbytes == 1001 * 4 * numbers  # and one row for the base


def test_a_thousand_adapters_come_and_go_in_one_compiled_graph() -> None:
    config = config_of("ether_plus", "both", 1)
    model, bank, alone = filled(config)
    rows = [bank.layout.row(vectors(alone[name])) for name in NAMES]
    for name in NAMES:
        bank.remove(name)
    x = batch(2)
    torch.compiler.reset()
    counter = CompileCounter()
    run: Any = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for index in range(0, 1000, 2):
            names = [str(index), str(index + 1)]
            for number, name in enumerate(names):
                bank.put(name, rows[(index + number) % 3])
            with bank.select(names):
                found = run(x)
            if index % 100 == 0:
                assert_near(found, one_by_one(alone, [NAMES[(index + number) % 3] for number in (0, 1)], x))
            for name in list(bank.rows)[index // 2 % 2 :]:
                bank.remove(name)
        with bank.select([None, None]):
            assert_near(run(x), one_by_one(alone, [None, None], x))
    assert counter.frame_count == 1


def test_capacity_names_and_blocks_are_checked() -> None:
    model, bank, alone = filled(config_of("ether", "in", 1))
    row = bank.layout.row(vectors(alone["a"]))
    with pytest.raises(ValueError, match="holds 3 adapters"):
        bank.put("d", row)
    bank.put("a", row)  # in the place of the other one
    with pytest.raises(KeyError), bank.select(["d"]):
        pass
    for names in ([], "abc"):
        with pytest.raises(ValueError, match="one name a sample"), bank.select(names):
            pass
    with pytest.raises(ValueError, match="1 scales for 2 names"), bank.select(["a", "b"], [1.0]):
        pass
    with bank.select(["a"]), pytest.raises(ValueError, match="selected already"), bank.select(["b"]):
        pass
    with pytest.raises(RuntimeError, match="from within"), bank.select(["a"]):
        raise RuntimeError("from within")
    assert torch.equal(model(batch(2)), net()(batch(2)))  # the selection is over
    with pytest.raises(ValueError, match="belongs to a bank"):
        inject_adapter_in_model(config_of("ether", "in", 1), model)
    with pytest.raises(ValueError, match="carries adapters"):
        Bank(alone["a"], config_of("ether", "in", 1), 1)


def test_a_model_with_a_bank_can_be_copied() -> None:
    model, bank, _ = filled(config_of("ether", "in", 1))
    other = copy.deepcopy(model)
    with bank.select(["a"]):
        assert torch.equal(other(batch(1)), net()(batch(1)))


def test_layouts_name_their_difference() -> None:
    def layout(variant: str = "ether", sides: str = "in", blocks: int = 1) -> Layout:
        return Bank(net(), config_of(variant, sides, blocks), 1).layout

    first = layout()
    assert first.difference(layout()) is None
    assert first.difference(layout("ether_plus")) == "variant: ETHER; ETHER+"
    assert first.difference(layout(sides="both")) == "sides of conv: in; both"
    assert first.difference(layout(blocks=4)) == "blocks of conv.ether_in: 1 of width 8; 4 of width 2"
    fewer = Layout({name: shape for name, shape in first.shapes.items() if "head" not in name})
    assert str(first.difference(fewer)).startswith("layers: 3; 2")
    with pytest.raises(ValueError, match="no vector of ETHER"):
        Layout.of({"conv.lora_A.weight": (4, 8)})


def test_rows_hold_the_vectors() -> None:
    for kind in KINDS:
        one = adapted(config_of(*kind), 0, torch.float64)
        layout = Layout.of({name: tuple(vector.shape) for name, vector in vectors(one).items()})
        found = layout.vectors(layout.row(vectors(one)))
        assert found.keys() == vectors(one).keys()
        for name, vector in vectors(one).items():
            torch.testing.assert_close(found[name], T.unit(vector))


# PEFT's `adapter_names`


def with_several(configs: dict[str, EtherConfig], dtype: torch.dtype = torch.float32) -> tuple[Any, dict[Any, Any]]:
    """A PeftModel with these adapters, and the network with each of them alone."""
    alone = {name: adapted(config, seed, dtype) for seed, (name, config) in enumerate(configs.items())}
    (first, config), *others = configs.items()
    model: Any = get_peft_model(net(dtype), config, adapter_name=first)
    for name, config in others:
        model.add_adapter(name, config)
    for key, parameter in model.base_model.model.named_parameters():
        name = next((name for name in configs if f".{name}." in key), None)
        if name is not None:
            parameter.data.copy_(vectors(alone[name])[key.replace(f".{name}", "")])
    return model.eval(), {**alone, "__base__": net(dtype)}


@pytest.mark.parametrize(("variant", "sides", "blocks"), KINDS)
def test_adapter_names_of_peft(variant: str, sides: str, blocks: int) -> None:
    model, alone = with_several(dict.fromkeys(NAMES, config_of(variant, sides, blocks)))
    names, x = ["b", "__base__", "c", "a", "b"], batch(5)
    with torch.no_grad():
        assert_near(model(x, adapter_names=names), one_by_one(alone, names, x))
        assert torch.equal(model(x, adapter_names=["__base__"] * 5), net()(x))
        assert_near(model(x), one_by_one(alone, ["a"] * 5, x))


def test_adapter_names_of_peft_mix_shapes_and_scales() -> None:
    configs = {str(kind): config_of(*kind) for kind in KINDS}
    configs["few"] = EtherConfig(target_modules=["positions"], init_weights=False)
    model, alone = with_several(configs)
    scaled = list(configs)[-2]
    for one, name in ((model.base_model.model, scaled), (alone[scaled], "default")):
        for layer in (one.conv, one.positions, one.head):
            layer.set_scale(name, 0.5)
    names = [*configs, "__base__"]
    x = batch(len(names))
    with torch.no_grad():
        assert_near(model(x, adapter_names=names), one_by_one(alone, names, x))


def test_adapter_names_that_cannot_be_taken() -> None:
    model, _ = with_several(dict.fromkeys(NAMES, config_of("ether", "in", 1)))
    x = batch(3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(x, adapter_names=["a", "b"])
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): d; loaded: a, b, c"):
        model(x, adapter_names=["a", "b", "d"])
    with pytest.raises(TypeError, match="list of names"):
        model(x, adapter_names="abc")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x, adapter_names=NAMES)
    model.eval().merge_adapter(["a"])
    with pytest.raises(ValueError, match="merged adapters"):
        model(x, adapter_names=NAMES)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=NAMES), net()(x))
    assert model(x).shape == (3, 8)  # no hook is left


def test_mixed_batches_without_a_peft_model() -> None:
    model, alone = with_several(dict.fromkeys(NAMES, config_of("ether_plus", "both", 1)))
    bare, x = model.base_model.model, batch(4)
    with torch.no_grad(), mixed_batch(bare, ["c", None]):
        assert_near(bare(x[:2]), one_by_one(alone, ["c", "__base__"], x[:2]))
        assert_near(bare(x), one_by_one(alone, ["c", "__base__"] * 2, x))
    with torch.no_grad():
        assert_near(bare(x), one_by_one(alone, ["a"] * 4, x))


# The formula


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("shape", "dim"), [((6, 5, 12), -1), ((6, 12), -1), ((6, 12, 3, 2), -3), ((6, 2, 12, 3), -2)])
@pytest.mark.parametrize("groups", [6, 2, 1])
def test_each_group_is_transformed_as_alone(
    plus: bool, blocks: int, shape: tuple[int, ...], dim: int, groups: int
) -> None:
    """Outputs and all gradients, with scales and a fixed point, of `transform` in double precision."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    x, g, fixed = random(*shape), random(*shape), random(12)
    vs = [random(groups, blocks, 12 // blocks) for _ in range(1 + plus)]
    scales = torch.linspace(0.5, 1.5, groups, dtype=torch.float64)

    def gradients(run: Any) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, fixed, *vs)]
        y = run(*inputs)
        return [y, *torch.autograd.grad(y, inputs, g)]

    def together(x: Tensor, fixed: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        return T.transform_each(T.rows_each(u, v), x, dim, scales, fixed)

    def apart(x: Tensor, fixed: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        parts = zip(x.chunk(groups), u, [None] * groups if v is None else v, scales.tolist(), strict=True)
        return torch.cat(
            [
                T.transform(T.ether(u) if v is None else T.ether_plus(u, v), part, dim, scale, fixed)
                for part, u, v, scale in parts
            ]
        )

    for found, expected in zip(gradients(together), gradients(apart), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3, 6), -1), ((4, 6, 2, 2), -3)])
def test_second_derivatives_of_each_group(shape: tuple[int, ...], dim: int) -> None:
    x, fixed = torch.randn(*shape, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    rows = torch.randn(2, 2, 1, 6, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (rows, x, fixed)]
    assert torch.autograd.gradcheck(lambda rows, x, fixed: T.transform_each(rows, x, dim, None, fixed), inputs)
    assert torch.autograd.gradgradcheck(lambda rows, x, fixed: T.transform_each(rows, x, dim, None, fixed), inputs)
