"""Methods at several learning rates on one subject of the miniature: a table of scores, resumable.

python eval/learning_rates.py --output runs/learning_rates
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.config import load_config  # noqa: E402
from ether_diffusion.evaluation.run import Evaluation, evaluate  # noqa: E402
from ether_diffusion.training import dreambooth  # noqa: E402

METHODS = ("ether", "ether_plus", "lora")
RATES = (6e-4, 6e-3, 6e-2)
CONFIG = "quickstart/dreambooth"


def train_and_score(method: str, rate: float, folder: Path, overrides: list[str]) -> Evaluation:
    """One run of the quickstart's config with this method and rate; what is there already is kept."""
    settings = [f"adapter.method={method}", f"training.learning_rate={rate}"]
    fixed = [f"output_dir={folder}", "training.resume=true", "training.tracker=none", "validation.prompts=[]"]
    dreambooth.run(load_config(dreambooth.DreamBoothConfig, CONFIG, [*settings, *fixed, *overrides]))
    return evaluate(folder, folder / "evaluation")


def row(method: str, rate: float, evaluation: Evaluation) -> str:
    """A line of the table, in Markdown."""
    scores = evaluation.after
    values = (scores.identity, scores.clip_i, scores.clip_t, scores.settings, scores.copies)
    return f"| `{method}` | {rate:g} | " + " | ".join(f"{value:.3f}" for value in values) + " |"


def main() -> None:
    """Train, score, print the table and write it to `table.md`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/learning_rates"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for every run alike")
    arguments = parser.parse_args()
    lines = ["| method | rate | backbone | CLIP-I | CLIP-T | settings | copies |", "|---|---|---|---|---|---|---|"]
    before = photos = None
    for method in METHODS:
        for rate in RATES:
            folder = arguments.output / f"{method}-{rate:g}"
            evaluation = train_and_score(method, rate, folder, arguments.overrides)
            before, photos = evaluation.before, evaluation.photos
            lines.append(row(method, rate, evaluation))
    assert before is not None
    assert photos is not None
    lines.append(
        f"| base, untrained | | {before.identity:.3f} | {before.clip_i:.3f} | {before.clip_t:.3f} | "
        f"{before.settings:.3f} | {before.copies:.3f} |"
    )
    lines.append(f"| the photos themselves | | {photos.identity:.3f} | {photos.clip_i:.3f} | | | |")
    text = "\n".join(lines) + "\n"
    (arguments.output / "table.md").write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
