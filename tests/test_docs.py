"""The documentation: its links lead somewhere, its snippets run, the messages that it explains are the package's."""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

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


def test_the_python_page_runs_as_it_stands(finished_run: Path, tmp_path: Path) -> None:
    """All blocks in one namespace, in order, beside a finished run."""
    shutil.copytree(finished_run, tmp_path / "runs/toy")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    assert len(blocks) > 5
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        namespace: dict[str, object] = {}
        for block in blocks:
            exec(compile(block, "docs/python.md", "exec"), namespace)
    finally:
        os.chdir(here)
    assert (tmp_path / "my_adapter/adapter_model.safetensors").is_file()


def test_every_message_that_is_explained_is_one_of_the_packages() -> None:
    """What stands between the gaps of a quoted message stands, in one string, in the source."""
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("## Of other programs")[0]
    cells = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| `")]
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    known = "\n".join(text for path in (ROOT / "ether_diffusion").rglob("*.py") for text in _strings(path))
    parts = {message: [part.strip(" :(") for part in message.split(GAP)] for message in messages}
    assert {m: part for m, found in parts.items() for part in found if part not in known} == {}


def _strings(path: Path) -> Iterator[str]:
    """Every string of a module, those in pieces put together, with a gap where a value goes in."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values)
