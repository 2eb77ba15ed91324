"""Training options: each has the effect of its formula, and resumes exactly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth
from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.optimizers import make_optimizer
from support.optional import needs
from support.runs import assert_same_run, losses, stopped_after, weights
from support.tasks import make_task

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]
PLAIN = ("data.prior=null", "training.checkpoint_every=1")


def prepared(make_config: MakeConfig, folder: Path, *overrides: str, prediction: str = "epsilon") -> tuple[Any, Any]:
    task = make_task(make_config, folder, *overrides, prediction=prediction)
    return task, task.prepare(task.collate([task.dataset[k] for k in range(4)]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_the_papers(make_config: MakeConfig, tmp_path: Path, prediction: str) -> None:
    """Hang et al. 2023: min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v, with SNR = a^2 / (1 - a^2)."""
    task, batch = prepared(make_config, tmp_path, "training.min_snr_gamma=5", prediction=prediction)
    for t, weight in zip(batch["timesteps"], batch["weights"], strict=True):
        a2 = float(task.objective.scheduler.alphas_cumprod[t])
        snr = a2 / (1 - a2)
        expected = min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1)
        assert float(weight) == pytest.approx(expected, rel=1e-4)
    # The weights weigh: doubled, they double the loss.
    once = float(task.module(batch)["loss"].detach())
    twice = float(task.module({**batch, "weights": 2 * batch["weights"]})["loss"].detach())
    assert twice == pytest.approx(2 * once, rel=1e-5)


def test_noise_offset_shifts_every_channel_by_one_number(make_config: MakeConfig, tmp_path: Path) -> None:
    _, plain = prepared(make_config, tmp_path)
    _, offset = prepared(make_config, tmp_path, "training.noise_offset=0.1")
    shift = offset["target"] - plain["target"]
    assert torch.allclose(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift), atol=1e-6)
    assert 0.03 < float(shift.mean(dim=(2, 3)).std()) < 0.3


def test_the_adapter_is_the_average_of_the_trained_weights(make_config: MakeConfig, tmp_path: Path) -> None:
    """shadow <- d shadow + (1 - d) w, from the start on, with diffusers' d = min(decay, (1 + k) / (10 + k))."""
    dreambooth.run(make_config(tmp_path / "plain", *PLAIN, "training.steps=3"))
    dreambooth.run(make_config(tmp_path / "ema", *PLAIN, "training.steps=3", "training.ema_decay=0.2"))
    assert losses(tmp_path / "ema") == losses(tmp_path / "plain")
    still = ("training.steps=1", "training.learning_rate=0", "training.require_certificate=false")
    dreambooth.run(make_config(tmp_path / "start", *PLAIN, *still))
    shadow = weights(tmp_path / "start")
    for k in (1, 2, 3):
        decay = 0.0 if k == 1 else min(0.2, (1 + k - 1) / (10 + k - 1))
        step = weights(tmp_path / "plain/checkpoints" / f"step-{k:06d}")
        shadow = {key: decay * value + (1 - decay) * step[key] for key, value in shadow.items()}
    for key, value in weights(tmp_path / "ema").items():
        assert torch.allclose(value, shadow[key], atol=1e-6)


def test_an_averaged_run_resumes_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    ema = (*PLAIN, "training.ema_decay=0.5")
    dreambooth.run(make_config(tmp_path / "once", *ema, "training.steps=3"))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *ema, "training.steps=3", "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000003")


def test_a_text_encoder_adapter_is_trained_saved_resumed_and_used(make_config: MakeConfig, tmp_path: Path) -> None:
    text = (*PLAIN, "adapter.text_encoder=true")
    dreambooth.run(make_config(tmp_path / "once", *text, "training.steps=3"))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *text, "training.steps=3", "training.resume=true"))
    folder = "adapter/text_encoder"
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000003")
    # 4 layers with 4 linears of 128 features, u and v on both sides; and they have moved.
    trained = weights(tmp_path / "once", folder)
    assert sum(tensor.numel() for tensor in trained.values()) == 4 * 4 * 4 * 128
    early = weights(tmp_path / "twice/checkpoints/step-000002", folder)
    assert not any(torch.equal(trained[key], early[key]) for key in trained)
    # Plain PEFT reads it.
    PeftModel.from_pretrained(load_base("tiny").text_encoder, str(tmp_path / "once" / folder))
    # It counts in the images and in the digest.
    jobs = jobs_for(["a qwe toy"], 1)

    def image(run: Path) -> bytes:
        pipeline, _ = load_pipeline(run)
        return next(iter(sample_images(pipeline, jobs, Sampling(steps=2), seed=0)))[1].tobytes()

    whole, digest = image(tmp_path / "once"), read_adapter(tmp_path / "once").digest
    (tmp_path / "once/adapter/text_encoder").rename(tmp_path / "aside")
    assert image(tmp_path / "once") != whole
    assert read_adapter(tmp_path / "once").digest != digest


def test_prodigy_trains_and_resumes_exactly(make_config: MakeConfig, tmp_path: Path) -> None:
    prodigy = (*PLAIN, "training.optimizer=prodigy")
    dreambooth.run(make_config(tmp_path / "once", *prodigy, "training.steps=3"))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *prodigy, "training.steps=3", "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000003")
    row = json.loads((tmp_path / "once/metrics.jsonl").read_text().splitlines()[0])
    assert row["learning_rate"] == 1.0


def test_eight_bit_adamw_resumes_exactly_and_is_adamw_where_tensors_are_small(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """bitsandbytes keeps states of fewer than 4,096 numbers, as all of ETHER's are, in fp32."""
    needs("bitsandbytes")
    start, small = torch.randn(320), []
    gradients = 1e-3 * torch.randn(10, 320)
    for name in ("adamw", "adamw_8bit"):
        parameter = torch.nn.Parameter(start.clone())
        settings = TrainingSettings.model_validate({"steps": 1, "optimizer": name})
        optimizer = make_optimizer(settings, [{"params": [parameter], "lr": 6e-3}])
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        small.append(parameter.detach())
    torch.testing.assert_close(*small, rtol=0, atol=1e-6)

    large = (*PLAIN, "adapter.method=lora", "adapter.rank=64")
    eight_bit = (*large, "training.optimizer=adamw_8bit")
    dreambooth.run(make_config(tmp_path / "once", *eight_bit, "training.steps=3"))
    stopped_after(tmp_path / "once", 2, tmp_path / "twice")
    dreambooth.run(make_config(tmp_path / "twice", *eight_bit, "training.steps=3", "training.resume=true"))
    assert_same_run(tmp_path / "once", tmp_path / "twice", "step-000003")
    dreambooth.run(make_config(tmp_path / "exact", *large, "training.steps=3"))
    exact, rounded = weights(tmp_path / "exact"), weights(tmp_path / "once")
    differences = [float((rounded[key] - value).abs().max()) for key, value in exact.items() if value.numel() >= 4096]
    assert 0 < max(differences) < 1e-3


@pytest.mark.parametrize(("optimizer", "package"), [("adamw_8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_an_absent_package_is_one_line(monkeypatch: pytest.MonkeyPatch, optimizer: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # what Python takes for "not installed"
    settings = TrainingSettings.model_validate({"steps": 1, "optimizer": optimizer})
    with pytest.raises(UserError, match=rf"training\.optimizer: {optimizer} needs .*pip install {package}"):
        make_optimizer(settings, [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
