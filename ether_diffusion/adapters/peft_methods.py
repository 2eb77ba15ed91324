"""Methods that PEFT has: their settings, in their papers' terms, as PEFT's configs.

Learning rates that the ETHER paper does not give are those of PEFT's own examples, or follow from what the method's
authors say in relation to LoRA's: docs/methods.md tells where each comes from.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from peft import BOFTConfig, DeloraConfig, HRAConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from ether_diffusion.ether.frozen import is_packed, layer_features

from .method_settings import MethodSettings
from .peft_layers import butterflies, constrain
from .targets import target_modules

Dropout = Annotated[float, Field(ge=0, lt=1)]


class _LowRank(MethodSettings):
    peft_type: ClassVar[str] = "LORA"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-4, "controllable": 1e-4}
    rank: PositiveInt = 4
    alpha: float | None = None
    """Default: the rank, so that the factor is 1."""
    dropout: Dropout = 0.0

    def _config(self, dora: bool) -> PeftConfig:
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.rank if self.alpha is None else self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            use_dora=dora,
            target_modules=target_modules(self.target),
        )


class LoraSettings(_LowRank):
    """LoRA, W + (alpha / rank) B A."""

    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2106.09685"
    method: Literal["lora"] = "lora"

    @classmethod
    def made(cls, config: PeftConfig) -> bool:
        return super().made(config) and not getattr(config, "use_dora", False)

    def peft_config(self) -> PeftConfig:
        return self._config(dora=False)


class DoraSettings(_LowRank):
    """DoRA: LoRA on the directions of the weight's rows, whose lengths m are trained apart: m V / |V|, V = W + B A."""

    title: ClassVar[str] = "DoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.09353"
    method: Literal["dora"] = "dora"

    @classmethod
    def made(cls, config: PeftConfig) -> bool:
        return super().made(config) and getattr(config, "use_dora", False)

    def peft_config(self) -> PeftConfig:
        return self._config(dora=True)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _quantised(layer)


class OftSettings(MethodSettings):
    """OFT, W R on the layer's input: R is block-diagonal, its blocks rotations by Cayley's (I - Q) (I + Q)^-1."""

    title: ClassVar[str] = "OFT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2306.07280"
    peft_type: ClassVar[str] = "OFT"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-5, "controllable": 1e-5}
    method: Literal["oft"] = "oft"
    num_blocks: PositiveInt = 4
    constrained: bool = False
    """COFT: keep every block's Q within a distance of the identity's, so that R stays near it."""
    eps: PositiveFloat = 6e-5
    """COFT's bound as OFT's code has it: |Q| <= eps b^2 / sqrt(num_blocks) for a block of width b."""

    def peft_config(self) -> PeftConfig:
        # COFT's bound depends on the layer's width, and PEFT's config has one for all: `complete` sets it.
        return OFTConfig(
            r=self.num_blocks, oft_block_size=0, use_cayley_neumann=False, target_modules=target_modules(self.target)
        )

    def layer_problem(self, layer: nn.Module) -> str | None:
        # PEFT's OFT rotates the patches of the image and adds them up where they overlap: not a rotated kernel.
        return _wide_kernel(layer) or _undivided(layer, self.num_blocks)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _by_torchao(layer)

    def after_attach(self, model: nn.Module, name: str) -> None:
        if self.constrained:
            constrain(model, self.eps, name)


class BoftSettings(MethodSettings):
    """BOFT, diag(s) W R_1 … R_m: rotations in blocks that a butterfly mixes, and a scale for every output row."""

    title: ClassVar[str] = "BOFT"
    paper: ClassVar[str] = "https://arxiv.org/abs/2311.06243"
    peft_type: ClassVar[str] = "BOFT"
    # Of PEFT's examples boft_dreambooth and boft_controlnet, as are the blocks.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 3e-5, "controllable": 1e-5}
    method: Literal["boft"] = "boft"
    num_blocks: PositiveInt = 8
    butterfly_factors: PositiveInt = 1
    """m. More than one needs PEFT's CUDA extension, which is compiled when it is first asked for."""

    def peft_config(self) -> PeftConfig:
        return BOFTConfig(
            boft_block_num=self.num_blocks,
            boft_block_size=0,  # pyright: ignore[reportCallIssue]
            boft_n_butterfly_factor=self.butterfly_factors,
            target_modules=target_modules(self.target),
        )

    def layer_problem(self, layer: nn.Module) -> str | None:
        if self.butterfly_factors > 1 and not butterflies():
            return (
                f"butterfly_factors = {self.butterfly_factors} needs PEFT's CUDA extension, which cannot be built "
                "here; allowed without it: 1"
            )
        if self.butterfly_factors > 1 and self.num_blocks % 2 ** (self.butterfly_factors - 1):
            return f"num_blocks = {self.num_blocks} is no multiple of 2^(butterfly_factors - 1)"
        return _wide_kernel(layer) or _undivided(layer, self.num_blocks)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _by_torchao(layer)


class HraSettings(MethodSettings):
    """HRA, W H_1 … H_r: a product of Householder reflections on the input. With rank 1 it is ETHER with one block."""

    title: ClassVar[str] = "HRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.17484"
    peft_type: ClassVar[str] = "HRA"
    # The former of PEFT's example hra_dreambooth, the latter ETHER's, whose reflections these are.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 5e-3, "controllable": 1e-3}
    method: Literal["hra"] = "hra"
    rank: PositiveInt = 8
    """Number of reflections. Pairs of them start equal and undo each other; an odd one starts at random."""

    @property
    def starts_at_base(self) -> bool:
        return self.rank % 2 == 0

    def peft_config(self) -> PeftConfig:
        return HRAConfig(r=self.rank, target_modules=target_modules(self.target))

    def layer_problem(self, layer: nn.Module) -> str | None:
        return _odd_convolution(layer)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _quantised(layer)


class VeraSettings(MethodSettings):
    """VeRA, W + diag(b) B diag(d) A: A and B are random, frozen, and shared by all layers."""

    title: ClassVar[str] = "VeRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2310.11454"
    peft_type: ClassVar[str] = "VERA"
    # Ours: ten times LoRA's, as only two vectors a layer are trained.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}
    method: Literal["vera"] = "vera"
    rank: PositiveInt = 256
    d_initial: float = 0.1
    projection_seed: NonNegativeInt = 0
    """Of A and B, which are saved with the adapter."""
    dropout: Dropout = 0.0

    def peft_config(self) -> PeftConfig:
        return VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            projection_prng_key=self.projection_seed,
            vera_dropout=self.dropout,
            target_modules=target_modules(self.target),
        )

    def layer_problem(self, layer: nn.Module) -> str | None:
        return _linear_only(layer)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _by_torchao(layer)


class DeloraSettings(MethodSettings):
    """DeLoRA, W + (lambda / r) B diag(1 / |a_i| |b_i|) A diag(|w_j|): a low rank of bounded strength lambda."""

    title: ClassVar[str] = "DeLoRA"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.18225"
    peft_type: ClassVar[str] = "DELORA"
    # Ten times LoRA's, the lower end of what its authors advise in PEFT's documentation; so are rank and boundary.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}
    method: Literal["delora"] = "delora"
    rank: PositiveInt = 8
    boundary: PositiveFloat = 15.0
    """Where lambda, which is trained too, starts."""
    dropout: Dropout = 0.0

    def peft_config(self) -> PeftConfig:
        return DeloraConfig(
            r=self.rank,
            delora_lambda=self.boundary,  # pyright: ignore[reportArgumentType]
            module_dropout=self.dropout,
            target_modules=target_modules(self.target),
        )

    def layer_problem(self, layer: nn.Module) -> str | None:
        return _linear_only(layer)

    @classmethod
    def weight_problem(cls, layer: nn.Module) -> str | None:
        return _quantised(layer)


def _undivided(layer: nn.Module, blocks: int) -> str | None:
    features = layer_features(layer)[0]
    if features % blocks or features // blocks < 2:
        return f"its {features} input features do not divide into num_blocks = {blocks} blocks at least two wide"
    return None


def _linear_only(layer: nn.Module) -> str | None:
    return None if isinstance(layer, nn.Linear) else f"it is a {type(layer).__name__}, allowed are linear layers"


def _odd_convolution(layer: nn.Module) -> str | None:
    conv: Any = layer
    if not isinstance(layer, nn.Conv2d):
        return None
    if conv.groups != 1 or conv.dilation != (1, 1):
        return "it is a convolution with groups or dilation"
    return None if len({*conv.kernel_size}) == len({*conv.padding}) == 1 else "it is a convolution of unequal sides"


def _wide_kernel(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1):
        return f"it is a {'x'.join(map(str, layer.kernel_size))} convolution, allowed are linear layers and 1x1 ones"
    return _odd_convolution(layer)


def _quantised(layer: nn.Module) -> str | None:
    return "its weight is quantised, and the method computes with it" if is_packed(layer) else None


def _by_torchao(layer: nn.Module) -> str | None:
    weight: Any = layer.weight
    return (
        None if type(weight.data) is Tensor else "torchao quantised it, which PEFT's layers of this method do not take"
    )
