"""Quantised bases: which layers are packed, training, sampling, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import TorchAoConfig, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import fingerprint, load_base
from ether_diffusion.models.quantized import QUANTIZERS, check_quantization, number_of_weights, quantize
from ether_diffusion.training import dreambooth
from support.optional import needs

pytestmark = pytest.mark.filterwarnings("ignore:.*cast from.*float16.*")
FAST = Sampling(scheduler="ddim", steps=2, guidance=1.0)  # guidance and extrapolation multiply what four bits round


@pytest.fixture(params=list(QUANTIZERS))
def kind(request: pytest.FixtureRequest) -> str:
    needs(request.param.split("_")[0])
    return request.param


# Each takes seven seconds.
one_kind = pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind == "bitsandbytes_4bit" else pytest.mark.slow) for kind in QUANTIZERS],
    indirect=True,
)


def sample(unet: nn.Module, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = next(unet.parameters()).dtype
    x, c = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in ((8, 16, 16), (40, 128)))
    with torch.no_grad():
        return unet(x, torch.tensor([10, 500])[:batch], c).sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_packed_and_nothing_else(kind: str, dtype: torch.dtype) -> None:
    plain, packed = load_base("tiny", unet_dtype=dtype).unet, load_base("tiny", unet_dtype=dtype).unet
    quantize(packed, kind)
    before, after = dict(plain.named_parameters()), dict(packed.named_parameters())
    linear = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in after.items():
        assert (type(parameter) is nn.Parameter) == (name not in linear)
        assert name in linear or torch.equal(parameter, before[name])
    assert not any(parameter.requires_grad for parameter in after.values())
    assert number_of_weights(packed) == number_of_weights(plain) == sum(p.numel() for p in before.values())
    assert packed.dtype == dtype
    for batch in (1, 2):  # a batch of one runs other kernels
        expected, found = sample(plain, batch), sample(packed, batch)
        assert found.dtype == dtype
        assert 0 < (found - expected).norm() < 0.06 * expected.norm()


def test_the_fingerprint_of_a_quantised_unet_differs(kind: str) -> None:
    unets = [load_base("tiny").unet for _ in range(3)]
    for unet in unets[1:]:
        quantize(unet, kind)
    assert fingerprint(unets[1]) == fingerprint(unets[2]) != fingerprint(unets[0])


def image(run: Path | None, **options: Any) -> np.ndarray:
    pipeline, _ = load_pipeline(run, base_model="tiny", **options)
    return np.asarray(next(iter(sample_images(pipeline, jobs_for(["a qwe toy"], 1), FAST, seed=3)))[1]).astype(int)


@one_kind
def test_a_run_on_a_quantised_base_resumes_exactly_and_saves_a_plain_adapter(
    make_config: Callable[..., Any], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (f"quantization={kind}", "training.checkpoint_every=1", "training.gradient_checkpointing=true")
    settings += ("data.prior=null", "training.batch_size=1")
    sampled = ("validation.prompts=[a qwe toy]",)
    dreambooth.run(make_config(tmp_path / "once", *settings, *sampled, "training.steps=2"))
    millions = number_of_weights(load_base("tiny").unet) / 1e6
    assert f"{millions:.1f}M parameters in the UNet, fp32 precision, {kind}" in capsys.readouterr().out
    dreambooth.run(make_config(tmp_path / "twice", *settings, "training.steps=1"))
    dreambooth.run(make_config(tmp_path / "twice", *settings, "training.steps=2", "training.resume=true"))
    weights = [load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("once", "twice")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    start = load_file(tmp_path / "once/checkpoints/step-000001/adapter/adapter_model.safetensors")
    assert not any(torch.equal(weights[0][key], start[key]) for key in start)

    # It works on the quantised base, on the plain one, and merged into that.
    base, plain = image(None), image(tmp_path / "once")
    assert np.abs(plain - base).max() > 1
    assert np.abs(image(tmp_path / "once", merged=True) - plain).max() <= 1
    packed = image(tmp_path / "once", quantization=kind)
    assert 0 < np.abs(packed - plain).mean() < 3
    with pytest.raises(UserError, match=r"--merge cannot write into quantised weights\. Leave out --merge"):
        load_pipeline(tmp_path / "once", merged=True, quantization=kind)


def test_half_precision_trains_on_quantised_weights(make_config: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    half = ("training.mixed_precision=bf16", "training.steps=1", "data.prior=null", f"quantization={kind}")
    AcceleratorState._reset_state()
    dreambooth.run(make_config(tmp_path / "half", *half))
    saved = load_file(tmp_path / "half/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_a_folder_that_diffusers_saved_quantised_is_a_base(make_config: Callable[..., Any], tmp_path: Path) -> None:
    torchao = needs("torchao.quantization")
    folder = tmp_path / "base"
    load_base("tiny").pipeline().save_pretrained(folder)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    UNet2DConditionModel.from_pretrained(
        folder / "unet", quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder / "unet")
    ours = load_base("tiny").unet
    quantize(ours, "torchao_int8")
    assert torch.equal(sample(load_base(str(folder)).unet), sample(ours))
    dreambooth.run(make_config(tmp_path / "run", f"base_model={folder}", "data.prior=null", "training.steps=1"))
    with pytest.raises(
        UserError, match=r"Cannot merge .* is quantised\. Generate without merging; or load the base unq"
    ):
        load_pipeline(tmp_path / "run", merged=True)
    with pytest.raises(UserError, match="was saved quantised already; leave the setting out"):
        load_pipeline(tmp_path / "run", quantization="torchao_int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="diffusers loads bitsandbytes' weights where there is a GPU")
def test_a_folder_that_cannot_be_loaded_on_this_device_is_one_error(tmp_path: Path) -> None:
    needs("bitsandbytes")
    load_base("tiny").pipeline().save_pretrained(tmp_path)
    path = tmp_path / "unet/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot load .*: No GPU found"):
        load_base(str(tmp_path))


def test_an_unknown_or_missing_quantisation_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_quantization(None)
    with pytest.raises(UserError, match=r"'int3' is unknown; allowed: bitsandbytes_4bit, .*, torchao_int8"):
        check_quantization("int3")
    for kind in QUANTIZERS:
        package = kind.split("_")[0]
        monkeypatch.setitem(sys.modules, package, None)  # so that Python finds no such module
        with pytest.raises(UserError, match=rf"quantization: {kind} needs .* not installed: pip install {package}"):
            load_pipeline(base_model="tiny", quantization=kind)


def test_a_failure_of_the_library_is_one_line(kind: str) -> None:
    unet = load_base("tiny").unet
    with pytest.raises(UserError, match=f"quantization: {kind} fails on cuda:99 in torch.float32: "):
        quantize(unet, kind, torch.device("cuda", 99))
