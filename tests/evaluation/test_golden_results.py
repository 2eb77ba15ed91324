"""Results that each version of the format wrote stay readable, and show the same table.

`PYTHONPATH=.:tests python tests/evaluation/test_golden_results.py` writes the file of the version at hand: run it when
the format changes, and leave the older folders as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ether_diffusion.evaluation.comparison import comparison
from ether_diffusion.evaluation.results import Results
from ether_diffusion.version import __version__

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("*/results.json"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_results_of_an_earlier_version_show_what_they_showed(folder: Path, tmp_path: Path) -> None:
    results = Results.read(folder)
    assert results.table() + "\n" == (folder / "table.txt").read_text(encoding="utf-8")
    assert results.save(tmp_path / "again.json").read_bytes() == (folder / "results.json").read_bytes()
    assert comparison({"one": results, "two": results}, allow_incomplete=True)


def test_there_are_results_of_a_version() -> None:
    assert FOLDERS


def _metric(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "higher_is_better": True, **more}


def _write(folder: Path) -> None:
    """Write results that use every field."""
    counts = {"subjects": 1, "prompts": 2, "images": 4, "expected": 5, "black": 1, "missing": 1, "duplicate": 0}
    results = Results.model_validate(
        {
            "protocol": "s2i/csail-v1",
            "protocol_digest": "a" * 64,
            "run": {"base_model": "tiny", "seed": 0, "steps": 20, "guidance": 4.0, "scheduler": "ddim"},
            "data": {"maps of validation": "c" * 64},
            "judges": {"csail": {"source": "a file", "sha256": "b" * 64}},
            "versions": {"ether_diffusion": __version__},
            "absent_subjects": ["cat"],
            "ceilings": {"mIoU": 0.6},
            "ceilings_per_subject": {"mIoU": {"dog": 0.6}},
            "counts": counts,
            "metrics": {
                "mIoU": _metric(0.25, per_class={"1": 0.2, "2": 0.3}, absent_classes=[3]),
                "CLIP-T": _metric(0.3, per_subject={"dog": 0.3}, per_prompt={"a dog": 0.3}),
            },
            "per_image": {"csail": {"scene": [[1, 4, 8, 6], [2, 0, 3, 2]]}},
        }
    )
    folder.mkdir(parents=True)
    results.save(folder / "results.json")
    (folder / "table.txt").write_text(results.table() + "\n", encoding="utf-8")
    (folder / ".ether_diffusion").unlink()


if __name__ == "__main__":
    _write(GOLDEN / __version__)
