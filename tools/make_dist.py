"""Build the source distribution and the wheel, check their metadata, and try the wheel in an environment of its own.

    python tools/make_dist.py [--output dist] [--constraints constraints.txt]

In temporary environments: `build` makes both files, the wheel from the source distribution, and `twine check` reads
their metadata. The wheel is then installed with all that it needs (a few GB), and its commands train, generate, export
and describe on the miniature, outside the checkout. Needs the network, unless pip has everything in its cache.
"""

from __future__ import annotations

import argparse
import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ether_diffusion", "ether_diffusion_cli")

TRIAL = (
    "train dreambooth --config quickstart/dreambooth output_dir=run data.prior=null training.steps=2 "
    "adapter.target=attention validation.prompts=[]",
    "generate --adapter run --prompt=qwe --steps 2 --device cpu --output images",
    "export run --output mug.safetensors",
    "inspect mug.safetensors",
    "push run --repo someone/mug --dry-run",
    "doctor --base tiny",
)
"""What the installed commands must do: the quickstart in short, images, a LoRA file, a folder for the hub."""


def main() -> None:
    """Build, check, try, and print what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder (default: %(default)s)")
    parser.add_argument("--constraints", type=Path, help="versions of what the wheel needs, as pip takes them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tools = environment(folder / "tools")
        run(tools, "-m", "pip", "install", "--quiet", "build", "twine")
        run(tools, "-m", "build", "--outdir", folder / "dist", copy_sources(folder / "source"))
        files = sorted((folder / "dist").iterdir())
        run(tools, "-m", "twine", "check", "--strict", *files)
        problems = check(*files)
        if problems:
            sys.exit("\n".join(problems))
        clean = environment(folder / "clean")
        limits = ["--constraint", arguments.constraints.resolve()] if arguments.constraints else []
        (wheel,) = (folder / "dist").glob("*.whl")
        print(f"Installing {wheel.name} with all that it needs (a few GB)", flush=True)
        run(clean, "-m", "pip", "install", "--quiet", *limits, wheel)
        try_commands(clean, folder / "elsewhere")
        arguments.output.mkdir(parents=True, exist_ok=True)
        for file in files:
            print(shutil.copy2(file, arguments.output))


def copy_sources(folder: Path) -> Path:
    """Copy what a fresh clone holds, so that leftovers of this checkout cannot help, nor get into the files."""
    listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def environment(folder: Path, *, reuse: bool = False) -> Path:
    """Make a virtual environment, and return its Python.

    Args:
        reuse: Take dependencies from the environment that runs this, but not its editable installs: for tests.
    """
    venv.create(folder, with_pip=not reuse)
    if reuse:
        site = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
        # A path file in a folder that is not a site folder itself: the path files of that one are not read.
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(python: Path, *words: str | Path, cwd: Path | None = None) -> str:
    """Run a Python with these words; its output. Exits with what it printed if it fails."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(python), *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def check(*files: Path) -> list[str]:
    """What is wrong with a source distribution and a wheel: their metadata, against each other and the checkout's."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = {"Name": project["name"], "Version": project["version"], "License-Expression": project["license"]}
    problems, described = [], {}
    for file in files:
        facts, names = _metadata(file)
        described[file] = sorted((key, value) for key, value in facts.items() if key != "License-File")
        problems += [
            f"{file.name}: {key} is {facts[key]!r}; expected {value!r}"
            for key, value in expected.items()
            if facts[key] != value
        ]
        problems += [f"{file.name}: no {key}" for key in ("Summary", "Requires-Python") if not facts[key]]
        if not str(facts.get_payload()).lstrip().startswith("# ether_diffusion"):
            problems.append(f"{file.name}: its description is not the README")
        ours = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
        missing = sorted(name for name in ours if not any(found.endswith(name) for found in names))
        problems += [f"{file.name}: {name} is missing" for name in missing]
    if len({str(facts) for facts in described.values()}) > 1:
        problems.append(f"{', '.join(file.name for file in described)}: their metadata differ")
    return problems


def try_commands(python: Path, folder: Path) -> None:
    """Run the commands of an environment in a new folder outside the checkout."""
    folder.mkdir()
    where = run(python, "-c", "import ether_diffusion; print(ether_diffusion.__file__)", cwd=folder)
    if Path(where.strip()).is_relative_to(ROOT):
        sys.exit(f"{where.strip()} is the checkout's, not the wheel's")
    for words in TRIAL:
        print(f"ether-diffusion {words}", flush=True)
        run(python, "-m", "ether_diffusion_cli", *words.split(), cwd=folder)


def _metadata(file: Path) -> tuple[Message, list[str]]:
    """The metadata of a distribution, and the names of its files."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(archive.read(name)), names
    with tarfile.open(file) as archive:
        names = archive.getnames()
        name = min((name for name in names if name.endswith("/PKG-INFO")), key=len)
        content = archive.extractfile(name)
        assert content is not None
        return email.message_from_bytes(content.read()), names


if __name__ == "__main__":
    main()
