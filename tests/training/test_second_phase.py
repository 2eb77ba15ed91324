"""Magnitudes after another run, in both tasks: the run folder, exact resume, images, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.config import ConfigError, load_config
from ether_diffusion.errors import UserError
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import controllable, dreambooth

MakeConfig = Callable[..., Any]
WEIGHTS, ENCODER = "adapter_model.safetensors", "condition_encoder/diffusion_pytorch_model.safetensors"
SHORT = ("data.prior=null", "training.batch_size=1", "training.steps=2", "training.checkpoint_every=1")


def magnitude(after: Path) -> tuple[str, ...]:
    """Scales that move far in two steps."""
    return (
        f"adapter={{method: magnitude, after: '{after}', target: null}}",
        "training.learning_rate=0.1",
    )


@pytest.fixture(scope="module")
def oft(make_config: MakeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first") / "oft"
    dreambooth.run(make_config(folder, "adapter={method: oft}", "training.learning_rate=0.01", *SHORT))
    return folder


@pytest.fixture(scope="module")
def refit(make_config: MakeConfig, oft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second") / "refit"
    dreambooth.run(make_config(folder, *magnitude(oft), *SHORT))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dense_unet(adapter: Path) -> Any:
    """The miniature's UNet with the weights `diag(s) W R^T`, R by Cayley's formula: no tuner takes part."""
    unet = load_base("tiny").unet
    scales, rotations = load_file(adapter / WEIGHTS), load_file(adapter / "before" / WEIGHTS)
    for key, upper in rotations.items():
        name = key.removeprefix("base_model.model.").removesuffix(".oft_R.weight")
        weight: Any = unet.get_submodule(name).weight
        n, width = len(upper), weight.shape[1] // len(upper)
        skew = torch.zeros(n, width, width, dtype=torch.float64)
        rows, columns = torch.triu_indices(width, width, 1)
        skew[:, rows, columns] = upper.double()
        skew = skew - skew.mT
        identity = torch.eye(width, dtype=torch.float64)
        rotation = torch.block_diag(*((identity - q) @ torch.linalg.inv(identity + q) for q in skew))
        scale = 1 + scales[key.replace("oft_R.weight", "magnitude_rows.change")].double()
        weight.data = (scale[:, None] * (weight.data.double() @ rotation.T)).float()
    return unet


def test_the_run_folder_and_its_checkpoints_hold_both_adapters(oft: Path, refit: Path, capsys: Any) -> None:
    for folder in (refit / "adapter", refit / "checkpoints" / "step-000001" / "adapter"):
        assert files(folder / "before") == files(oft / "adapter")
    saved, before = read_adapter(refit), read_adapter(oft)
    assert saved.method == "OFT + Magnitude"
    assert saved.tensors.keys() == {key.replace("oft_R.weight", "magnitude_rows.change") for key in before.tensors}
    assert all(tensor.abs().max() > 0.05 for tensor in saved.tensors.values())
    config = load_config(dreambooth.DreamBoothConfig, refit / "config.yaml")
    assert config.adapter.target == ["to_k", "to_out.0", "to_q", "to_v"]

    import ether_diffusion_cli

    assert ether_diffusion_cli.main(["inspect", str(refit)]) == 0
    shown = capsys.readouterr().out
    assert f"{saved.own_parameters + before.parameters:,} in {len(saved.tensors)} tensors" in shown
    assert f"before: OFT, {before.parameters:,} parameters" in shown.replace(str(refit / "adapter") + "/", "")


@pytest.mark.parametrize("merged", [False, True])
def test_images_are_those_of_a_dense_reference(refit: Path, merged: bool) -> None:
    pipeline, _ = load_pipeline(refit, merged=merged)
    base = load_base("tiny")
    reference, plain = base.with_denoiser(dense_unet(refit / "adapter")).pipeline(), base.pipeline()
    jobs, images = jobs_for(["a photo of qwe toy"], 1), []
    for one in (pipeline, reference, plain):
        sampled = sample_images(one, jobs, Sampling(steps=2), seed=0, resolution=64)
        images.append(np.asarray(next(iter(sampled))[1], dtype=np.int16))
    assert abs(images[0] - images[1]).max() <= 1
    assert abs(images[0] - images[2]).max() > 10


def test_a_scale_of_zero_is_the_previous_adapter(oft: Path, refit: Path) -> None:
    states = []
    for run, scale in ((refit, 0.0), (oft, 1.0)):
        pipeline, _ = load_pipeline(run, merged=True, scale=scale)
        states.append(pipeline.unet.state_dict())
    assert all(torch.equal(states[0][key], tensor) for key, tensor in states[1].items())


def test_a_run_resumed_without_the_previous_run_ends_bitwise_the_same(
    make_config: MakeConfig, oft: Path, refit: Path, tmp_path: Path
) -> None:
    after, folder = Path(shutil.copytree(oft, tmp_path / "oft")), tmp_path / "resumed"
    dreambooth.run(make_config(folder, *magnitude(after), *SHORT, "training.steps=1"))
    shutil.rmtree(after)
    dreambooth.run(make_config(folder, *magnitude(after), *SHORT, "training.resume=true"))
    assert (folder / "adapter" / WEIGHTS).read_bytes() == (refit / "adapter" / WEIGHTS).read_bytes()
    assert files(folder / "adapter" / "before") == files(oft / "adapter")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter.after={nowhere}",), r"^adapter\.after: .*nowhere is not a folder; expected a run folder"),
        (("quantization=torchao_int8",), r"^quantization: torchao_int8, but adapter\.after is to be merged"),
        (
            ("base_model=some/other",),
            r"^base_model: some/other, but adapter\.after: .* was trained on tiny\. Set base_",
        ),
        (("adapter.target=[conv_inn]",), r"^adapter\.target: 'conv_inn' matches no linear or convolution layer"),
    ],
)
def test_a_second_phase_that_cannot_start_is_refused_in_one_line_and_writes_nothing(
    make_config: MakeConfig, oft: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    given = [override.format(nowhere=tmp_path / "nowhere") for override in overrides]
    with pytest.raises(UserError, match=message) as error:
        dreambooth.run(make_config(tmp_path / "run", *magnitude(oft), *SHORT, *given))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_controllable_second_phase_keeps_the_encoder_loads_and_resumes(
    make_config: MakeConfig, make_controllable: MakeConfig, tmp_path: Path
) -> None:
    first, second, resumed = (tmp_path / name for name in ("first", "second", "resumed"))
    common = ("training.batch_size=1", "training.checkpoint_every=1")
    controllable.run(make_controllable(first, "adapter={method: ether}", *common))
    refit = (*magnitude(first), *common)
    controllable.run(make_controllable(second, *refit, "validation.images=1", "validation.every=2"))
    for folder in (second, second / "checkpoints" / "step-000001"):
        assert (folder / ENCODER).read_bytes() == (first / ENCODER).read_bytes()
        assert files(folder / "adapter" / "before") == files(first / "adapter")
    assert read_adapter(second).method == "ETHER + Magnitude"
    resolved = load_config(controllable.ControllableConfig, second / "config.yaml")
    assert "ff.net.0.proj" in resolved.adapter.target  # pyright: ignore[reportAttributeAccessIssue]
    assert resolved.training.encoder_learning_rate is None
    pipeline: Any
    pipeline, _ = load_pipeline(second)
    assert type(pipeline).__name__ == "ControllablePipeline"

    controllable.run(make_controllable(resumed, *refit, "training.steps=1"))
    moved = first.rename(tmp_path / "elsewhere")
    controllable.run(make_controllable(resumed, *refit, "training.resume=true"))
    for name in (ENCODER, f"adapter/{WEIGHTS}"):
        assert (resumed / name).read_bytes() == (second / name).read_bytes()

    with pytest.raises(UserError, match=r"is a controllable run, whose condition_encoder/ a DreamBooth run would drop"):
        dreambooth.run(make_config(tmp_path / "other", *magnitude(moved), *SHORT))
    alone = Path(shutil.copytree(moved / "adapter", tmp_path / "alone"))
    with pytest.raises(
        UserError, match=r"adapter\.after: .* holds no condition_encoder/; expected the folder of a con"
    ):
        controllable.run(make_controllable(tmp_path / "other", *magnitude(alone), *common))
    with pytest.raises(ConfigError, match=r"adapter\.after freezes the encoder; leave it out"):
        make_controllable(tmp_path / "other", *refit, "training.encoder_learning_rate=0.001")


def test_a_run_that_trained_its_encoder_alone_has_no_adapter_to_follow(
    make_controllable: MakeConfig, tmp_path: Path
) -> None:
    controllable.run(make_controllable(tmp_path / "first", "adapter={method: none}", "training.steps=1"))
    with pytest.raises(UserError, match=r"^adapter\.after: .*first holds no adapter_config\.json"):
        controllable.run(make_controllable(tmp_path / "run", *magnitude(tmp_path / "first")))
