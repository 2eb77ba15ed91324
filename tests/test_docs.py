"""The documentation: its links lead somewhere, its snippets run, the messages that it explains are the package's."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ether_diffusion.models.bases import load_base
from ether_diffusion_cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GAP = "…"


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


def test_the_serving_page_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # tests/adapters/test_serving.py compiles
    namespace = run_page("serving.md", blocks=3)
    assert list(namespace["pipeline"].unet.peft_config) == ["robot"]
    # The LoRA file is the adapter, in a pipeline that knows of neither ETHER nor this package.
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 8, 16, 16, generator=generator), torch.randn(2, 40, 128, generator=generator)
    with torch.no_grad():
        base, adapted, lora = (
            unet(x, torch.tensor(500), text).sample
            for unet in (load_base("tiny").unet, namespace["unet"], namespace["plain"].unet)
        )
    torch.testing.assert_close(lora, adapted, rtol=0, atol=1e-5)
    assert not torch.allclose(base, adapted, atol=1e-2)


def run_page(page: str, blocks: int) -> dict[str, Any]:
    """Run the commands of a page's first block, then its Python blocks in order, and return their one namespace.

    Args:
        blocks: How many Python blocks there are at least.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    commands, *_ = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
    for line in commands.replace("\\\n", "").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "ether-diffusion"
        assert main(arguments) == 0
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert len(snippets) >= blocks
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), namespace)
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
