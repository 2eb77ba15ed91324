"""A task and a method of a third party: one call each registers them, and no other file is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from peft import IA3Config, PeftConfig

import ether_diffusion
from ether_diffusion.adapters.method_settings import MethodSettings
from ether_diffusion.adapters.methods import METHODS, register_method
from ether_diffusion.adapters.targets import target_modules
from ether_diffusion.config import load_config
from ether_diffusion.generation import Sampling, jobs_for, load_pipeline, read_run, sample_images
from ether_diffusion.models.bases import load_base
from ether_diffusion.training import dreambooth
from ether_diffusion_cli import main
from ether_diffusion_cli.tasks import TASKS, register_task
from support import toy_task
from support.runs import assert_same_run, metrics, same, weights

CONFIG = """
base_model: tiny
output_dir: {folder}
adapter: {{method: ia3}}
training: {{steps: 4, batch_size: 2, checkpoint_every: 2, tracker: none}}
validation: {{prompts: [a colour], every: 4, images_per_prompt: 1, sampling: {{steps: 1}}}}
"""


class Ia3Settings(MethodSettings):
    """(IA)³, by PEFT: a layer's outputs times a learned vector, which starts at ones."""

    title: ClassVar[str] = "(IA)³"
    peft_type: ClassVar[str] = "IA3"
    learning_rates: ClassVar[dict[str, float]] = {"toy": 1e-2, "dreambooth": 1e-2}
    has_scale: ClassVar[bool] = False
    method: Literal["ia3"] = "ia3"

    def peft_config(self) -> PeftConfig:
        return IA3Config(target_modules=target_modules(self.target), feedforward_modules=[])


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register_task("toy", "plain colours -> an adapter", "support.toy_task")
    register_method(Ia3Settings)
    yield
    del TASKS["toy"], METHODS["ia3"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.yaml").write_text(CONFIG.format(folder=folder / "run"))
    return folder / "toy.yaml"


@pytest.fixture(scope="module")
def trained(registered: None, config: Path) -> Path:
    """A run of four steps, by the command line."""
    assert main(["train", "toy", "--config", str(config)]) == 0
    return config.parent / "run"


def test_the_command_line_trains_the_toy_task_with_the_toy_method(
    trained: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {"config.yaml", "adapter", "checkpoints", "samples", "metrics.jsonl"}
    assert [row["step"] for row in metrics(trained)] == [1, 2, 3, 4]
    assert all((tensor - 1).abs().max() > 1e-3 for tensor in weights(trained).values())  # they start at ones
    assert load_config(toy_task.ToyConfig, trained / "config.yaml").training.learning_rate == 1e-2
    dry = ["train", "toy", "--config", str(config), f"output_dir={tmp_path / 'dry'}", "data.colours=5", "--dry-run"]
    assert main(dry) == 0
    out = capsys.readouterr().out
    assert "Adapter: (IA)³, 8,192 trainable parameters in 56 layers, learning rate 0.01\nColours: 5\n" in out
    assert not (tmp_path / "dry").exists()
    assert main(["train", "toy", "--config", str(config), "--colors=5"]) == 2
    assert "--colors=5: unknown option; here it is data.colours=5" in capsys.readouterr().err


def test_a_toy_run_resumes_bitwise(trained: Path, config: Path, tmp_path: Path) -> None:
    def make(*overrides: str) -> toy_task.ToyConfig:
        return load_config(toy_task.ToyConfig, config, [f"output_dir={tmp_path / 'twice'}", *overrides])

    toy_task.run(make("training.steps=2"))
    toy_task.run(make("training.resume=true"))
    assert_same_run(trained, tmp_path / "twice", "step-000004")
    images = [(run / "samples/step-000004.png").read_bytes() for run in (trained, tmp_path / "twice")]
    assert images[0] == images[1]


def test_the_public_functions_load_and_generate_from_a_toy_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = load_base("tiny").unet
    saved = ether_diffusion.load_adapter(unet, trained)
    assert saved.method == "(IA)³"
    ether_diffusion.save_adapter(unet, tmp_path / "again", base_model="tiny")
    assert same(saved.tensors, tmp_path / "again/adapter_model.safetensors")
    run = read_run(trained)
    assert run.base_model == "tiny"

    def image(merged: bool) -> torch.Tensor:
        pipeline, _ = load_pipeline(trained, merged=merged)
        (sampled,) = sample_images(pipeline, jobs_for([""], 1), Sampling(steps=1), seed=0, resolution=32)
        return torch.tensor(list(sampled[1].tobytes()), dtype=torch.int16)

    assert (image(merged=True) - image(merged=False)).abs().max() <= 1
    command = ["generate", "--adapter", str(trained), "--prompt", "a colour", "--steps", "1", "--device", "cpu"]
    assert main([*command, "--resolution", "32", "--output", str(tmp_path / "images")]) == 0
    assert len(list((tmp_path / "images").glob("*.png"))) >= 1
    assert main(["inspect", str(trained)]) == 0
    assert "(IA)³" in capsys.readouterr().out


def test_known_methods_train_the_toy_task_and_the_toy_method_known_tasks(
    make_config: Callable[..., Any], config: Path, tmp_path: Path
) -> None:
    overrides = [f"output_dir={tmp_path / 'run'}", "adapter={method: ether_plus}"]
    report = toy_task.run(load_config(toy_task.ToyConfig, config, overrides), dry_run=True)
    assert report.steps_taken == 1
    report = dreambooth.run(make_config(tmp_path / "run", "adapter={method: ia3}", "data.prior=null"), dry_run=True)
    assert report.steps_taken == 1
    assert not (tmp_path / "run").exists()
