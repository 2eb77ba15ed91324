"""`generate --requests` and `shelf`: images of many adapters from one call, each as its adapter alone gives it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.pictures import read_settings
from ether_diffusion_cli import main
from support.saved_adapters import save_run, save_runs

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    save_runs(root, ("robot", "cat"))
    return root


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def requests_of(runs: Path) -> list[dict[str, Any]]:
    return [
        {"adapter": str(runs / "robot"), "prompt": "a red ball", "num_images": 2},
        {"prompt": "a red ball", "seed": 3},
        {"adapter": str(runs / "cat"), "prompt": "a blue cube", "seed": 1, "scale": 0.5},
        {"adapter": str(runs / "cat"), "prompt": "a red ball", "negative_prompt": "grass"},
    ]


def write(file: Path, requests: list[dict[str, Any]]) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in requests) + "\n\n", encoding="utf-8")
    return file


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


def images_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.png") if file.stem != "grid")


def test_requests_give_the_images_that_each_adapter_gives_alone(
    runs: Path, call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    rows = requests_of(runs)
    file, output = write(tmp_path / "requests.jsonl", rows), tmp_path / "images"
    code, out, err = call("generate", "--requests", file, "--output", output, "--batch-size", 3, *FAST)
    assert code == 0, err
    assert out == f"5 images, grid.png and images.jsonl in {output}\n"
    files = images_in(output)
    assert [file.name[:2] + file.name[-7:-4] for file in files] == ["00-00", "00-01", "01-00", "02-00", "03-00"]
    alone: list[Path] = []
    for number, row in enumerate(rows):
        model = ["--adapter", row["adapter"]] if "adapter" in row else ["--base-model", "tiny"]
        options = [("--" + key.replace("_", "-"), str(row[key])) for key in row if key != "adapter"]
        folder = tmp_path / f"alone{number}"
        assert call("generate", *model, *sum(options, ()), "--output", folder, *FAST)[0] == 0
        alone += images_in(folder)
    for one, other in zip(files, alone, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1  # to rounding
        ours, theirs = read_settings(one), read_settings(other)
        assert ours is not None
        assert theirs is not None
        assert {key: ours[key] for key in theirs} == theirs
    assert np.abs(pixels(files[0]) - pixels(files[4])).max() > 20  # the adapters differ


def test_a_rerun_completes_the_folder(runs: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    file, output = write(tmp_path / "requests.jsonl", requests_of(runs)), tmp_path / "images"
    words = ("generate", "--requests", file, "--output", output, "--batch-size", 2, *FAST)
    assert call(*words)[0] == 0
    content = {file: file.read_bytes() for file in images_in(output)}
    images_in(output)[3].unlink()
    assert call(*words)[0] == 0
    assert {file: file.read_bytes() for file in images_in(output)} == content
    changed = requests_of(runs)
    changed[1]["seed"] = 4
    code, _, err = call(*words[:2], write(tmp_path / "changed.jsonl", changed), *words[3:])
    assert code == 2
    assert "was made with seed = 3, not 4" in err


def test_a_shelf_gives_the_same_images(runs: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    shelf = tmp_path / "adapters.safetensors"
    code, out, err = call("shelf", "build", shelf, runs / "robot", f"kitty={runs / 'cat'}")
    assert code == 0, err
    assert out.startswith(f"{shelf}: 2 adapters of ")
    assert out.endswith(" MB for tiny\n")
    rows = requests_of(runs)
    direct, through = tmp_path / "direct", tmp_path / "through"
    assert call("generate", "--requests", write(tmp_path / "a.jsonl", rows), "--output", direct, *FAST)[0] == 0
    for row, name in zip(rows, ("robot", None, "kitty", "kitty"), strict=True):
        row["adapter"] = name
    requests = write(tmp_path / "b.jsonl", rows)
    code, _, err = call("generate", "--requests", requests, "--shelf", shelf, "--output", through, *FAST)
    assert code == 0, err
    for one, other in zip(images_in(direct), images_in(through), strict=True):
        assert np.array_equal(pixels(one), pixels(other))
    rows[0]["adapter"] = "robbot"
    requests = write(tmp_path / "c.jsonl", rows)
    code, _, err = call("generate", "--requests", requests, "--shelf", shelf, "--output", tmp_path / "c", *FAST)
    assert code == 2
    assert "no adapter 'robbot'. Did you mean 'robot'?" in err


FAULTS = {
    "[1]\n": "line 1: Input should be",
    '\n{"prompt": "a", "adaptor": "b"}\n': "line 2: adaptor",
    '{"prompt": 5}\n': "line 1: prompt 5",
    '{"prompt": "a", "num_images": 0}\n': "line 1: num_images 0",
    '{"adapter": "x"}\n': "line 1: prompt: Field required",
    "{": "line 1: not JSON",
    "": "no request in it",
    '{"prompt": "a", "num_images": 2000000}': "should be less than or equal to 1000000",
}


@pytest.mark.parametrize("text", FAULTS)
def test_faulty_requests_are_named(text: str, call: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "requests.jsonl").write_text(text)
    code, _, err = call("generate", "--requests", tmp_path / "requests.jsonl", "--output", tmp_path / "images")
    assert code == 2
    assert FAULTS[text] in err
    assert err.count("\n") == 1
    assert not (tmp_path / "images").exists()


def test_what_requests_exclude(runs: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    file = write(tmp_path / "requests.jsonl", requests_of(runs)[:1])
    for options, message in (
        (["--adapter", runs / "cat"], "--adapter excludes --requests: each request states its own"),
        (["--seed", 1], "--seed excludes --requests"),
        (["--merge"], "--merge excludes --requests, which mixes adapters"),
        (["--condition", "map.png"], "--condition excludes --requests"),
    ):
        code, _, err = call("generate", "--requests", file, *options)
        assert code == 2
        assert message in err
    code, _, err = call("generate", "--prompt", "a", "--base-model", "tiny", "--shelf", "x")
    assert (code, err) == (2, "ether-diffusion: generate: --shelf needs --requests FILE.\n")
    lora = save_run(tmp_path / "lora", "lora")
    code, _, err = call("generate", "--requests", write(tmp_path / "b.jsonl", [{"adapter": str(lora), "prompt": "a"}]))
    assert code == 2
    assert "a bank is for ETHER and ETHER+" in err


def test_the_shelf_commands(runs: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    shelf = tmp_path / "shelf.safetensors"
    assert call("shelf", "build", shelf, runs / "robot", "--dtype", "bf16")[0] == 0
    assert call("shelf", "add", shelf, runs / "cat", f"copy={runs / 'cat'}")[0] == 0
    code, out, _ = call("shelf", "list", shelf)
    lines = out.splitlines()
    assert code == 0
    assert [line.split("\t")[0] for line in lines[:-1]] == ["robot", "cat", "copy"]
    assert lines[1].split("\t")[1] == lines[2].split("\t")[1]
    assert lines[-1].startswith(f"{shelf}: 3 adapters of ")
    assert call("shelf", "remove", shelf, "copy")[0] == 0
    for words, message in (
        (("add", shelf, runs / "cat"), "holds an adapter 'cat' already; take --replace"),
        (("add", shelf, runs / "cat" / "adapter", runs / "cat"), "are both named 'cat'"),
        (("build", shelf, runs / "cat"), "is there already"),
        (("remove", shelf, "ca"), "no adapter 'ca'. Did you mean 'cat'?"),
        (("list", runs / "cat/adapter/adapter_model.safetensors"), "is no shelf"),
        (("list", tmp_path / "nothing"), "no such file"),
    ):
        code, _, err = call("shelf", *words)
        assert code == 2
        assert message in err
    assert call("shelf", "add", shelf, runs / "cat", "--replace")[0] == 0
