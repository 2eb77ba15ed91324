"""The laws that `make lint` checks: each finds what breaks it, and nothing else."""

from __future__ import annotations

import pytest

import laws
from laws import Source


@pytest.mark.parametrize(
    ("path", "text", "found"),
    [
        ("ether_diffusion/a.py", 'write(folder / ".weights.partial")', ["whole_files_in_one_place"]),
        ("ether_diffusion/a.py", 'folder / f"step-{step:06d}"', ["whole_files_in_one_place"]),
        ("eval/miniature_paper/a.py", 'folder.glob("step-*")', ["whole_files_in_one_place"]),
        ("ether_diffusion_cli/a.py", 'name.removeprefix("step-")', ["whole_files_in_one_place"]),
        ("ether_diffusion/a.py", "from hashlib import sha256", ["whole_files_in_one_place"]),
        ("ether_diffusion/files.py", 'import hashlib\nx = ".partial", "step-*"', []),
        ("ether_diffusion/a.py", '"""Writes `step-000200/` and .partial files."""', []),
        ("ether_diffusion/a.py", 'help = "RUN/checkpoints/step-…, step-by-step"', []),
        (
            "ether_diffusion/a.py",
            "try:\n    import wandb\nexcept ImportError:\n    pass",
            ["optional_packages_where_used"],
        ),
        ("ether_diffusion/a.py", "from matplotlib.figure import Figure", ["optional_packages_where_used"]),
        ("ether_diffusion/a.py", "def plot():\n    from matplotlib.figure import Figure", []),
        ("ether_diffusion/a.py", "if TYPE_CHECKING:\n    import ray", []),
        ("ether_diffusion_cli/a.py", "from ether_diffusion.errors import UserError", ["light_command_line"]),
        ("ether_diffusion_cli/a.py", "import argparse\nfrom .tasks import TASKS", []),
        ("ether_diffusion_cli/a.py", "def run():\n    from ether_diffusion.errors import UserError", []),
        ("eval/a.py", "from ether_diffusion.config import load_config", ["thin_scripts"]),
        ("eval/a.py", "import sys\nfrom ether_diffusion_cli import main\nfrom miniature_paper.plan import Plan", []),
        ("eval/miniature_paper/a.py", "from ether_diffusion.config import load_config", []),
        ("ether_diffusion/a.py", "def f():\n    import ether_diffusion_cli", ["package_apart_from_its_users"]),
        ("ether_diffusion/a.py", "from peft.utils.other import _get_submodules", ["private_names_of_peft"]),
        (
            "ether_diffusion/a.py",
            "def f():\n    from peft.tuners._buffer_dict import Buffer",
            ["private_names_of_peft"],
        ),
        ("ether_diffusion/adapters/peft_layers.py", "from peft.tuners._buffer_dict import BufferDict", []),
    ],
)
def test_a_law_finds_what_breaks_it_and_nothing_else(path: str, text: str, found: list[str]) -> None:
    assert [law for law, _ in laws.breaches([Source(path, text)])] == found


def test_a_breach_is_a_place_and_what_to_do() -> None:
    ((_, line),) = laws.breaches([Source("ether_diffusion/a.py", '"""A module."""\n\nimport hashlib\n')])
    assert line == "ether_diffusion/a.py:3: hashlib: take digests from ether_diffusion/files.py"


def test_two_modules_of_one_name_are_found_but_for_those_that_may_share_it() -> None:
    paths = ("report/page", "studio/page", "ether/config", "tuners/config", "analysis/cost")
    sources = [Source(f"ether_diffusion/{path}.py", "") for path in paths]
    sources += [Source("ether_diffusion_cli/cost.py", ""), Source("eval/cost.py", "")]
    ((law, line),) = laws.breaches(sources)
    assert law == "module_names_are_unique"
    assert line.startswith("ether_diffusion/studio/page.py:1: a module of this name is ether_diffusion/report/page.py;")


def test_sources_are_those_of_both_packages_and_eval() -> None:
    paths = {source.path for source in laws.read_sources()}
    assert {"ether_diffusion/files.py", "ether_diffusion_cli/main.py", "eval/benchmark.py"} <= paths
    assert "eval/miniature_paper/config.py" in paths
