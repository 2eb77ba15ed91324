"""Write ETHER as a patch against the installed release of PEFT: dist/peft-VERSION-ether.patch.

    python tools/peft_patch.py [--output dist]

The tuner is ether_diffusion/ether/ as it stands, with PEFT's licence header, and with PEFT's own registration in the
place of ours. The patch adds the registration, a page of docs, and two experiments for PEFT's comparison of methods on
image generation. In a checkout of PEFT: `git apply peft-VERSION-ether.patch`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TUNER = HERE.parent / "ether_diffusion/ether"
SOURCE = "src/peft"
YEAR = "2026"
LEFT_OUT = ("__init__.py", "registry.py")
"""Files of the tuner that enter it into PEFT's tables from outside."""

ADAPTED: dict[str, list[tuple[str, str]]] = {
    "config.py": [
        (r"import enum\n", ""),
        (
            r"from peft\.utils\.other import get_pattern_key\n",
            "from peft.utils import PeftType\nfrom peft.utils.other import get_pattern_key\n",
        ),
        (r'class EtherPeftType\(str, enum\.Enum\):.*?ETHER = "ETHER"\n\n\n', ""),
        (r"EtherPeftType\.ETHER  # pyright.*?\n", "PeftType.ETHER\n"),
    ],
    "model.py": [
        (r">>> import ether_diffusion\n", ">>> from peft import EtherConfig\n"),
        (r"ether_diffusion\.EtherConfig\(", "EtherConfig("),
    ],
}
"""What changes in a file of the tuner: patterns that match once, and what takes their place."""
REGISTERED: dict[str, list[tuple[str, str]]] = {
    "utils/peft_types.py": [
        (r"    - DEFT\n(?=    \"\"\")", "    - DEFT\n    - ETHER\n"),
        (r'(?<=\n)    (\w+) = "\1"\n(?=\n\nclass TaskType)', '    \\1 = "\\1"\n    ETHER = "ETHER"\n'),
    ],
    "tuners/__init__.py": [
        (r"from \.fourierft import", "from .ether import EtherConfig, EtherModel\nfrom .fourierft import"),
        (r'    "EvaConfig",\n', '    "EtherConfig",\n    "EtherModel",\n    "EvaConfig",\n'),
    ],
    "__init__.py": [
        (r"(?<=\n)    EvaConfig,\n", "    EtherConfig,\n    EtherModel,\n    EvaConfig,\n"),
        (r'    "EvaConfig",\n', '    "EtherConfig",\n    "EtherModel",\n    "EvaConfig",\n'),
    ],
}
"""The same for files of PEFT."""

INIT = """from peft.utils import register_peft_method

from .config import EtherConfig
from .layer import EtherLayer
from .model import EtherModel


__all__ = ["EtherConfig", "EtherLayer", "EtherModel"]

register_peft_method(name="ether", config_cls=EtherConfig, model_cls=EtherModel)
"""
_LICENSE = f"""Copyright {YEAR}-present the HuggingFace Inc. team.

Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
"""
COMMENT = "".join(f"# {line}".rstrip() + "\n" for line in _LICENSE.splitlines())

COMPARISON = "method_comparison/image-gen/experiments/ether"
TARGETS = [
    *("to_out.0", "to_add_out", "to_qkv_mlp_proj", "add_k_proj", "add_q_proj", "add_v_proj", "to_k", "to_q", "to_v"),
    *("linear_in", "linear_out"),
]
"""The layers of FLUX.2-klein that the other methods of that comparison adapt."""
TRAINING = {"optimizer_kwargs": {"lr": 6e-3, "weight_decay": 0.0001}}
"""The paper's learning rate, in the place of the comparison's 3e-4."""


def main() -> None:
    """Write the patch, and print where it is and what it leaves to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE.parent / "dist", help="folder (default: %(default)s)")
    folder: Path = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"peft-{importlib.metadata.version('peft')}-ether.patch"
    files = patched_files(installed_peft())
    path.write_text(make_patch(files), encoding="utf-8")
    print(f"{path}: {len(files)} files")
    print("PEFT's release has no docs/source/_toctree.yml: add package_reference/ether there by hand.")


def installed_peft() -> Path:
    """The folder of the installed package, which is not imported."""
    spec = importlib.util.find_spec("peft")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def patched_files(peft: Path) -> dict[str, tuple[str | None, str]]:
    """By path in PEFT's repository: a file's text before, None where there is none, and after.

    Raises:
        ValueError: a place that changes is not there, once: this PEFT is another one than the patch is made for.
    """
    files: dict[str, tuple[str | None, str]] = {}
    for name, changes in REGISTERED.items():
        text = (peft / name).read_text(encoding="utf-8")
        files[f"{SOURCE}/{name}"] = text, _changed(name, text, changes)
    files[f"{SOURCE}/tuners/ether/__init__.py"] = None, f"{COMMENT}\n{INIT}"
    for path in sorted(TUNER.glob("*.py")):
        if path.name not in LEFT_OUT:
            text = _changed(path.name, path.read_text(encoding="utf-8"), ADAPTED.get(path.name, []))
            files[f"{SOURCE}/tuners/ether/{path.name}"] = None, f"{COMMENT}\n{text}"
    page = (HERE / "peft_page.md").read_text(encoding="utf-8")
    files["docs/source/package_reference/ether.md"] = None, f"<!--{_LICENSE}-->\n\n{page}"
    for variant in ("ether", "ether_plus"):
        folder = f"{COMPARISON}/flux2-klein-{variant.replace('_', '-')}"
        files[f"{folder}/adapter_config.json"] = None, _json(_experiment(variant))
        files[f"{folder}/training_params.json"] = None, _json(TRAINING)
    return files


def make_patch(files: Mapping[str, tuple[str | None, str]]) -> str:
    """The files as a unified diff that `git apply` and `patch -p1` take."""
    return "".join(_diff(path, *texts) for path, texts in sorted(files.items()))


def _diff(path: str, before: str | None, after: str) -> str:
    lines = difflib.unified_diff(
        (before or "").splitlines(keepends=True),
        after.splitlines(keepends=True),
        "/dev/null" if before is None else f"a/{path}",
        f"b/{path}",
    )
    made = "new file mode 100644\n" if before is None else ""
    return f"diff --git a/{path} b/{path}\n{made}{''.join(lines)}"


def _changed(name: str, text: str, changes: list[tuple[str, str]]) -> str:
    for pattern, replacement in changes:
        text, count = re.subn(pattern, replacement, text, flags=re.S)
        if count != 1:
            raise ValueError(f"{name}: {pattern!r} is there {count} times; expected once. Which PEFT is this?")
    return text


def _experiment(variant: str) -> dict[str, Any]:
    """The config of an experiment, with all settings, as `save_pretrained` writes it."""
    from ether_diffusion import EtherConfig

    settings = EtherConfig(variant=variant, target_modules=TARGETS).to_dict()  # pyright: ignore[reportArgumentType]
    return {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
