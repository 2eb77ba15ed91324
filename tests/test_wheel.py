"""The wheel: what it holds, what it needs, and that its commands work outside the checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

import make_dist

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_a_declared_dependency() -> None:
    declared = {canonical(re.split(r"[<>=\[ ]", requirement)[0]) for requirement in PROJECT["dependencies"]}
    optional = {canonical(re.split(r"[<>=\[ ]", r)[0]) for rs in PROJECT["optional-dependencies"].values() for r in rs}
    of_module = packages_distributions()
    packages = ("ether_diffusion", "ether_diffusion_cli")
    files = [*(file for name in packages for file in (ROOT / name).rglob("*.py")), *ROOT.glob("*.py")]
    undeclared = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for top in {str(name).split(".")[0] for name in names}:
                if top in (*sys.stdlib_module_names, "triton") or top.startswith(
                    "ether_diffusion"
                ):  # torch's own, on CUDA
                    continue
                owners = {canonical(owner) for owner in of_module.get(top, [top])}
                if not owners & (declared | optional):
                    undeclared.add((file.name, top))
    assert not undeclared


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, as `make dist` builds it, but with the tools that are here."""
    folder = tmp_path_factory.mktemp("sdist")
    make = "import setuptools.build_meta, sys; setuptools.build_meta.build_sdist(sys.argv[1])"
    make_dist.run(Path(sys.executable), "-c", make, folder, cwd=make_dist.copy_sources(folder / "source"))
    (built,) = folder.glob("*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that the source distribution gives."""
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    make_dist.run(Path(sys.executable), *build, "--wheel-dir", sdist.parent, sdist)
    (built,) = sdist.parent.glob("*.whl")
    return built


@pytest.mark.slow
def test_metadata_and_sources_of_both_files_are_whole(sdist: Path, wheel: Path) -> None:
    assert make_dist.check(sdist, wheel) == []


@pytest.mark.slow
def test_a_distribution_that_lacks_a_module_is_found(wheel: Path, tmp_path: Path) -> None:
    broken = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(broken, "w") as archive:
        for name in whole.namelist():
            if name != "ether_diffusion/hub.py":
                content = whole.read(name)
                is_metadata = name.endswith("/METADATA")
                archive.writestr(name, content.replace(b"\nVersion: ", b"\nVersion: 9.") if is_metadata else content)
    problems = make_dist.check(wheel, broken)
    assert any("ether_diffusion/hub.py is missing" in problem for problem in problems)
    assert any("Version is '9." in problem for problem in problems)
    assert any("their metadata differ" in problem for problem in problems)


@pytest.mark.slow
def test_what_make_dist_tries_works(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which takes the dependencies from that of the tests."""
    python = make_dist.environment(tmp_path / "env", reuse=True)
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    make_dist.run(Path(sys.executable), *install)
    make_dist.try_commands(python, tmp_path / "elsewhere")


@pytest.mark.slow
def test_the_wheel_holds_both_packages_the_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"ether_diffusion", "ether_diffusion_cli"}
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"ether_diffusion/{name}" for name in shipped} <= set(names)
    sources = (path for top in tops for path in (ROOT / top).rglob("*") if "__pycache__" not in path.parts)
    files = {path.relative_to(ROOT).as_posix() for path in sources if path.is_file()}
    assert files <= set(names)  # modules, weights, protocols


@pytest.mark.slow
def test_the_commands_of_the_installed_wheel_work_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which takes the dependencies from that of the tests."""
    python = make_dist.environment(tmp_path / "env", reuse=True)
    scripts = python.parent
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    make_dist.run(Path(sys.executable), *install)
    work = tmp_path / "elsewhere"
    work.mkdir()

    def call(*command: str | Path) -> str:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        done = subprocess.run(
            [*map(str, command)], cwd=work, capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        return done.stdout

    where = call(scripts / "python", "-c", "import ether_diffusion; print(ether_diffusion.__file__)")
    assert str(tmp_path / "env") in where
    tool = scripts / "ether-diffusion"
    overrides = ["data.prior=null", "training.steps=2", "validation.prompts=[]", "output_dir=run"]
    quickstart = ("--config", "quickstart/dreambooth", "adapter.target=attention")
    printed = call(tool, "train", "dreambooth", *quickstart, *overrides)
    assert "32,256 trainable parameters" in printed
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m"]
    train = ["ether_diffusion_cli", "train", "dreambooth"]
    call(scripts / "python", *launch, *train, "--config", "run/config.yaml", "output_dir=again", *overrides[:1])
    call(tool, "generate", "--adapter", "again", "--prompt", "a qwe toy", "--steps", "2", "--output", "images")
    assert len(list((work / "images").glob("00-*.png"))) == 1
    assert yaml.safe_load((work / "run/config.yaml").read_text())["training"]["steps"] == 2
    ceilings = call(tool, "score", "--ceilings", "--real", "builtin:", "--output", "ceilings")
    assert "tinyworld/dreambooth-v1" in ceilings
    assert (work / "ceilings/ceilings.json").is_file()
    call(tool, "analyze", "geometry", "again", "--output", "geometry")
    assert (work / "geometry/command.txt").read_text() == "ether-diffusion analyze geometry again --output geometry\n"
