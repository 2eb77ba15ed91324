"""A base in shards over two processes (FSDP2, DeepSpeed's ZeRO-3) trains as one process does, and leaves its files."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ether_diffusion.adapters.saved_adapter import read_adapter
from ether_diffusion.errors import UserError
from ether_diffusion.training import dreambooth
from ether_diffusion.training.sharding import Shards, check_launch_config
from support.optional import needs

MakeConfig = Callable[..., dreambooth.DreamBoothConfig]

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs/accelerate"
# Everything that touches the trained weights: two models, an average, checkpoints, validation images.
EVERYTHING = [
    "data.prior=null",
    "adapter.text_encoder=true",
    "training.steps=3",
    "training.warmup_steps=2",
    # Adam divides a gradient by its own size, of which rounding is all that is left where it is almost 0.
    "training.epsilon=1e-4",
    "training.ema_decay=0.5",
    "training.checkpoint_every=1",
    "training.keep_states=3",
    "training.gradient_checkpointing=true",
    "training.tracker=none",
    "validation.prompts=[a qwe toy]",
    "validation.images_per_prompt=1",
    "validation.every=3",
    "validation.sampling.steps=2",
]
TWO_WITH_TWO_PARTS = ["training.batch_size=1", "training.gradient_accumulation=2"]
FILES = ["adapter/adapter_model", "adapter/text_encoder/adapter_model"]
STATES = ["optimizer", "trained"]


def launch(config_file: Path, folder: Path, *overrides: str) -> str:
    """`accelerate launch` on CPUs, with a launch config that is written for GPUs. Returns its output."""
    options = ["--config_file", str(config_file), "--mixed_precision", "no", "--main_process_port", "0"]
    script = ["train_dreambooth.py", "--config", "tests/dreambooth.yaml", f"output_dir={folder}", *overrides]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *script],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def difference(left: Path, right: Path) -> float:
    """The largest difference between two files of the same tensors."""
    one, two = load_file(f"{left}.safetensors"), load_file(f"{right}.safetensors")
    assert one.keys() == two.keys()
    assert all(one[key].dtype == two[key].dtype for key in one)
    return max(float((one[key] - two[key]).abs().max()) for key in one)


def picture(folder: Path, step: int) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(folder / f"samples/step-{step:06d}.png")).astype(int)


def losses(folder: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture
def deepspeed_config(tmp_path: Path) -> Path:
    """The shipped one, changed to shard weights as small as the miniature's too."""
    config = yaml.safe_load((CONFIGS / "deepspeed.yaml").read_text())
    settings = tmp_path / "zero.json"
    stage = config["deepspeed_config"].pop("zero_stage")
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    init = config["deepspeed_config"]["zero3_init_flag"]
    config["deepspeed_config"] = {"deepspeed_config_file": str(settings), "zero3_init_flag": init}
    del config["mixed_precision"]  # which accelerate takes from one place only
    (tmp_path / "deepspeed.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "deepspeed.yaml"


def check_against_one_process(make_config: MakeConfig, folder: Path, config_file: Path) -> None:
    printed = launch(config_file, folder / "shards", *EVERYTHING, *TWO_WITH_TWO_PARTS)
    held = re.search(r"([\d.]+)M of ([\d.]+)M frozen parameters in each of 2 processes", printed)
    assert held is not None
    assert float(held[1]) == pytest.approx(float(held[2]) / 2, abs=0.02)
    dreambooth.run(make_config(folder / "one", *EVERYTHING, "training.batch_size=4"))
    for sharded, alone in zip(losses(folder / "shards"), losses(folder / "one"), strict=True):
        assert sharded == pytest.approx(alone, rel=1e-4)
    for file in FILES:
        assert difference(folder / "shards" / file, folder / "one" / file) < 1e-5
    shards, one = (read_adapter(folder / name / "adapter").certificate for name in ("shards", "one"))
    assert shards is not None
    assert one is not None
    assert (shards.faults, shards.measured["steps"]) == ({}, 3)
    assert shards.measured["largest_change"] == pytest.approx(one.measured["largest_change"], rel=1e-3)
    last = "checkpoints/step-000003"
    for file in [*FILES, *STATES]:
        assert difference(folder / "shards" / last / file, folder / "one" / last / file) < 1e-5
    for step in (0, 3):
        assert abs(picture(folder / "shards", step) - picture(folder / "one", step)).max() <= 2

    # One process resumes from the shards' checkpoint, with the samples of a step in one batch.
    resume = "training.resume=step-000002"
    shutil.copytree(folder / "shards", folder / "alone")
    dreambooth.run(make_config(folder / "alone", *EVERYTHING, "training.batch_size=4", resume))
    # The shards resume from it too, bit for bit.
    shutil.copytree(folder / "shards", folder / "again")
    shutil.rmtree(folder / "again" / last)
    launch(config_file, folder / "again", *EVERYTHING, *TWO_WITH_TWO_PARTS, resume)
    for file in [*FILES, *STATES]:
        assert difference(folder / "alone" / last / file, folder / "shards" / last / file) < 1e-5
        assert difference(folder / "again" / last / file, folder / "shards" / last / file) == 0


@pytest.mark.slow
def test_fsdp2_equals_one_process_and_resumes_anywhere(make_config: MakeConfig, tmp_path: Path) -> None:
    check_against_one_process(make_config, tmp_path, CONFIGS / "fsdp.yaml")


@pytest.mark.slow
def test_zero3_equals_one_process_and_resumes_anywhere(
    make_config: MakeConfig, tmp_path: Path, deepspeed_config: Path
) -> None:
    needs("deepspeed")
    check_against_one_process(make_config, tmp_path, deepspeed_config)


def test_other_processes_may_share_the_samples_of_a_step_but_not_others(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    # Adam divides a gradient by its own size, of which rounding is all that is left where it is almost 0.
    common = ("data.prior=null", "training.warmup_steps=2", "training.epsilon=1e-4", "training.steps=2")
    dreambooth.run(make_config(tmp_path / "run", *common, "training.batch_size=1", "training.gradient_accumulation=2"))
    with pytest.raises(UserError, match="samples a step were 2, are 3"):
        dreambooth.run(make_config(tmp_path / "run", *common, "training.batch_size=3", "training.resume=true"))
    more = (*common[:3], "training.steps=3", "training.batch_size=2")
    dreambooth.run(make_config(tmp_path / "run", *more, "training.resume=true"))
    dreambooth.run(make_config(tmp_path / "whole", *more))
    assert difference(tmp_path / "run" / FILES[0], tmp_path / "whole" / FILES[0]) < 1e-5


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_open_with_their_command_and_name_only_keys_that_accelerate_knows(path: Path) -> None:
    (command,) = [line for line in path.read_text().splitlines() if line.startswith("#   accelerate launch")]
    assert f"--config_file configs/accelerate/{path.name} train_" in command
    known = {action.dest for action in launch_command_parser()._actions}
    config: Any = load_config_from_file(str(path))  # which refuses unknown keys at the top
    for section in (config.deepspeed_config, config.fsdp_config, config.dynamo_config):
        assert section.keys() <= known


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version is 1; write 2"),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_VERSION": "2",
                "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
            },
            "efficient_loading is true, or left out; write false; .*take training.gradient_checkpointing=true",
        ),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not installed: pip install deepspeed"),
    ],
)
def test_a_launch_config_that_would_fail_is_one_error_before_anything_is_written(
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    if "deepspeed" in message and importlib.util.find_spec("deepspeed"):
        pytest.skip("DeepSpeed is installed, so that its absence cannot be reported")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        dreambooth.run(make_config(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "zero_stage is 2; write 3, or take DDP"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "zero3_init_flag is true, or left out; write false"),
    ],
)
def test_a_kind_of_zero_that_would_fail_is_one_error(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    needs("deepspeed")
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        check_launch_config()


def test_a_quantised_base_is_not_sharded() -> None:
    """Cutting its packed integers would destroy their meaning."""
    module = nn.ModuleDict({"base": nn.Linear(2, 2), "adapter": nn.Linear(2, 2)}).requires_grad_(False)
    module["base"].weight = nn.Parameter(torch.zeros(2, 1, dtype=torch.uint8), requires_grad=False)
    optimizer = torch.optim.AdamW(module["adapter"].requires_grad_(True).parameters())
    with pytest.raises(UserError, match="a quantised base cannot be sharded; take DDP"):
        Shards(Accelerator(), module, optimizer, shard=lambda model, _: torch.numel)
