"""The documentation: its links lead somewhere, its snippets run, the messages that it explains are the package's."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from torch import nn

from ether_diffusion.adapters.loading import load_adapter
from ether_diffusion.adapters.methods import METHODS
from ether_diffusion.benchmark.config import BenchmarkConfig
from ether_diffusion.benchmark.grid_config import GridConfig
from ether_diffusion.config import load_config
from ether_diffusion.errors import UserError
from ether_diffusion.models.bases import DEFAULT_BASE, load_base
from ether_diffusion.tinyworld.layouts import SplitName, write_ade20k_splits
from ether_diffusion.training.dreambooth_config import DreamBoothConfig
from ether_diffusion_cli import main
from support.unets import small_unet

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "ether_diffusion/tinyworld/weights"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GAP = "…"
SMALL = ("training.batch_size=1", "validation.images_per_prompt=1")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text()
    assert [page.name for page in PAGES[1:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_python_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace = run_page("python.md", blocks=7)
    assert (tmp_path / "my_adapter/adapter_model.safetensors").is_file()
    assert namespace["saved"].folder == Path("runs/toy/adapter")
    assert namespace["pipeline"].text_encoder.active_adapters() == ["default"]


def test_the_language_page_trains_a_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_page("language.md", blocks=4)
    again, ids = found["again"].eval(), found["ids"][None]
    with torch.no_grad():
        trained, merged = again(ids, labels=ids), found["merged"].eval()(ids)
        with again.disable_adapter():
            start = again(ids, labels=ids)
    assert float(trained.loss) < 0.95 * float(start.loss)
    torch.testing.assert_close(merged.logits, trained.logits, rtol=1e-4, atol=1e-4)


def test_the_serving_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # tests/adapters/test_serving.py compiles
    namespace = run_page("serving.md", blocks=6, commands=2)
    assert list(namespace["pipeline"].unet.peft_config) == ["robot", "cat"]
    # The LoRA file is the adapter, in a pipeline that knows of neither ETHER nor this package.
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 40, 128, generator=generator)
    own = load_base("tiny").unet
    load_adapter(own, "runs/robot")
    with torch.no_grad():
        base, adapted, lora = (
            unet(x, torch.tensor(500), text).sample for unet in (load_base("tiny").unet, own, namespace["plain"].unet)
        )
    torch.testing.assert_close(lora, adapted, rtol=0, atol=2e-3)  # the file is fp16
    assert not torch.allclose(base, adapted, atol=1e-2)


BLOCKS = [
    pytest.param(block, id=f"{page.name}, {number}")
    for page in [*PAGES, WEIGHTS / "README.md"]
    for number, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_python_block_names_what_exists(block: str) -> None:
    """Each compiles, and each name that it imports is there, on pages whose blocks are not run, too."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            assert all(importlib.import_module(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def run_blocks(text: str, **given: Any) -> dict[str, Any]:
    """Run a text's Python blocks in order in one namespace, which is returned."""
    namespace = dict(given)
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, "a page", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.fixture
def the_miniature_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads Stable Diffusion v1.5 gets the miniature, with few sampling steps."""
    load: Any = StableDiffusionPipeline.from_pretrained

    def load_miniature(name: str, **options: Any) -> Any:
        if name == DEFAULT_BASE:
            pipeline = load(WEIGHTS / "pipeline", torch_dtype=torch.float32, **options)
        else:
            pipeline = load(name, **options)
        pipeline.set_progress_bar_config(disable=True)
        call = type(pipeline).__call__
        monkeypatch.setattr(type(pipeline), "__call__", partialmethod(call, num_inference_steps=2), raising=True)
        return pipeline

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", load_miniature)


def test_the_readmes_blocks_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, the_miniature_is_the_base: None
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/my_dog").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    namespace = run_blocks(text, unet=small_unet(), model=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    assert (tmp_path / "jungle.png").is_file()
    assert namespace["model"](torch.ones(1, 8)).shape == (1, 4)


def test_the_miniatures_card_and_page_run(monkeypatch: pytest.MonkeyPatch, the_miniature_is_the_base: None) -> None:
    monkeypatch.chdir(ROOT)
    run_blocks((WEIGHTS / "README.md").read_text(encoding="utf-8"))
    assert run_blocks((ROOT / "docs/tinyworld.md").read_text(encoding="utf-8"))["labels"].shape == (64, 64)


def test_the_method_of_the_methods_page_is_accepted() -> None:
    before = set(METHODS)
    try:
        run_blocks((ROOT / "docs/methods.md").read_text(encoding="utf-8"), __name__="a_page")
        assert set(METHODS) - before == {"loha"}
        shipped = load_config(DreamBoothConfig, "dreambooth/ether", ["adapter={method: loha, rank: 2}"])
        assert shipped.adapter.method == "loha"
    finally:
        METHODS.pop("loha", None)


def test_the_block_of_a_generated_card_runs_and_gives_the_runs_weights(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = (finished_run / "adapter/README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "tiny"
    namespace = run_blocks(card.replace("path/to/this/folder", str(finished_run / "adapter")))
    expected = load_base("tiny").unet
    load_adapter(expected, finished_run)
    inputs = torch.ones(1, 8, 16, 16), torch.tensor(5), torch.ones(1, 40, 128)
    with torch.no_grad():
        assert torch.equal(namespace["pipeline"].unet(*inputs).sample, expected(*inputs).sample)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        (
            "dreambooth",
            ['validation.prompts=[the "qwe" cup; at night]', "validation.images_per_prompt=1"],
        ),
        ("controllable", ["data.dataset_dir=my scenes", "validation.images=1"]),
    ],
)
def test_the_printed_command_of_a_run_generates_as_it_is_printed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    settings: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    seeds: dict[SplitName, range] = {"training": range(2), "validation": range(2, 3)}
    write_ade20k_splits("my scenes", seeds)
    settings += ["training.steps=2", "training.batch_size=1", "training.tracker=none", "validation.sampling.steps=1"]
    assert main(["train", task, "--config", f"quickstart/{task}", "output_dir=my run", *settings]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Generate: ")]
    program, *words = shlex.split(line.removeprefix("Generate: "))
    assert program == "ether-diffusion"
    assert main([*words, "--steps", "2"]) == 0
    assert list(tmp_path.glob("my run/images/0*.png" if task == "dreambooth" else "my run/images/images/*.png"))


YAML_BLOCKS = [
    pytest.param(page.name, block, id=page.name)
    for page in PAGES
    for block in re.findall(r"^ *```ya?ml\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.M | re.S)
]
PARTS_OF: dict[str, type[BenchmarkConfig | GridConfig]] = {"analyses.md": GridConfig, "benchmark.md": BenchmarkConfig}
"""The configs that the pages' blocks of YAML are parts of, by the sentences around them."""


@pytest.mark.parametrize(("page", "block"), YAML_BLOCKS)
def test_every_yaml_block_is_a_part_of_the_config_that_its_page_names(
    page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put into the shipped config of the whole benchmark; so are the settings of the trainings that it lists."""
    configs = ROOT / "configs"
    (tmp_path / "my_config.yaml").write_text((configs / "dreambooth/ether_plus.yaml").read_text())
    part, whole = OmegaConf.create(block), OmegaConf.load(configs / "benchmark/dreambooth.yaml")
    whole.dreambooth.methods = {}  # the page's in the place of the shipped ones
    whole = OmegaConf.merge(whole, part)
    OmegaConf.save(whole, tmp_path / "whole.yaml")
    monkeypatch.chdir(tmp_path)
    config = load_config(PARTS_OF[page], "whole.yaml")
    trained = (config.benchmark() if isinstance(config, GridConfig) else config).dreambooth
    assert trained is not None
    assert len(trained.methods) > 1
    for method in trained.methods.values():
        load_config(DreamBoothConfig, method.config, method.settings)


def test_the_typo_of_the_readme_gets_the_answer_of_the_readme() -> None:
    (answer,) = re.findall(r"^ether-diffusion: (command line: .*) …$", (ROOT / "README.md").read_text(), re.M)
    with pytest.raises(UserError) as refused:
        load_config(DreamBoothConfig, "quickstart/dreambooth", [answer.split(": ")[1]])
    assert str(refused.value).startswith(answer)


def run_page(page: str, blocks: int, commands: int = 1) -> dict[str, Any]:
    """Run the Python blocks of a page and its first blocks of commands in order, and return their one namespace.

    Trainings have smaller batches, and fewer images to validate.

    Args:
        blocks: How many Python blocks there are at least.
        commands: How many blocks of commands run.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S)
    assert [kind for kind, _ in found].count("python") >= blocks
    namespace: dict[str, Any] = {}
    for kind, block in found:
        if kind == "python":
            exec(compile(block, page, "exec"), namespace)
            continue
        for line in block.replace("\\\n", "").splitlines() if commands else ():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "ether-diffusion"
            assert main([*arguments, *(SMALL if arguments[0] == "train" else ())]) == 0
        commands = max(0, commands - 1)
    return namespace


def test_every_message_that_is_explained_is_one_of_the_packages() -> None:
    """What stands between the gaps of a quoted message stands, in one string, in the source."""
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("## Of other programs")[0]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    sources = [
        path for package in ("ether_diffusion", "ether_diffusion_cli") for path in (ROOT / package).rglob("*.py")
    ]
    known = "\n".join(text for path in sources for text in _strings(path))
    parts = {message: [part.strip(" :(") for part in message.split(GAP)] for message in messages}
    assert {m: part for m, found in parts.items() for part in found if part not in known} == {}


def _strings(path: Path) -> Iterator[str]:
    """Every string of a module, those in pieces put together, with a gap where a value goes in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
