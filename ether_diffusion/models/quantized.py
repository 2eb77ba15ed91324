"""Frozen UNets in four or eight bits: linear layers become those of bitsandbytes or torchao, after loading."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ether_diffusion.errors import UserError

Quantization = Literal["bitsandbytes_4bit", "bitsandbytes_8bit", "torchao_int8"]


def check_quantization(kind: str | None) -> None:
    """Refuse early a quantisation that is unknown, or whose package is not installed."""
    if kind is None:
        return
    if kind not in QUANTIZERS:
        raise UserError(f"quantization: {kind!r} is unknown; allowed: {', '.join(QUANTIZERS)}, or none.")
    package = kind.split("_")[0]
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"quantization: {kind} needs a package that is not installed: pip install {package}.") from None


def quantize(model: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Quantise the weights of every `nn.Linear` of a frozen model, in place; nothing else changes.

    The model must have its final dtype: activations keep it, and a quantised weight is not cast. Layers go one by one,
    so that a device holds one unquantised layer at a time. diffusers' `from_pretrained(quantization_config=…)` builds
    the same layers, but of saved models only and, with bitsandbytes, only on a GPU.

    Args:
        kind: `bitsandbytes_4bit` is NF4 in blocks of 64 whose scales are quantised too (QLoRA), `bitsandbytes_8bit` is
            LLM.int8() with outlier threshold 6, which rounds activations too, `torchao_int8` rounds weights alone, with
            one scale per row.
        device: Where to quantise and to leave the layers; None: where they are.

    Raises:
        UserError: unknown, not installed, already quantised, an adapter is attached, or the library fails on this
            device.
    """
    check_quantization(kind)
    if hasattr(model, "peft_config"):
        raise UserError("quantization: quantise the base before an adapter is attached to it.")
    if getattr(model, "is_quantized", False):
        raise UserError(
            f"quantization: this {type(model).__name__} was saved quantised already; leave the setting out."
        )
    layers = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear]
    for name, layer in layers:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.set_submodule(name, QUANTIZERS[kind](layer, device or layer.weight.device))
        except (RuntimeError, NotImplementedError, ImportError, ValueError) as error:
            reason = " ".join(str(error).split())[:240]
            raise UserError(
                f"quantization: {kind} fails on {device or layer.weight.device} in {layer.weight.dtype}: {reason}"
            ) from error
    # PEFT's LoRA picks its bitsandbytes layers by these, as diffusers sets them.
    flags: Any = model
    flags.is_loaded_in_4bit = kind == "bitsandbytes_4bit"
    flags.is_loaded_in_8bit = kind == "bitsandbytes_8bit"


def number_of_weights(model: nn.Module) -> int:
    """The number of a model's frozen parameters before quantisation."""
    count = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                continue
            if isinstance(module, nn.Linear) and name == "weight":  # its shape may be that of packed bits
                count += module.in_features * module.out_features
            else:
                count += parameter.numel()
    return count


def dequantized(tensor: Tensor) -> Tensor:
    """The values of a torchao tensor, which packs them, as a plain tensor; any other tensor unchanged."""
    return tensor.dequantize() if hasattr(type(tensor), "__tensor_flatten__") else tensor


def _bitsandbytes(layer: nn.Linear, device: torch.device, bits: int) -> nn.Module:
    import bitsandbytes as bnb  # pyright: ignore[reportMissingImports]

    nn_: Any = bnb.nn  # the types of its weights are declared by their overloads of `to`
    sizes = {"input_features": layer.in_features, "output_features": layer.out_features, "bias": layer.bias is not None}
    scales = {"quant_type": "nf4", "compress_statistics": True}
    with torch.device("meta"):
        if bits == 4:
            packed = nn_.Linear4bit(**sizes, **scales, compute_dtype=layer.weight.dtype)
        else:
            packed = nn_.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=6.0)
    if bits == 4:
        packed.weight = nn_.Params4bit(layer.weight.data, requires_grad=False, module=packed, **scales)
        # On a CPU with AVX512-BF16, an evaluation pass would repack the weight for a kernel without gradients that
        # takes widths in multiples of 64 only, and later training steps would use it.
        packed.support_avx512bf16_for_cpu = False
    else:  # it quantises in `to(device)`, and only from the CPU's memory
        packed.weight = nn_.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    packed.bias = layer.bias
    return packed.train(layer.training).to(device)


def _torchao_int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]

    layer.to(device)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer.requires_grad_(False)


QUANTIZERS: dict[str, Callable[[nn.Linear, torch.device], nn.Module]] = {
    "bitsandbytes_4bit": functools.partial(_bitsandbytes, bits=4),
    "bitsandbytes_8bit": functools.partial(_bitsandbytes, bits=8),
    "torchao_int8": _torchao_int8,
}
