"""ETHER as a patch for PEFT: it applies to the installed release, and works there without this package."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn

import peft_patch
from ether_diffusion import EtherConfig

ROOT = Path(__file__).resolve().parent.parent
REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ether_diffusion", "ether_diffusion_cli"):
            raise ImportError(f"{name} is not to be needed")
sys.meta_path.insert(0, Refuse())
"""
"""In the start-up file of a Python process: no import of this package."""
USE = """
import json, sys
import peft, torch
from peft import EtherConfig, PeftModel, get_peft_model
from torch import nn
try:
    import ether_diffusion
except ImportError as error:
    assert "is not to be needed" in str(error)
else:
    raise SystemExit("ether_diffusion was imported")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
adapted = get_peft_model(model, EtherConfig(target_modules=["0", "2"], num_blocks=2, init_weights=False))
assert peft.__file__.startswith(sys.argv[1]), peft.__file__
assert isinstance(adapted.peft_config["default"].peft_type, peft.PeftType)
adapted.save_pretrained(sys.argv[2])
x = torch.linspace(-1, 1, 24).reshape(3, 8)
before = adapted(x)
merged = adapted.merge_and_unload()(x)
torch.testing.assert_close(merged, before)
torch.manual_seed(0)
again = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
torch.testing.assert_close(PeftModel.from_pretrained(again, sys.argv[2])(x), before)
print(json.dumps(before.tolist()))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the installed PEFT with the patch applied, and a start-up file that refuses this package."""
    root = tmp_path_factory.mktemp("peft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["peft_patch.py", "--output", str(root)])
        peft_patch.main()
    (patch,) = root.glob("peft-*-ether.patch")
    import peft

    installed = Path(str(peft.__file__)).parent
    shutil.copytree(installed, root / "src/peft", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "--whitespace=error-all", patch], cwd=root, check=True, capture_output=True)
    (root / "src/sitecustomize.py").write_text(REFUSE)
    return root


def call(patched: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(patched / "src"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd or patched)


@pytest.mark.slow
def test_the_patched_peft_knows_ether_and_computes_what_we_compute(patched: Path, tmp_path: Path) -> None:
    done = call(patched, "-c", USE, str(patched / "src"), str(tmp_path / "saved"))
    assert done.returncode == 0, done.stderr[-2000:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    config = EtherConfig(target_modules=["0", "2"], num_blocks=2, init_weights=False)
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    expected = get_peft_model(model, config)(x)  # pyright: ignore[reportArgumentType]
    assert torch.equal(torch.tensor(json.loads(done.stdout)), expected)


def test_the_patch_holds_the_tuner_as_it_stands(patched: Path) -> None:
    """But for the header, and for how it is registered."""
    changed = []
    for path in sorted((ROOT / "ether_diffusion/ether").glob("*.py")):
        copy = patched / "src/peft/tuners/ether" / path.name
        if copy.exists() and not copy.read_text().endswith(path.read_text()):
            changed.append(path.name)
    assert changed == ["__init__.py", "config.py", "model.py"]
    page = (patched / "docs/source/package_reference/ether.md").read_text()
    assert "[[autodoc]] tuners.ether.config.EtherConfig" in page
    for folder in ("flux2-klein-ether", "flux2-klein-ether-plus"):
        experiment = patched / "method_comparison/image-gen/experiments/ether" / folder
        assert json.loads((experiment / "adapter_config.json").read_text())["peft_type"] == "ETHER"
        assert json.loads((experiment / "training_params.json").read_text())["optimizer_kwargs"]["lr"] == 6e-3


def test_the_tuner_needs_torch_and_peft_alone() -> None:
    found = set()
    for path in (ROOT / "ether_diffusion/ether").glob("*.py"):
        for line in path.read_text().splitlines():
            imported = re.match(r"\s*(?:from|import) ([\w.]+)", line)
            if imported and imported[1].partition(".")[0] not in sys.stdlib_module_names:
                found.add(imported[1].partition(".")[0])
    assert found - {""} == {"peft", "torch", "triton"}


@pytest.mark.slow
def test_pefts_own_tests_of_custom_models_pass(patched: Path) -> None:
    """In PEFT's sources, which are downloaded once, with every import of this package refused."""
    conformance = runpy.run_path(str(ROOT / "tests/conformance/run.py"))
    sources = conformance["peft_sources"](Path(os.environ.get("ETHER_CONFORMANCE_CACHE", ROOT / ".cache")))
    options = ["-q", "-p", "swap", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=ignore"]
    shutil.copy(ROOT / "tests/conformance/swap.py", patched / "src")
    done = call(patched, "-m", "pytest", *options, conformance["TESTS"][0], cwd=sources)
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 500
