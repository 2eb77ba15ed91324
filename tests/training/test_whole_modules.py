"""Methods that train whole modules, the UNet or a ControlNet: runs, resume, files, images, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import ether_diffusion_cli
from ether_diffusion.benchmark.worker import Trained
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.image_records import base_digest, base_of
from ether_diffusion.generation import load_pipeline, read_run
from ether_diffusion.models.bases import load_base
from ether_diffusion.models.module_files import WEIGHTS
from ether_diffusion.training import controllable, dreambooth
from ether_diffusion.training.config import TrainingSettings
from ether_diffusion.training.controllable import ControllableConfig
from ether_diffusion.training.dreambooth import DreamBoothConfig
from ether_diffusion.training.run_folder import RunFolder, disk_line
from ether_diffusion.training.schedule import make_plan
from ether_diffusion.training.training_base import reload_in_fp32
from support.runs import assert_same_run, same

Train = Callable[..., Any]
MODULES = {"full": "unet", "controlnet": "controlnet"}
ONE_STEP_EACH = ("training.batch_size=1", "training.checkpoint_every=1", "training.keep_states=1")


@pytest.fixture(scope="module")
def train(make_config: Any, make_controllable: Any) -> Train:
    """Train a method into a folder: `train("full", folder, *overrides, dry_run=False)`."""

    def run(method: str, folder: Path, *overrides: str, dry_run: bool = False) -> Any:
        if method == "full":
            own = ("adapter={method: full, target: unet}", "data.prior=null")
            return dreambooth.run(make_config(folder, *own, *ONE_STEP_EACH, *overrides), dry_run=dry_run)
        config = make_controllable(folder, "adapter={method: controlnet}", *ONE_STEP_EACH, *overrides)
        return controllable.run(config, dry_run=dry_run)

    return run


@pytest.fixture(scope="module")
def runs(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each method: three steps, averaged, at a rate that moves; validation before and after."""
    found = {}
    for method in MODULES:
        found[method] = tmp_path_factory.mktemp("runs") / method
        pictures = "validation.prompts=[a qwe toy]" if method == "full" else "validation.images=1"
        settings = ("training.steps=3", "training.ema_decay=0.5", "training.learning_rate=1e-3", "validation.every=3")
        train(method, found[method], pictures, *settings)
    return found


@pytest.mark.parametrize("method", MODULES)
def test_a_run_holds_the_module_and_its_last_checkpoint(runs: dict[str, Path], method: str) -> None:
    run, module = runs[method], MODULES[method]
    assert {path.name for path in run.iterdir()} == {"config.yaml", module, "checkpoints", "samples", "metrics.jsonl"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000003"]  # as many as keep_states
    saved = load_file(run / MODULES[method] / WEIGHTS)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert same(saved, load_file(run / "checkpoints/step-000003" / MODULES[method] / WEIGHTS))
    # The average is saved; training resumes from the weights themselves, which are saved next to it.
    trained = load_file(run / "checkpoints/step-000003/trained.safetensors")
    assert trained.keys() == {f"{module}.{key}" for key in saved}
    assert any(not torch.equal(trained[f"{module}.{key}"], tensor) for key, tensor in saved.items())
    before, after = ((run / f"samples/step-00000{step}.png").read_bytes() for step in (0, 3))
    assert before != after
    model, task = (DreamBoothConfig, dreambooth) if method == "full" else (ControllableConfig, controllable)
    config: Any = load_config(model, run / "config.yaml")
    assert task.resolve(config) == config


@pytest.mark.parametrize("method", MODULES)
def test_resumed_it_ends_bitwise_the_same(runs: dict[str, Path], train: Train, tmp_path: Path, method: str) -> None:
    settings = ("training.ema_decay=0.5", "training.learning_rate=1e-3")
    train(method, tmp_path / "run", *settings, "training.steps=2")
    train(method, tmp_path / "run", *settings, "training.steps=3", "training.resume=true")
    assert_same_run(tmp_path / "run", runs[method], "step-000003")


def test_everything_of_the_unet_learns_and_plain_diffusers_reads_it(runs: dict[str, Path]) -> None:
    base = load_base("tiny")
    before, after = base.unet.state_dict(), load_file(runs["full"] / "unet" / WEIGHTS)
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    theirs: Any = UNet2DConditionModel.from_pretrained(runs["full"] / "unet")
    pipeline, saved = load_pipeline(runs["full"], device="cpu")
    assert saved is not None
    assert (saved.method, saved.base_model, saved.parameters) == ("full fine-tuning", "tiny", 8_614_632)
    latents, text = torch.randn(1, 8, 16, 16), torch.randn(1, 77, base.unet.config["cross_attention_dim"])
    with torch.no_grad():
        outputs = [unet(latents, 500, text).sample for unet in (theirs, pipeline.unet, base.unet)]
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)
    # Results name the base and, separately, the trained weights.
    assert base_digest(base_of(pipeline, saved)) == base_digest(load_pipeline(base_model="tiny", device="cpu")[0])
    assert Trained.read(runs["full"]).digests == {"adapter": saved.digest}


def test_a_scale_of_one_half_is_half_of_the_change(runs: dict[str, Path]) -> None:
    key = "conv_in.weight"
    start, end = load_base("tiny").unet.state_dict()[key], load_file(runs["full"] / "unet" / WEIGHTS)[key]
    half, none = (load_pipeline(runs["full"], device="cpu", scale=s)[0].unet.state_dict()[key] for s in (0.5, 0.0))
    assert torch.equal(none, start)
    assert torch.allclose(half, (start + end) / 2, atol=1e-7)


def test_a_controlnet_leaves_the_unet_as_it_is_and_plain_diffusers_reads_it(
    runs: dict[str, Path], make_controllable: Any, tmp_path: Path
) -> None:
    ControlNetModel.from_pretrained(runs["controlnet"] / "controlnet")
    pipeline, saved = load_pipeline(runs["controlnet"], device="cpu")
    assert saved is not None
    assert same(pipeline.unet.state_dict(), load_base("tiny").unet.state_dict())
    run = read_run(runs["controlnet"])
    assert run.condition_encoder == runs["controlnet"] / "controlnet"
    assert Trained.read(runs["controlnet"]).digests == {"adapter": saved.digest, "condition_encoder": saved.digest}
    # Started from that run, another one begins where it ended.
    config = controllable.resolve(
        make_controllable(tmp_path, f"adapter={{method: controlnet, init_from: {runs['controlnet']}}}")
    )
    task = controllable.ControlNetTask(config, None, resumed=False)
    assert task.encoder_source == run.condition_encoder
    assert task.whole_weights(load_base("tiny")) == saved.parameters
    task.build(load_base("tiny"), make_plan(config.training, task.samples_per_epoch), Accelerator())
    started = task.encoder
    assert same(started.state_dict(), load_file(runs["controlnet"] / "controlnet" / WEIGHTS))
    assert all(parameter.requires_grad for parameter in started.parameters())


def test_generate_and_inspect_take_both(
    runs: dict[str, Path], scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        code = ether_diffusion_cli.main([*arguments])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    full, controlnet = str(runs["full"]), str(runs["controlnet"])
    common = ("--prompt", "a red house", "--steps", "1", "--device", "cpu")
    code, out = run("generate", "--adapter", full, *common, "--compare", "--output", str(tmp_path / "full"))
    assert code == 0, out
    assert (tmp_path / "full/contact_sheet.png").is_file()
    code, out = run("generate", "--adapter", full, *common, "--merge", "--output", str(tmp_path / "no"))
    assert (code, "is a whole UNet, not an adapter; leave it out" in out) == (2, True)

    condition = next((scenes / "annotations/validation").glob("*.png"))
    hints = ("--condition", str(condition), "--height", "32", "--width", "64", "--condition-end", "0.5")
    code, out = run("generate", "--adapter", controlnet, *common, *hints, "--output", str(tmp_path / "controlnet"))
    assert code == 0, out
    (image,) = [file for file in (tmp_path / "controlnet").glob("*.png") if file.name != "grid.png"]
    assert Image.open(image).size == (64, 32)
    code, out = run("generate", "--adapter", controlnet, *common, *hints, "--scale", "0.5", "--output", "no")
    assert (code, "is a ControlNet; take --condition-scale" in out) == (2, True)

    assert "full fine-tuning" in run("inspect", full)[1]
    out = run("inspect", controlnet)[1]
    assert "3,780,912" in out
    assert "labels of 23 classes" in out


def test_a_dry_run_prints_the_disk_space_and_writes_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("full", tmp_path / "run", "training.steps=1400", "training.keep_checkpoints=3", dry_run=True)
    # 8,614,632 numbers of 4 bytes, AdamW's state of 8: three checkpoints, one state and the result.
    assert "Disk:    99 MiB per checkpoint; the last 3 are kept: 197 MiB at the end" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_disk_space_is_counted_and_refused_before_it_is_missing(tmp_path: Path) -> None:
    settings, run = TrainingSettings(steps=1400, keep_checkpoints=2, keep_states=1, ema_decay=0.9), RunFolder(tmp_path)
    # 2^20 weights are 4 MiB, AdamW's state 8, the weights next to their average 4.
    line = disk_line(settings, 1400, 2**20, run)
    assert "16 MiB per checkpoint; the last 2 are kept: 24 MiB at the end, 40 MiB at most" in line
    short = TrainingSettings(steps=300, checkpoint_every=200)
    assert "12 MiB per checkpoint; the last 2 are kept: 28 MiB at the end" in disk_line(short, 300, 2**20, run)
    assert "GiB per checkpoint" in disk_line(settings, 1400, 2**60, None)
    with pytest.raises(UserError, match=r"needs .* GiB for checkpoints of whole modules.*training\.keep_checkpoints=1"):
        disk_line(settings, 1400, 2**60, run)


@pytest.mark.parametrize(
    ("task", "overrides", "message"),
    [
        (
            "full",
            ["adapter.target=attention"],
            "'attention', but the UNet is trained, all of it and nothing else; leave it out",
        ),
        (
            "full",
            ["adapter.text_encoder=true"],
            "True, but the UNet is trained, all of it and nothing else; leave it out",
        ),
        ("full", ["quantization=torchao_int8"], "quantization: torchao_int8, but adapter.method: full trains those"),
        ("full", ["adapter={method: controlnet, target: controlnet}"], "'controlnet' is not for dreambooth"),
        ("full", ["adapter={method: none, target: null}"], "'none' is not for dreambooth; it is for: controllable"),
        ("controlnet", ["adapter={method: full, target: unet}"], "'full' is not for controllable"),
        (
            "controlnet",
            ["adapter={method: none, target: to_q}"],
            "but the condition encoder is trained, all of it and nothing else; .* null",
        ),
        (
            "controlnet",
            ["adapter={method: none, text_encoder: true}"],
            "True, but the condition encoder is trained, all of it",
        ),
        ("controlnet", ["training.encoder_learning_rate=1e-4"], "a ControlNet has one rate for all of it"),
        ("controlnet", ["adapter.init_from={run}"], "holds no controlnet/; expected the folder of a run"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_in_one_line(
    train: Train, runs: dict[str, Path], tmp_path: Path, task: str, overrides: list[str], message: str
) -> None:
    overrides = [override.format(run=runs["full"]) if "{run}" in override else override for override in overrides]
    with pytest.raises(UserError, match=message) as caught:
        train(task, tmp_path / "run", *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_whole_unets_are_trained_from_unrounded_weights(make_config: Any, tmp_path: Path) -> None:
    config = make_config(tmp_path, "adapter={method: full, target: unet}", "training.mixed_precision=bf16")
    rounded = load_base("tiny", unet_dtype=torch.bfloat16)
    again = reload_in_fp32(config, rounded)
    assert same(again.unet.state_dict(), load_base("tiny").unet.state_dict())
    assert reload_in_fp32(config, again) is not rounded


def test_shipped_configs_differ_from_the_other_methods_in_what_they_are_named_for() -> None:
    full, lora = (load_config(DreamBoothConfig, f"dreambooth/{name}") for name in ("full", "lora"))
    kept = {"adapter": lora.adapter, "output_dir": lora.output_dir, "training": lora.training}
    assert full.model_copy(update=kept) == lora
    own = {"learning_rate", "gradient_checkpointing", "keep_states", "keep_checkpoints"}
    assert full.training.model_dump(exclude=own) == lora.training.model_dump(exclude=own)
    assert (dreambooth.resolve(full).training.learning_rate, full.training.keep_checkpoints) == (5e-6, 2)

    controlnet, encoder = (load_config(ControllableConfig, f"controllable/{n}") for n in ("controlnet", "encoder_only"))
    kept = {"adapter": encoder.adapter, "output_dir": encoder.output_dir, "training": encoder.training}
    assert controlnet.model_copy(update=kept) == encoder
    own = {"learning_rate", "encoder_learning_rate", "keep_checkpoints"}
    assert controlnet.training.model_dump(exclude=own) == encoder.training.model_dump(exclude=own)
    training = controlnet.training.model_copy(update={"learning_rate": 1e-5})
    assert controllable.resolve(controlnet) == controlnet.model_copy(update={"training": training})
    assert controlnet.validation.sampling == encoder.validation.sampling
