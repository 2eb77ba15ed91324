"""The benchmark runner: the same images and numbers, interrupted or not, and however the work is divided."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ether_diffusion.adapters.saved_adapter import SavedAdapter, read_adapter
from ether_diffusion.benchmark.config import Unit
from ether_diffusion.benchmark.executors import Shard
from ether_diffusion.benchmark.plan import Plan
from ether_diffusion.benchmark.ray_executor import RayExecutor
from ether_diffusion.benchmark.runner import collect, progress, run_benchmark
from ether_diffusion.config import ConfigError
from ether_diffusion.errors import UserError
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol
from ether_diffusion.evaluation.results import Results
from ether_diffusion.evaluation.scorers import load_scorers
from ether_diffusion.evaluation.subject_images import find_images, recorded_settings
from ether_diffusion.evaluation.subject_scores import score_subject, subject_results
from ether_diffusion.generation import pick_device, saved_run
from ether_diffusion.pictures import save_png
from ether_diffusion.tinyworld.layouts import write_ade20k_splits
from support.benchmark_folders import SUBJECTS, images, load, numbers, write_config, write_map_protocol, write_protocol

SHIPPED = sorted((Path(__file__).parents[2] / "configs/benchmark").glob("*.yaml"))
CONFIGS = [path for path in SHIPPED if "python eval/benchmark.py" in path.read_text()]


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """A worker sets its process's threads, which other tests share."""
    before, stated = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    yield
    torch.set_num_threads(before)
    os.environ.pop("OMP_NUM_THREADS")
    if stated is not None:
        os.environ["OMP_NUM_THREADS"] = stated


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("class_images")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, class_images: Path) -> Path:
    """A benchmark that was not interrupted: `benchmark.yaml` and `out/`."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, write_protocol(folder), class_images)
    outcome = run_benchmark(load(config))
    assert not outcome.waiting
    assert not outcome.failed
    return folder


def again(finished: Path, folder: Path) -> Path:
    """A copy of the finished benchmark's folder, to be damaged."""
    return Path(shutil.copytree(finished / "out", folder / "out"))


def times(folder: Path, pattern: str) -> dict[str, int]:
    return {file.relative_to(folder).as_posix(): file.stat().st_mtime_ns for file in folder.glob(pattern)}


def stop(out: Path, subject: str, *stages: str) -> None:
    """Leave the first of these stages of a subject begun, and the others not begun."""
    path = out / f"dreambooth/ether_plus/stages/{subject}.json"
    found = json.loads(path.read_text())
    for stage in stages[1:]:
        del found[stage]
    found[stages[0]]["outputs"] = None
    path.write_text(json.dumps(found))


def killed_while_training(method: Path, subject: str) -> None:
    stop(method.parent.parent, subject, "trained", "drawn", "scored")
    run = method / "runs" / subject
    for gone in (run / "adapter", run / "checkpoints/step-000002", method / "images" / subject):
        shutil.rmtree(gone)
    (method / "scores" / f"{subject}.json").unlink()
    (run / "checkpoints/.step-000002.partial").mkdir()


def killed_after_training(method: Path, subject: str) -> None:
    stop(method.parent.parent, subject, "drawn", "scored")
    shutil.rmtree(method / "images" / subject)
    (method / "scores" / f"{subject}.json").unlink()


def killed_while_generating(method: Path, subject: str) -> None:
    """In the second batch: its first image is complete, its second is missing."""
    stop(method.parent.parent, subject, "drawn", "scored")
    *_, last = sorted((method / "images" / subject).glob("0*.png"))
    last.unlink()
    last.with_name(f".{last.name}.partial").write_bytes(b"half")
    (method / "images" / subject / "images.jsonl").unlink()
    (method / "scores" / f"{subject}.json").unlink()


def killed_before_scoring(method: Path, subject: str) -> None:
    stop(method.parent.parent, subject, "scored")
    (method / "scores" / f"{subject}.json").unlink()


def killed_before_the_table(method: Path, subject: str) -> None:
    (method / "results.json").unlink()
    (method.parent / "table.md").unlink()


@pytest.mark.parametrize(
    "harm",
    [
        killed_while_training,
        killed_after_training,
        killed_while_generating,
        killed_before_scoring,
        killed_before_the_table,
    ],
)
def test_an_interrupted_run_ends_like_one_that_was_not(
    finished: Path, tmp_path: Path, class_images: Path, harm: Callable[[Path, str], None]
) -> None:
    out = again(finished, tmp_path)
    untouched, before = times(out, "dreambooth/*/*/monster/**/*"), numbers(out)
    harm(out / "dreambooth/ether_plus", "robot")
    config = write_config(tmp_path, finished / "subjects.yaml", class_images)
    assert not run_benchmark(load(config)).waiting
    assert images(out) == images(finished / "out")
    assert numbers(out) == before
    assert times(out, "dreambooth/*/*/monster/**/*") == untouched


def test_an_adapter_is_read_once_to_generate_and_score(
    finished: Path, tmp_path: Path, class_images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = again(finished, tmp_path), []

    def counted(path: Path) -> SavedAdapter:
        read.append(path.relative_to(out / "dreambooth/ether_plus/runs").parts[0])
        return read_adapter(path)

    killed_after_training(out / "dreambooth/ether_plus", "robot")
    monkeypatch.setattr(saved_run, "read_adapter", counted)
    run_benchmark(load(write_config(tmp_path, finished / "subjects.yaml", class_images)))
    assert sorted(read) == ["monster", "robot"]


def test_a_finished_run_is_not_touched(finished: Path) -> None:
    out = finished / "out"
    before = times(out, "dreambooth/*/[!r]*/**/*")
    run_benchmark(load(finished / "benchmark.yaml"))
    assert times(out, "dreambooth/*/[!r]*/**/*") == before


def test_shards_make_the_same_images_and_the_last_one_the_same_table(
    finished: Path, tmp_path: Path, class_images: Path
) -> None:
    config = load(write_config(tmp_path, finished / "subjects.yaml", class_images))
    first = run_benchmark(config, Shard(1, 2))
    assert first.waiting == (Unit("dreambooth", "ether_plus", "monster"),)
    assert not numbers(tmp_path / "out")
    assert progress(config).splitlines()[1].split() == ["dreambooth/ether_plus", "2", "1", "1", "1"]
    second = run_benchmark(config, Shard(2, 2))
    assert not second.waiting
    assert images(tmp_path / "out") == images(finished / "out")
    assert numbers(tmp_path / "out") == numbers(finished / "out")


def test_shards_are_disjoint_and_together_all_units() -> None:
    units = [Unit("dreambooth", method, name) for name in "abcde" for method in ("ether", "lora")]
    shares = [Shard(number, 3).of(units) for number in (1, 2, 3)]
    assert sorted((unit for share in shares for unit in share), key=str) == sorted(units, key=str)
    assert {len(share) for share in shares} <= {3, 4}


@pytest.mark.parametrize(("methods", "subjects", "count"), [(6, 30, 30), (6, 30, 36), (5, 7, 4), (2, 8, 6), (3, 2, 9)])
def test_shards_have_equal_numbers_of_subjects_per_method(methods: int, subjects: int, count: int) -> None:
    """Give or take one; and in the order of the units."""
    units = [Unit("dreambooth", f"m{method}", f"s{name}") for name in range(subjects) for method in range(methods)]
    shares = [Shard(number, count).of(units) for number in range(1, count + 1)]
    assert sorted((unit for share in shares for unit in share), key=units.index) == units
    assert all(share == sorted(share, key=units.index) for share in shares)
    for method in range(methods):
        of_it = [sum(unit.method == f"m{method}" for unit in share) for share in shares]
        assert max(of_it) - min(of_it) <= 1
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_method_is_one_row_of_the_table_whatever_else_is_in_its_folder(
    finished: Path, tmp_path: Path, class_images: Path
) -> None:
    """Results of a checkpoint are no row, and results of another protocol no table."""
    out = again(finished, tmp_path)
    method = out / "dreambooth/ether_plus"
    own = Results.read(method)
    own.save(method / "steps/step-000001/results.json")
    own.model_copy(update={"protocol": "tests/other"}).save(method / "other/results.json")
    before = {file.name: file.read_text() for file in out.glob("dreambooth/table.*")}
    assert "| ether_plus |" in before["table.md"]
    collect(load(write_config(tmp_path, finished / "subjects.yaml", class_images)))
    assert {file.name: file.read_text() for file in out.glob("dreambooth/table.*")} == before


@pytest.mark.parametrize(
    ("protocol", "overrides", "counts"),
    [
        ({}, [], "2 2 2 2"),
        ({"averaging": "flat"}, [], "2 2 2 0"),
        ({"seed": 1}, [], "2 2 0 0"),
        ({}, ["dreambooth.also_checkpoints=[1]"], "2 2 0 0"),
    ],
)
def test_the_status_counts_what_is_done_by_the_current_protocol(
    finished: Path, tmp_path: Path, class_images: Path, protocol: dict[str, object], overrides: list[str], counts: str
) -> None:
    again(finished, tmp_path)
    config = load(write_config(tmp_path, write_protocol(tmp_path, **protocol), class_images), *overrides)
    assert progress(config).splitlines()[1].split() == ["dreambooth/ether_plus", *counts.split()]


def test_results_equal_those_of_all_images_scored_together(finished: Path) -> None:
    """As `score --images` scores them, without a file of scores for each subject."""
    protocol = load_protocol(SubjectProtocol, finished / "subjects.yaml")
    scorers = load_scorers(protocol.judges)
    method = finished / "out/dreambooth/ether_plus"
    found = find_images(protocol, method / "images", "builtin:")
    scored = [score_subject(one, protocol, scorers, batch_size=2) for one in found]
    assert Results.read(method) == subject_results(protocol, scored, scorers, recorded_settings(found))


def test_a_changed_protocol_changes_the_numbers_and_keeps_the_images(
    finished: Path, tmp_path: Path, class_images: Path
) -> None:
    out = again(finished, tmp_path)
    flat = write_protocol(tmp_path, averaging="flat")
    config = load(write_config(tmp_path, flat, class_images))
    assert len(collect(config).waiting) == len(SUBJECTS)
    before = times(out, "dreambooth/*/images/**/*.png")
    assert not run_benchmark(config).waiting
    assert times(out, "dreambooth/*/images/*/0*.png") == {k: v for k, v in before.items() if "grid" not in k}
    digests = {Results.read(folder / "out/dreambooth/ether_plus").protocol_digest for folder in (tmp_path, finished)}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            r'"base_sha256": "\w+"',
            '"base_sha256": "0"',
            "robot and monster were generated with bases of different",
        ),
        (r'"sha256": "\w+"', '"sha256": "0"', "scorer backbone had different weights for robot and monster"),
    ],
)
def test_subjects_of_different_bases_or_scorers_are_not_averaged(
    finished: Path, tmp_path: Path, class_images: Path, old: str, new: str, message: str
) -> None:
    scores = again(finished, tmp_path) / "dreambooth/ether_plus/scores/robot.json"
    scores.write_text(re.sub(old, new, scores.read_text()))
    with pytest.raises(UserError, match=message):
        collect(load(write_config(tmp_path, finished / "subjects.yaml", class_images)))


def test_changed_settings_are_refused_if_there_are_results(finished: Path, tmp_path: Path, class_images: Path) -> None:
    again(finished, tmp_path)
    path = write_config(tmp_path, finished / "subjects.yaml", class_images)
    path.write_text(path.read_text().replace("training.steps=2", "training.steps=3"))
    with pytest.raises(
        UserError, match=r"robot\.json: stage 'trained' was made with training\.steps = 2; this run has 3"
    ):
        run_benchmark(load(path))
    path = write_config(tmp_path, write_protocol(tmp_path, seed=1), class_images)
    with pytest.raises(UserError, match=r"robot\.json: stage 'drawn' was made with seed = 0; this run has 1"):
        run_benchmark(load(path))


@functools.cache
def plan_of(path: Path) -> tuple[Plan, dict[Unit, Any]]:
    """Of a shipped config, with its trainings."""
    plan = Plan(load(path))
    return plan, {unit: plan.training(unit) for unit in plan.units()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_have_a_plan_and_open_with_their_command(path: Path) -> None:
    plan, of_units = plan_of(path)
    trainings = of_units.values()
    assert len({training.output_dir for training in trainings}) == len(trainings)
    assert {training.data.resolution for training in trainings} == {
        plan.part(task)[1].resolution for task in plan.tasks
    }
    lines = path.read_text().partition("\n\n")[0]
    assert f"python eval/benchmark.py --config {path.relative_to(CONFIGS[0].parents[2])}" in lines


def test_the_papers_benchmark_has_three_thousand_images_of_each_method() -> None:
    plan, of_units = plan_of(CONFIGS[0].parent / "dreambooth.yaml")
    assert plan.subjects is not None
    part, protocol = plan.subjects
    images_of = [len(protocol.templates(name)) * protocol.images_per_prompt for name in plan.names()]
    assert (len(images_of), sum(images_of)) == (30, 3000)
    assert len(plan.units()) == 30 * len(part.methods)
    trainings = {unit: config.training for unit, config in of_units.items()}
    assert {training.steps for training in trainings.values()} == {1400}
    rates = {unit.method: training.learning_rate for unit, training in trainings.items()}
    ether = dict.fromkeys(("ether", "ether_plus_one_sided", "ether_plus"), 6e-3)
    assert rates == {"lora": 6e-4, "oft": 6e-5, "naive": 6e-5, **ether}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dreambooth.subjects=[robots]"], r"dreambooth\.subjects: tests/subjects has no subject 'robots'"),
        (["dreambooth.dataset_dir=none"], r"dreambooth\.dataset_dir: none has no folder for 2 of the 2 subjects:"),
        (["dreambooth.checkpoint=3"], r"checkpoint: 3; .* has one every 1 steps, up to 2"),
        (["dreambooth.judges={clipp: x}"], r"the protocol has no such scorer\. Did you mean 'clip'"),
        (["dreambooth.settings=[training.stepps=2]"], r"training\.stepps"),
        (["dreambooth.methods={../x: {config: quickstart/dreambooth}}"], r"expected a name for a folder"),
        (["dreambooth="], r"expected dreambooth, controllable, or both"),
        (["dreambooth.settings=[data.resolution=32]"], r"data\.resolution 32; tests/subjects has 64"),
        (["dreambooth.settings=[base_model=other/base]"], r"base_model 'other/base'; the scorers of tests/subjects"),
        (["device=gpu"], r"device 'gpu': expected cpu, cuda, mps or xpu"),
        (["dreambooth.settings=[output_dir=x]"], r"settings: output_dir=x: a benchmark sets that itself"),
        (["dreambooth.settings=[adapter.target=nowhere]"], r"dreambooth\.methods\.ether_plus: .*nowhere"),
        (["threads=1000000"], r"threads=1000000: expected a whole number >= 1 and <= 1024"),
        (["device=cuda:77"], r"device 'cuda:77' cannot be used here"),
        pytest.param(
            ["dreambooth.settings=[training.mixed_precision=fp16]"],
            r"methods\.ether_plus: training\.mixed_precision: fp16 needs a GPU",
            marks=pytest.mark.skipif(pick_device().type != "cpu", reason="fp16 is refused only where there is no GPU"),
        ),
    ],
)
def test_faults_are_reported_before_anything_is_written(
    finished: Path, tmp_path: Path, class_images: Path, overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path, finished / "subjects.yaml", class_images)
    with pytest.raises((UserError, ConfigError), match=message):
        run_benchmark(load(config, *overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "message", "settings"),
    [
        ("lora", "The gradient's norm is nan", "training.weight_decay=1000"),
        ("ether", "Trained weights are NaN", "training.weight_decay=1000, training.steps=7"),
    ],
)
def test_a_training_that_diverges_does_not_stop_the_others_and_is_not_repeated(
    finished: Path, tmp_path: Path, class_images: Path, method: str, message: str, settings: str
) -> None:
    """A rate at which weights overflow fp32: in the next loss, or only in the weights of the last checkpoint."""
    path = write_config(tmp_path, finished / "subjects.yaml", class_images, methods=(method, "ether_plus"))
    own = f"adapter.method={method}, training.learning_rate=1000, training.warmup_steps=0, {settings}"
    path.write_text(path.read_text().replace(f"adapter.method={method}]", f"{own}]"))
    again(finished, tmp_path)
    logged = []
    for _ in range(2):
        outcome = run_benchmark(load(path))
        assert {str(unit) for unit in outcome.failed} == {
            f"dreambooth/{method}/{name}" for name in ("robot", "monster")
        }
        assert all(reason.startswith(message) for reason in outcome.failed.values())
        logged.append(times(tmp_path, f"out/dreambooth/{method}/runs/*/metrics.jsonl"))
    assert logged[0] == logged[1]
    assert numbers(tmp_path / "out") == numbers(finished / "out")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("stages/robot.json", "{", "not the stages of a unit (the file: Invalid JSON"),
        ("stages/robot.json", "[]", "not the stages of a unit (the file: Input should be"),
        ("stages/robot.json", '{"trained": {"inputs": 1, "outputs": null}}', "(trained.inputs: Input should be"),
        ("scores/robot.json", '{"subject": "robot"}', "not the scores of a subject (identifier: Field required)"),
        ("scores/robot.json", "\xff", "not the scores of a subject"),
        ("table.md", "my notes", "was not written by this program, or was changed since"),
        ("ether_plus/results.json", "{}", "was not written by this program, or was changed since"),
    ],
)
def test_files_that_are_not_ours_or_damaged_are_one_line_and_stay(
    finished: Path, tmp_path: Path, class_images: Path, file: str, content: str, message: str
) -> None:
    path = write_config(tmp_path, finished / "subjects.yaml", class_images)
    again(finished, tmp_path)
    place = tmp_path / "out/dreambooth" / (file if file.startswith(("table", "ether")) else f"ether_plus/{file}")
    place.write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as error:
        run_benchmark(load(path))
    assert len(str(error.value).splitlines()) == 1
    assert str(place) in str(error.value)
    assert message in str(error.value)
    assert place.read_text(encoding="latin-1") == content


def test_maps_are_trained_generated_and_scored_by_method(tmp_path: Path) -> None:
    scenes = write_ade20k_splits(tmp_path / "scenes", {"training": range(2), "validation": range(10, 14)})
    config = tmp_path / "benchmark.yaml"
    config.write_text(f"""output_dir: {tmp_path / "out"}
device: cpu
controllable:
  protocol: {write_map_protocol(tmp_path)}
  dataset_dir: {scenes}
  settings: [training.steps=1, training.warmup_steps=0, training.batch_size=1]
  methods:
    encoder_only: {{config: quickstart/controllable, settings: [adapter.method=none]}}
    ether: {{config: quickstart/controllable, settings: [adapter.method=ether]}}
""")
    outcome = run_benchmark(load(config))
    assert not outcome.waiting
    results = Results.read(tmp_path / "out/controllable/ether")
    assert results.counts["images"] == results.counts["expected"] == 3
    assert results.run["method"] == "ETHER"
    assert "| ether " in (tmp_path / "out/controllable/table.md").read_text()
    before, kept = numbers(tmp_path / "out"), images(tmp_path / "out")
    (tmp_path / "out/controllable/ether/images").joinpath("ADE_val_00000002.png").unlink()
    assert not run_benchmark(load(config)).waiting
    assert images(tmp_path / "out") == kept
    assert numbers(tmp_path / "out") == before


def test_changed_data_is_scored_again_or_refused(tmp_path: Path) -> None:
    """Moved data is the same data. Other real images change FID; other training pairs are refused."""
    scenes = write_ade20k_splits(tmp_path / "scenes", {"training": range(2), "validation": range(10, 14)})
    config = tmp_path / "benchmark.yaml"
    config.write_text(f"""output_dir: {tmp_path / "out"}
device: cpu
controllable:
  protocol: {write_map_protocol(tmp_path)}
  dataset_dir: {scenes}
  settings: [training.steps=1, training.warmup_steps=0, training.batch_size=1, adapter.method=none]
  methods:
    encoder_only: {{config: quickstart/controllable}}
""")
    run_benchmark(load(config))
    before, kept = Results.read(tmp_path / "out/controllable/encoder_only"), images(tmp_path / "out")
    scenes = scenes.rename(tmp_path / "moved")
    moved = load(config, f"controllable.dataset_dir={scenes}")
    run_benchmark(moved)
    assert Results.read(tmp_path / "out/controllable/encoder_only") == before
    real = sorted((scenes / "images/validation").iterdir())[0]
    save_png(Image.open(real).rotate(180), real)
    run_benchmark(moved)
    after = Results.read(tmp_path / "out/controllable/encoder_only")
    assert images(tmp_path / "out") == kept
    assert {name for name, one in after.metrics.items() if one != before.metrics[name]} == {"FID", "KID"}
    assert {name for name, digest in after.data.items() if digest != before.data[name]} == {"images of validation"}
    learned = sorted((scenes / "images/training").iterdir())[0]
    save_png(Image.open(learned).rotate(180), learned)
    with pytest.raises(UserError, match=r"stages\.json: stage 'trained' was made with pairs = "):
        run_benchmark(moved)


def test_a_missing_ray_is_one_line_with_the_command_that_installs_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed: pip install ray\."):
        run_benchmark(load(finished / "benchmark.yaml"), executor=RayExecutor())
