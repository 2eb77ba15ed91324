"""PEFT's methods against their papers: the layer as a dense float64 matrix, built from the adapter's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HRAConfig, inject_adapter_in_model
from torch import Tensor, nn

from ether_diffusion.adapters.attach import attach, trainable_parameters
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.adapters.peft_methods import OftSettings
from ether_diffusion.adapters.saving import adapter_state
from ether_diffusion.ether import EtherConfig

PREFIX = "base_model.model."


class Layers(nn.Module):
    """Two layers of unequal sides, so that shared projections are cut to size and transposed sides do not go unseen."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.narrow, self.wide = nn.Linear(16, 24), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(torch.cat([self.narrow(x), x[..., :8]], dim=-1))


def cayley(Q: Tensor) -> Tensor:  # noqa: N803 - the paper's name
    identity = torch.eye(len(Q), dtype=torch.float64)
    return (identity - Q) @ torch.linalg.inv(identity + Q)


def oft(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    blocks = []
    for entries in t["oft_R.weight"]:
        width = W.shape[1] // 4
        Q = torch.zeros(width, width, dtype=torch.float64)
        rows, columns = torch.triu_indices(width, width, 1)
        Q[rows, columns] = entries
        blocks.append(cayley(Q - Q.T))
    return W @ torch.block_diag(*blocks).T


def boft(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    rotations = [cayley((data - data.T) / 2) for data in t["boft_R"][0]]
    return t["boft_s"] * (W @ torch.block_diag(*rotations).T)


def hra(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    for u in t["hra_u"].T:
        W = W @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return W


def lora(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    return W + t["lora_B.weight"] @ t["lora_A.weight"]


def dora(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    V = lora(W, t, _)
    return t["lora_magnitude_vector"][:, None] * V / V.norm(dim=1, keepdim=True)


def vera(W: Tensor, t: dict[str, Tensor], shared: dict[str, Tensor]) -> Tensor:  # noqa: N803
    A, B = shared["base_model.vera_A"][:, : W.shape[1]], shared["base_model.vera_B"][: W.shape[0]]
    return W + torch.diag(t["vera_lambda_b"]) @ B @ torch.diag(t["vera_lambda_d"]) @ A


def delora(W: Tensor, t: dict[str, Tensor], _: dict[str, Tensor]) -> Tensor:  # noqa: N803
    A, B = t["delora_A"], t["delora_B"]
    strengths = t["delora_lambda"] / len(A) / (A.norm(dim=1) * B.norm(dim=0))
    return W + B @ torch.diag(strengths) @ A @ torch.diag(W.norm(dim=0))


REFERENCES: dict[str, Callable[..., Tensor]] = {
    method.__name__: method for method in (oft, boft, hra, lora, dora, vera, delora)
}


def adapted(settings: Any, size: float = 0.1) -> tuple[Any, Any]:
    """The bare layers, and the same with an adapter in them that is away from its start."""
    base, model = Layers(), Layers()
    config = settings.peft_config()
    attach_to: Any = model
    attach_to.set_adapter = lambda name: None  # what diffusers' and transformers' models have
    attach(model, settings)
    assert config.target_modules == {"narrow", "wide"}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return base, model


@pytest.mark.parametrize("method", REFERENCES)
def test_a_layer_equals_its_formula(method: str) -> None:
    small = {"rank": 5} if method == "vera" else {}
    settings: Any = METHODS[method]
    base, model = adapted(settings(target=["narrow", "wide"], **small))
    state = {key: tensor.double() for key, tensor in adapter_state(model).items()}
    shared = {key: tensor for key, tensor in state.items() if not key.startswith(PREFIX)}
    for name in ("narrow", "wide"):
        layer, prefix = base.get_submodule(name), f"{PREFIX}{name}."
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        W = REFERENCES[method](layer.weight.detach().double(), own, shared)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
        expected = nn.functional.linear(x.double(), W, None if layer.bias is None else layer.bias.double())
        assert torch.allclose(model.get_submodule(name)(x).double(), expected, atol=1e-5)
        assert (expected - layer(x)).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:The symmetric initialization")
def test_hra_of_rank_one_is_ether() -> None:
    reflected: Any
    ether: Any
    reflected, ether = Layers(), Layers()
    inject_adapter_in_model(HRAConfig(r=1, target_modules=["narrow"]), reflected)
    inject_adapter_in_model(EtherConfig(variant="ether", target_modules=["narrow"]), ether)
    ether.narrow.ether_in["default"].u.data.copy_(reflected.narrow.hra_u["default"].T)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(ether(x), reflected(x), atol=1e-6)


EPS = 1e-3


def original_coft(R: Tensor, eps: float) -> Tensor:  # noqa: N803
    """The projection that OFT's authors publish, on (num_blocks, width, width): their eps is multiplied by width^2."""
    bound = eps * R.shape[1] ** 2 / math.sqrt(R.shape[0])
    norms = R.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norms <= bound, R, bound * R / norms)


@pytest.mark.parametrize("size", [0.001, 1.0])
def test_a_constrained_adapter_stays_in_the_ball_of_its_authors(size: float) -> None:
    """Of every layer its own, whose bound grows with its width."""
    settings = OftSettings(target=["narrow", "wide"], constrained=True, eps=EPS)
    _, free = adapted(settings.model_copy(update={"constrained": False}), size)
    _, model = adapted(settings, size)
    model(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)))
    for name, width in (("narrow", 4), ("wide", 8)):
        rotation, raw = (m.get_submodule(name).oft_R["default"] for m in (model, free))
        skew = raw._pytorch_skew_symmetric(raw.weight, width).detach()
        expected, found = original_coft(skew, EPS), rotation._pytorch_skew_symmetric(rotation.weight, width).detach()
        assert torch.allclose(found, expected, rtol=1e-4)
        assert torch.equal(found, skew) == (size < 0.01)
        assert (found.flatten(1).norm(dim=1) <= EPS * width**2 / 2 * (1 + 1e-6)).all()


def test_a_saved_constrained_adapter_is_inside_the_ball_and_stays_as_it_is() -> None:
    """A resumed run then equals one that was never stopped, bit for bit, and other programs read plain OFT."""
    _, model = adapted(OftSettings(target=["narrow", "wide"], constrained=True, eps=EPS), size=1.0)
    first = adapter_state(model)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    output = model(x)
    second = adapter_state(model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(model(x), output)
    assert not model.peft_config["default"].coft
