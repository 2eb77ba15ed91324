"""Methods that PEFT has: their settings, in their papers' terms, as PEFT's configs.

Learning rates that the ETHER paper does not give are those of PEFT's examples, or are derived from LoRA's by what the
method's authors say: docs/methods.md says where each comes from.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from ether_diffusion.ether.frozen import layer_features
from ether_diffusion.limits import Blocks, Bound, PositiveStrength, Rank, Seed, ShareBelowAll, SignedStrength

from .method_settings import MethodSettings
from .peft_layers import butterflies, constrain, project_rotations, reflections_low_rank, vera_projections


class _LowRank(MethodSettings):
    peft_type = "LORA"
    peft_names: ClassVar[dict[str, str]] = {"rank": "r", "lora_alpha": "lora_alpha", "dropout": "lora_dropout"}
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-4, "controllable": 1e-4}
    rank: Rank = 4
    alpha: Bound | None = None
    """Default: the rank, so that the factor is 1."""
    dropout: ShareBelowAll = 0.0

    @property
    def lora_alpha(self) -> float:
        return self.rank if self.alpha is None else self.alpha


class LoraSettings(_LowRank):
    """LoRA, W + (alpha / rank) B A."""

    title = "LoRA"
    paper = "https://arxiv.org/abs/2106.09685"
    peft_names: ClassVar[dict[str, str]] = {**_LowRank.peft_names, "peft_start": "init_lora_weights"}
    peft_variant: ClassVar[dict[str, Any]] = {"use_dora": False}
    method: Literal["lora"] = "lora"
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """How A starts; B starts at 0. kaiming: PEFT's, uniform within 1 / sqrt(in). gaussian: normal with deviation
    1 / rank, as in diffusers 0.17, on which OFT's code, and with it the ETHER paper's LoRA, was built."""

    @property
    def peft_start(self) -> bool | str:
        return self.init_lora_weights if self.init_lora_weights == "gaussian" else True

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        return layer.scaling[name] * layer.lora_B[name].weight.flatten(1), layer.lora_A[name].weight


class DoraSettings(_LowRank):
    """DoRA: LoRA on the directions of the weight's rows, whose lengths m are trained apart: m V / |V|, V = W + B A."""

    title = "DoRA"
    paper = "https://arxiv.org/abs/2402.09353"
    has_scale = False  # at scale 0 its rows would still have the trained lengths
    sequential_offload = False
    refused_weights = "quantised"
    peft_variant: ClassVar[dict[str, Any]] = {"use_dora": True}
    own_keys = "*.lora_magnitude_vector*"
    method: Literal["dora"] = "dora"


class _Rotations(MethodSettings):
    # On wider kernels PEFT's OFT rotates the patches of the image and adds them up: no kernel does that.
    convolutions = "1x1"
    has_scale = False
    refused_weights = "torchao"
    keeps_fp32 = True
    num_blocks: Blocks = 4

    def layer_problem(self, layer: nn.Module) -> str | None:
        features = layer_features(layer)[0]
        undivided = features % self.num_blocks or features // self.num_blocks < 2
        blocks = f"num_blocks = {self.num_blocks} blocks at least two wide"
        problem = f"its {features} input features do not divide into {blocks}" if undivided else None
        return super().layer_problem(layer) or problem


class OftSettings(_Rotations):
    """OFT, W R on the layer's input: R is block-diagonal, its blocks rotations by Cayley's (I - Q) (I + Q)^-1."""

    title = "OFT"
    paper = "https://arxiv.org/abs/2306.07280"
    peft_type = "OFT"
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-5, "controllable": 1e-5}
    peft_names: ClassVar[dict[str, str]] = {"num_blocks": "r"}
    peft_values: ClassVar[dict[str, Any]] = {"oft_block_size": 0, "use_cayley_neumann": False}
    method: Literal["oft"] = "oft"
    constrained: bool = False
    """COFT: bound the norm of every block's Q, so that R stays near the identity."""
    eps: PositiveStrength = 6e-5
    """COFT's bound as in OFT's code: |Q| <= eps b^2 / sqrt(num_blocks) for a block of width b."""

    def after_attach(self, model: nn.Module, name: str) -> None:
        if self.constrained:  # the bound depends on the layer's width, and PEFT's config has one for all layers
            constrain(model, self.eps, name)

    @classmethod
    def project(cls, model: nn.Module, name: str) -> None:
        project_rotations(model, name)


class BoftSettings(_Rotations):
    """BOFT, diag(s) W R_1 … R_m: rotations in blocks that a butterfly mixes, and a scale for every output row."""

    title = "BOFT"
    paper = "https://arxiv.org/abs/2311.06243"
    peft_type = "BOFT"
    sequential_offload = False
    # Those of PEFT's examples boft_dreambooth and boft_controlnet, as are the blocks.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 3e-5, "controllable": 1e-5}
    peft_names: ClassVar[dict[str, str]] = {
        "num_blocks": "boft_block_num",
        "butterfly_factors": "boft_n_butterfly_factor",
    }
    peft_values: ClassVar[dict[str, Any]] = {"boft_block_size": 0}
    method: Literal["boft"] = "boft"
    num_blocks: Blocks = 8
    butterfly_factors: Blocks = 1
    """m. More than one needs PEFT's CUDA extension, which is compiled when it is first used."""

    def layer_problem(self, layer: nn.Module) -> str | None:
        if self.butterfly_factors > 1 and not butterflies():
            return (
                f"butterfly_factors = {self.butterfly_factors} needs PEFT's CUDA extension, which cannot be built "
                "here; allowed without it: 1"
            )
        if self.butterfly_factors > 1 and self.num_blocks % 2 ** (self.butterfly_factors - 1):
            return f"num_blocks = {self.num_blocks} is not a multiple of 2^(butterfly_factors - 1)"
        return super().layer_problem(layer)


class HraSettings(MethodSettings):
    """HRA, W H_1 … H_r: a product of Householder reflections on the input. With rank 1 it is ETHER with one block."""

    title = "HRA"
    paper = "https://arxiv.org/abs/2405.17484"
    peft_type = "HRA"
    convolutions = "square"
    has_scale = False
    sequential_offload = False
    refused_weights = "quantised"
    keeps_fp32 = True
    # The first from PEFT's example hra_dreambooth, the second ETHER's, which learns the same reflections.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 5e-3, "controllable": 1e-3}
    peft_names: ClassVar[dict[str, str]] = {"rank": "r"}
    method: Literal["hra"] = "hra"
    rank: Rank = 8
    """Number of reflections. Pairs of them start equal and undo each other; an odd one starts at random."""

    @property
    def starts_at_base(self) -> bool:
        return self.rank % 2 == 0

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        return reflections_low_rank(layer.get_base_layer().weight, layer.hra_u[name])


class VeraSettings(MethodSettings):
    """VeRA, W + diag(b) B diag(d) A: A and B are random, frozen, and shared by all layers."""

    title = "VeRA"
    paper = "https://arxiv.org/abs/2310.11454"
    peft_type = "VERA"
    convolutions = "none"
    has_scale = False
    sequential_offload = False
    refused_weights = "torchao"
    frozen_keys = ("base_model.vera_*",)  # its projections
    # Our choice: ten times LoRA's, because only two vectors a layer are trained.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "d_initial": "d_initial",
        "projection_seed": "projection_prng_key",
        "dropout": "vera_dropout",
    }
    method: Literal["vera"] = "vera"
    rank: Rank = 256
    d_initial: SignedStrength = 0.1
    projection_seed: Annotated[Seed, Field(ge=0)] = 0
    """Seed of A and B, which are saved with the adapter."""
    dropout: ShareBelowAll = 0.0

    @classmethod
    def shared_tensors(cls, model: nn.Module, name: str) -> dict[str, Tensor]:
        return vera_projections(model, name)

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        B, A = layer.vera_B[name][: layer.out_features], layer.vera_A[name][:, : layer.in_features]
        return layer.vera_lambda_b[name].unsqueeze(1) * B, layer.vera_lambda_d[name].unsqueeze(1) * A


class DeloraSettings(MethodSettings):
    """DeLoRA, W + (lambda / r) B diag(1 / |a_i| |b_i|) A diag(|w_j|): a low rank of bounded strength lambda."""

    title = "DeLoRA"
    paper = "https://arxiv.org/abs/2503.18225"
    peft_type = "DELORA"
    convolutions = "none"
    has_scale = False
    sequential_offload = False
    refused_weights = "quantised"
    frozen_keys = ("*.delora_w_norm",)  # norms of the base's weights
    # Ten times LoRA's, the lower end of what its authors advise in PEFT's documentation, as are rank and boundary.
    learning_rates: ClassVar[dict[str, float]] = {"dreambooth": 6e-3, "controllable": 1e-3}
    peft_names: ClassVar[dict[str, str]] = {"rank": "r", "boundary": "delora_lambda", "dropout": "module_dropout"}
    method: Literal["delora"] = "delora"
    rank: Rank = 8
    boundary: Bound = 15.0
    """The initial value of lambda, which is trained too."""
    dropout: ShareBelowAll = 0.0

    @classmethod
    def low_rank(cls, layer: Any, name: str) -> tuple[Tensor, Tensor] | None:
        B, A = layer.delora_B[name], layer.delora_A[name]
        lengths = B.norm(dim=0).clamp_min(1e-4) * A.norm(dim=1).clamp_min(1e-4)  # as PEFT bounds them
        strength = layer.delora_lambda[name] / (layer.r[name] * lengths)
        return B * strength, A * layer.delora_w_norm[name]
