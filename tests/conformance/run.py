"""Runs PEFT's own tests of adapter methods, from its source distribution, against ETHER.

    python tests/conformance/run.py                  # downloads into .cache/, or $ETHER_CONFORMANCE_CACHE
    python tests/conformance/run.py --cache DIR -- -k merge

The sources are those of the installed PEFT, fetched with pip. What replaces PEFT's tables of methods by ours is the
pytest plugin `swap.py` beside this file. Exits with pytest's status: 0 only if every case passed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = ("tests/test_custom_models.py", "tests/test_stablediffusion.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("ETHER_CONFORMANCE_CACHE", HERE.parents[1] / ".cache")
    parser.add_argument("--cache", type=Path, default=default, help="folder for PEFT's sources (default: %(default)s)")
    parser.add_argument("pytest_args", nargs="*", help="after --: more arguments for pytest")
    args = parser.parse_args()
    sources = peft_sources(args.cache)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "swap", "-p", "no:cacheprovider"]
    # PEFT's own settings ask for coverage and fail on its dependencies' warnings.
    command += ["-o", "addopts=", "-o", "filterwarnings=ignore", *TESTS, *args.pytest_args]
    offline = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return subprocess.run(command, cwd=sources, env={**os.environ, **offline, "PYTHONPATH": path}).returncode


def peft_sources(cache: Path) -> Path:
    """The unpacked source distribution of the installed PEFT, downloaded on first use."""
    name = f"peft-{version('peft')}"
    folder = cache.resolve() / name
    marker = folder / "tests" / "__init__.py"  # the tests import each other relatively, but are packed without it
    if not marker.exists():
        cache.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", cache, name.replace("-", "==", 1)], check=True)
        with tarfile.open(cache / f"{name}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
        marker.touch()
    return folder


if __name__ == "__main__":
    sys.exit(main())
