"""Laws of docs/architecture.md that the sources alone can prove. `make lint` runs this file, which prints each breach.

Import contracts between folders are in pyproject.toml (`lint-imports`); these are the laws beside them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ether_diffusion", "ether_diffusion_cli", "eval")

OPTIONAL = {"bitsandbytes", "deepspeed", "fastapi", "gradio", "matplotlib", "prometheus_client", "ray"}
OPTIONAL |= {"torchao", "triton", "uvicorn", "wandb"}
"""Packages that an extra installs: imported where they are used, so that everything else works without them."""

SHARED_NAMES = {"__init__", "__main__", "config", "layer", "model"}
"""Module names that may occur twice: Python's own, the loader of configs beside configs, and PEFT's tuner layout."""

FILES = "ether_diffusion/files.py"
KERNELS = "ether_diffusion/ether/kernels.py"
"""Made of Triton's decorators, and itself imported only inside the function that needs it."""
PRIVATE_PEFT = {"ether_diffusion/adapters/peft_layers.py", "ether_diffusion/ether/weight_model.py"}
"""The files that may import private names of PEFT, each of which a test guards."""


@dataclass(frozen=True)
class Source:
    """A Python file: its path from the root, with forward slashes, and its text."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def at(self, node: ast.AST, message: str) -> str:
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


def read_sources(root: Path = ROOT) -> list[Source]:
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return [Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


# What a law needs to see of a file


def strings(source: Source) -> Iterator[ast.Constant]:
    """String constants, f-strings' parts included, without docstrings."""
    nodes = list(ast.walk(source.tree))
    # A string that stands as a statement of its own is a docstring, or documents the name before it.
    documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node


@dataclass(frozen=True)
class Import:
    """An import statement: the module's absolute name, and the names taken from it."""

    node: ast.stmt
    module: str
    names: tuple[str, ...] = ()

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def imports(source: Source, *, at_import_time: bool = False) -> Iterator[Import]:
    """All imports. `at_import_time` leaves out those inside functions and under `if TYPE_CHECKING`."""
    package = source.path.removesuffix(".py").split("/")[:-1]
    pending: list[ast.AST] = [source.tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (Import(node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *([node.module] if node.module else [])])
            yield Import(node, module, tuple(alias.name for alias in node.names))
        elif at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        elif at_import_time and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
        else:
            pending.extend(ast.iter_child_nodes(node))


# The laws. Each yields one line a breach.


def whole_files_in_one_place(source: Source) -> Iterator[str]:
    """`files.py` alone writes partial files, computes digests and spells a checkpoint's name."""
    if source.path == FILES:
        return
    for node in strings(source):
        assert isinstance(node.value, str)
        if ".partial" in node.value:
            yield source.at(node, f"{node.value!r}: write whole files with `whole_file` or `whole_folder` of {FILES}")
        if re.search(r"(?<![\w-])step-(?=$|[\d*\\(\[?])", node.value):
            hint = "use `checkpoint_name`, `step_of` or `list_checkpoints`"
            yield source.at(node, f"{node.value!r}: a checkpoint's name is spelt in {FILES} only; {hint}")
    for found in imports(source):
        if found.package == "hashlib":
            yield source.at(found.node, f"hashlib: take digests from {FILES}")


def optional_packages_where_used(source: Source) -> Iterator[str]:
    """A package that an extra installs is imported inside the function that needs it."""
    if source.path == KERNELS:
        return
    for found in imports(source, at_import_time=True):
        if found.package in OPTIONAL:
            yield source.at(found.node, f"{found.package} is optional: import it inside the function that uses it")


def light_command_line(source: Source) -> Iterator[str]:
    """`--help` is answered before anything heavy is imported; importing any part of ether_diffusion imports torch."""
    if not source.path.startswith("ether_diffusion_cli/"):
        return
    for found in imports(source, at_import_time=True):
        if found.package not in sys.stdlib_module_names | {"ether_diffusion_cli"}:
            yield source.at(found.node, f"{found.module} is imported at module level; import it inside the action")


def thin_scripts(source: Source) -> Iterator[str]:
    """Scripts of eval/ are a few lines over the commands, so that users of the wheel can do all that they do."""
    if not re.fullmatch(r"eval/\w+\.py", source.path):
        return
    for found in imports(source):
        if found.package not in sys.stdlib_module_names | {"ether_diffusion_cli", "miniature_paper", "metrics_truth"}:
            allowed = "ether_diffusion_cli, miniature_paper or metrics_truth"
            yield source.at(found.node, f"{found.module}: import {allowed} only")


def package_apart_from_its_users(source: Source) -> Iterator[str]:
    """Nothing in ether_diffusion imports the command line or eval/."""
    if not source.path.startswith("ether_diffusion/"):
        return
    for found in imports(source):
        if found.package in {"ether_diffusion_cli", "miniature_paper", "metrics_truth", "eval"}:
            yield source.at(found.node, f"{found.module}: ether_diffusion imports neither the command line nor eval/")


def private_names_of_peft(source: Source) -> Iterator[str]:
    """PEFT may drop a private name in any release: few files import them, and a test guards each name."""
    if source.path in PRIVATE_PEFT:
        return
    for found in imports(source):
        private = [name for name in (*found.module.split("."), *found.names) if name.startswith("_")]
        if found.package == "peft" and private:
            hint = f"only {', '.join(sorted(PRIVATE_PEFT))} may import it"
            yield source.at(found.node, f"{private[-1]} is a private name of PEFT; {hint}")


LAWS: tuple[Callable[[Source], Iterator[str]], ...] = (
    whole_files_in_one_place,
    optional_packages_where_used,
    light_command_line,
    thin_scripts,
    package_apart_from_its_users,
    private_names_of_peft,
)


def module_names_are_unique(sources: list[Source]) -> Iterator[str]:
    """One name, one module, so that a name finds its file. Commands and scripts are named after what they run."""
    first: dict[str, str] = {}
    for source in sources:
        name = Path(source.path).stem
        if name in SHARED_NAMES or re.fullmatch(r"(ether_diffusion_cli|eval)/\w+\.py", source.path):
            continue
        if name in first:
            yield f"{source.path}:1: a module of this name is {first[name]}; give each a name of its own"
        first.setdefault(name, source.path)


def breaches(sources: list[Source]) -> list[tuple[str, str]]:
    """Every breach of every law: the law's name, and `path:line: message`."""
    found = {(law.__name__, line) for law in LAWS for source in sources for line in law(source)}
    return sorted(found | {("module_names_are_unique", line) for line in module_names_are_unique(sources)})


def main() -> int:
    lines = [line for _, line in breaches(read_sources())]
    print("\n".join(lines) or "Laws kept.")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
