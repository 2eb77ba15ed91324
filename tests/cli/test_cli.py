"""The commands as a user calls them: exit codes, one-line errors, shipped configs, launchers and signals."""

from __future__ import annotations

import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import psutil
import pytest
from pydantic import BaseModel
from safetensors.torch import load_file

from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.config import load_config
from ether_diffusion.training.config import TaskConfig
from ether_diffusion.training.controllable import ControllableConfig
from ether_diffusion.training.diffusers_flags import FLAGS, hints
from ether_diffusion.training.dreambooth import DreamBoothConfig, resolve
from ether_diffusion_cli import main
from ether_diffusion_cli.main import parse

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("accelerate", "benchmark")  # configs of other things than trainings
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*/*.yaml") if path.parent.name not in OTHERS)
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
# The launcher that `accelerate launch` uses for several processes, which itself starts several on GPUs only.
TWO_PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
CONFIG_OF: dict[str, type[TaskConfig]] = {"dreambooth": DreamBoothConfig, "controllable": ControllableConfig}
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true"}
SMALL = ["data.prior=null", "validation.prompts=[]", "training.tracker=none", "training.batch_size=1"]


def call(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)  # pyright: ignore


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_are_valid_and_open_with_their_command(path: Path) -> None:
    task = "controllable" if "controllable" in path.parts[-2:] or path.stem == "controllable" else "dreambooth"
    config = load_config(CONFIG_OF[task], path)
    assert config.adapter.method in path.stem or path.parent.name == "quickstart" or path.stem == "encoder_only"
    command = [line for line in path.read_text().splitlines() if line.startswith("#") and "accelerate launch" in line]
    assert len(command) == 1
    assert f"train_{task}.py --config configs/{path.parent.name}/{path.name}" in command[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_configs_are_understood_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.use_cpu == (path.stem == "cpu")


def test_the_configs_have_the_papers_settings() -> None:
    for method, rate in (("ether", 6e-3), ("ether_plus", 6e-3), ("lora", 6e-4)):
        config = load_config(DreamBoothConfig, f"dreambooth/{method}")
        assert config.adapter.method == method
        assert config.adapter.target == "attention"
        training = resolve(config).training
        assert (training.steps, training.learning_rate, training.batch_size) == (1400, rate, 1)
        assert (training.betas, training.weight_decay, training.epsilon) == ((0.9, 0.999), 1e-2, 1e-8)
        assert (training.max_grad_norm, training.schedule, training.warmup_steps) == (1.0, "constant", 0)
        prior = config.data.prior
        assert prior is not None
        assert (prior.weight, prior.num_images, config.data.resolution, config.data.identifier) == (1, 200, 512, "qwe")
        assert (prior.sampling.scheduler, prior.sampling.steps, prior.sampling.guidance) == ("dpm++", 25, 7.5)


def test_all_faults_are_reported_at_once_with_their_places_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(
        f"base_model: tiny\noutput_dir: {tmp_path / 'run'}\ndata:\n  instance_dir: builtin:robot\n  class_name: toy\n"
        "training:\n  stepz: 4\n"
    )
    overrides = ["adapter.method=ether_pluss", "training.batch_size=two"]
    assert main(["train", "dreambooth", "--config", str(config), *overrides]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) >= 3
    assert all(line.startswith("ether-diffusion: ") for line in lines)
    assert any("my.yaml:7" in line and "Did you mean 'steps'" in line for line in lines)
    assert any("command line" in line and "'ether_plus'" in line for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", ["0", "-1", "abc", "1.5"])
def test_a_count_must_be_a_whole_number_from_1(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "--base-model", "tiny", "--prompt", "a cat", "--output", "images", "--num-images", number])
    assert f"argument --num-images: {number}: expected a whole number from 1" in capsys.readouterr().err


def test_print_config_prints_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["train", "dreambooth", "--config", "dreambooth/ether", "--print-config", "training.learning_rate=1e-4"])
        == 0
    )
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    config = load_config(DreamBoothConfig, tmp_path / "printed.yaml")
    assert config.training.learning_rate == 1e-4
    assert config.data.instance_prompt == "a photo of qwe dog"


def test_errors_have_exit_code_2_and_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "images"
    for arguments in (
        ["generate", "--adapter", str(tmp_path / "nowhere"), "--prompt", "a", "--output", str(output)],
        ["generate", "--base-model", "tiny", "--prompt", "a", "--resolution", "50", "--output", str(output)],
        ["generate", "--prompt", "a", "--output", str(output)],
        ["inspect", str(tmp_path)],
        ["train", "dreambooth", "--config", "nowhere"],
        ["train", "dreambooth", "--config", "quickstart/dreambooth", "base_model=nowhere", f"output_dir={output}"],
    ):
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert len(printed.strip().splitlines()) == 1
        assert printed.startswith("ether-diffusion: ")
    assert not output.exists()


def test_an_error_of_a_script_names_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "train_dreambooth.py"
    words = [script, "--config", "quickstart/dreambooth", "seeed=1", f"output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    expected = "train_dreambooth.py: command line: seeed=1: unknown key. Did you mean 'seed'?"
    assert capsys.readouterr().err.startswith(expected)


def test_generate_compares_and_inspect_describes(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", str(finished_run), "--prompt", "a qwe toy", "--num-images", "2", "--steps", "2"]
    assert main(["generate", *arguments, "--output", str(tmp_path / "images"), "--compare"]) == 0
    assert str(tmp_path / "images/contact_sheet.png") in capsys.readouterr().out
    assert len(list((tmp_path / "images").glob("00-*.png"))) == 2
    assert main(["inspect", str(finished_run)]) == 0
    shown = capsys.readouterr().out
    assert "ETHER+" in shown
    assert "32,256" in shown


@pytest.mark.slow
def test_launched_training_prints_little(tmp_path: Path) -> None:
    """With `accelerate launch`, the user's command: no flood of warnings."""
    arguments = [
        "train_dreambooth.py",
        "--config",
        "configs/quickstart/dreambooth.yaml",
        f"output_dir={tmp_path / 'run'}",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [*LAUNCH[1:], *arguments, *SMALL, "training.steps=2"]
    done = call(*command, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) < 10
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    (command,) = [line for line in done.stdout.splitlines() if line.startswith("Generate:")]
    arguments = parse(shlex.split(command)[2:])  # as it stands, without anything to add
    assert (arguments.adapter, arguments.output) == ([(str(tmp_path / "run"), 1.0)], str(tmp_path / "run/images"))


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_process_leaves_a_checkpoint_and_its_code(tmp_path: Path, signum: int, code: int) -> None:
    run = tmp_path / "run"
    arguments = ["train_dreambooth.py", "--config", "quickstart/dreambooth", f"output_dir={run}", *SMALL]
    process = subprocess.Popen([sys.executable, *arguments, "training.steps=100000"], cwd=ROOT, stderr=subprocess.PIPE)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.send_signal(signum)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == code
    assert b"training.resume=true" in printed
    assert b"Traceback" not in printed
    assert list((run / "checkpoints").glob("step-*/optimizer.safetensors"))


@pytest.mark.slow  # tests/robustness/test_crashes.py sends them to processes that start at once
@pytest.mark.skipif(os.name == "nt", reason="there are no process groups")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_group_spares_the_workers_that_load_data(tmp_path: Path, signum: int) -> None:
    """As batch schedulers and terminals send it; the step in hand is finished and saved."""
    run = tmp_path / "run"
    arguments = ["train_dreambooth.py", "--config", "tests/dreambooth.yaml", f"output_dir={run}", *SMALL]
    command = [sys.executable, *arguments, "training.steps=100000", "training.workers=2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    os.killpg(process.pid, signum)
    _, printed = process.communicate(timeout=120)
    assert process.returncode == 128 + signum
    assert b"training.resume=true" in printed
    assert b"Traceback" not in printed
    (checkpoint,) = (run / "checkpoints").glob("step-*/optimizer.safetensors")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == int(checkpoint.parent.name.removeprefix("step-"))


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_same_effective_batch(tmp_path: Path) -> None:
    """gloo on the CPU: the same samples and rates, so the same run up to the order of sums."""
    common = ["train_dreambooth.py", "--config", "configs/quickstart/dreambooth.yaml", *SMALL]
    common += ["training.steps=3", "training.warmup_steps=2", "training.schedule=cosine"]
    done = call(*TWO_PROCESSES, *common, f"output_dir={tmp_path / 'two'}", env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert "3 with 2 samples each" in done.stdout
    done = call(*common, "training.batch_size=2", f"output_dir={tmp_path / 'one'}")
    assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "metrics.jsonl" for name in ("one", "two")]
    rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    for left, right in zip(*rows, strict=True):
        for key in ("step", "loss", "learning_rate", "grad_norm"):
            assert left[key] == pytest.approx(right[key], rel=1e-4)
    left, right = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("one", "two"))
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-4


def test_overrides_may_stand_between_options_and_flags_of_diffusers_get_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", "dreambooth"]
    assert main([*command, "seed=4", "--config", "quickstart/dreambooth", "seed=5", "--print-config", "seed=7"]) == 0
    assert "seed: 7" in capsys.readouterr().out
    assert main([*command, "--config", "quickstart/dreambooth", "--learning_rate=1e-4"]) == 2
    assert "here it is training.learning_rate" in capsys.readouterr().err


def test_the_docs_list_every_flag_of_diffusers() -> None:
    table = (ROOT / "docs/from_diffusers.md").read_text()
    rows = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `--")]
    stated = [(flag, hint) for flag, own in FLAGS.items() for hint in ([own] if isinstance(own, str) else own)]
    assert sorted(rows) == sorted(f"--{flag}" for flag, _ in stated)
    assert all(f"| `--{flag}` | {hint if ' ' in hint else f'`{hint}'}" in table for flag, hint in stated)


@pytest.mark.parametrize("task", CONFIG_OF)
def test_every_flag_of_diffusers_has_a_hint_that_names_an_existing_setting(task: str) -> None:
    assert hints(task).keys() == FLAGS.keys()
    for key in hints(task).values():
        if key.startswith("not needed: "):
            continue
        if key.startswith("adapter."):
            assert any(key.split(".")[1] in method.model_fields for method in METHODS.values())
            continue
        models: list[type[BaseModel]] = [CONFIG_OF[task]]
        for name in key.split("."):
            fields = [model.model_fields[name] for model in models if name in model.model_fields]
            assert fields, key
            parts = [part for field in fields for part in (field.annotation, *get_args(field.annotation))]
            models = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_leaves_one_checkpoint_of_all_processes(tmp_path: Path, signum: int) -> None:
    """Ctrl-C in a terminal reaches the launcher and every process; all stop at the same step."""
    run = tmp_path / "run"
    arguments = ["train_dreambooth.py", "--config", "tests/dreambooth.yaml", f"output_dir={run}", *SMALL]
    log = (tmp_path / "log").open("w")
    command = [sys.executable, *TWO_PROCESSES, *arguments, "training.steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=ON_CPU, start_new_session=True)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    os.killpg(process.pid, signum)
    process.wait(timeout=120)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == step
    done = call(*TWO_PROCESSES, *arguments, f"training.steps={step + 1}", "training.resume=true", env=ON_CPU)
    assert done.returncode == 0, done.stderr
    assert f"step {step} of {step + 1}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_signal_to_one_process_stops_the_validation_of_all(tmp_path: Path, rank: str) -> None:
    """The sheet would take hours. A signal to the process that waits is as good as one to the process that samples."""
    run, log = tmp_path / "run", tmp_path / "log"
    long = ["validation.prompts=[a red ball]", "validation.images_per_prompt=1000", "validation.sampling.steps=1000"]
    arguments = ["train_dreambooth.py", "--config", "tests/dreambooth.yaml", f"output_dir={run}", *SMALL, *long]
    arguments += ["training.steps=2", "validation.every=2"]
    command = [sys.executable, *TWO_PROCESSES, *arguments]
    with log.open("w") as output:
        launcher = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=ON_CPU)
        wait_for(lambda: "Steps:" in log.read_text())
        time.sleep(3)
        (process,) = [one for one in launcher.children() if one.environ().get("RANK") == rank]
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
    assert time.monotonic() - began < 20
    printed = log.read_text()
    assert "Stopped after step 0 of 2. Resume with" in printed, printed


@pytest.mark.slow
def test_killing_the_launcher_leaves_a_checkpoint_to_resume(tmp_path: Path) -> None:
    """SIGKILL to `accelerate launch` alone: the training process sees that it is gone, saves and ends."""
    run = tmp_path / "run"
    arguments = ["train_dreambooth.py", "--config", "tests/dreambooth.yaml", f"output_dir={run}", *SMALL]
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen([*LAUNCH, *arguments, "training.steps=100000"], cwd=ROOT, stdout=log, stderr=log)
    wait_for(lambda: (run / "metrics.jsonl").exists())
    process.kill()
    process.wait()
    wait_for(lambda: "training.resume=true" in (tmp_path / "log").read_text())
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    done = call(*LAUNCH[1:], *arguments, f"training.steps={step + 1}", "training.resume=true")
    assert done.returncode == 0, done.stderr
    assert f"step {step} of {step + 1}" in done.stdout


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
