"""Subject-driven generation under a protocol: runs or images in, results.json and a table out.

python eval/dreambooth.py RUN                            # draws the protocol's images of a run, and scores them
python eval/dreambooth.py RUN --all-checkpoints          # each, and the Pareto set of subject and prompt fidelity
python eval/dreambooth.py --images IMAGES --real PHOTOS  # IMAGES/SUBJECT/images.jsonl or IMAGES/SUBJECT/PROMPT/
python eval/dreambooth.py --ceilings --real PHOTOS       # the photos against one another, by the same judges; no images
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.errors import exit_code  # noqa: E402
from ether_diffusion.evaluation.ceilings import FILE as CEILINGS  # noqa: E402
from ether_diffusion.evaluation.ceilings import find_ceilings  # noqa: E402
from ether_diffusion.evaluation.choice import checkpoints_of, choose  # noqa: E402
from ether_diffusion.evaluation.protocols import SubjectProtocol, load_protocol  # noqa: E402
from ether_diffusion.evaluation.results import FILE, Results  # noqa: E402
from ether_diffusion.evaluation.scorers import Loaded, load_scorers, sources  # noqa: E402
from ether_diffusion.evaluation.subject_images import BUILTIN, SubjectImages, find_images  # noqa: E402
from ether_diffusion.evaluation.subject_runs import check_one_method, find_run, generate_run, recorded_settings  # noqa: E402
from ether_diffusion.evaluation.subject_scores import score_subject, subject_results  # noqa: E402
from ether_diffusion.generation import pick_device, read_run  # noqa: E402
from ether_diffusion_cli.main import _positive  # noqa: E402

DEFAULT, TINY_DEFAULT = "dreambooth/subject-macro-v1", "tinyworld/dreambooth-v1"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders, one a subject; or checkpoints")
    add("--images", type=Path, metavar="DIR", help="images that are drawn already, instead of runs")
    add("--real", metavar="DIR", help="photos by subject; builtin: for the miniature's (default: each run's)")
    add("--protocol", metavar="NAME", help=f"or a file (default: {DEFAULT}; {TINY_DEFAULT} on base tiny)")
    add("--identifier", metavar="WORD", help="in the prompts of --images (default: the protocol's)")
    add("--output", type=Path, metavar="DIR", help="default: RUN/evaluation/PROTOCOL, or --images; none of --ceilings")
    add("--ceilings", action="store_true", help="score the photos of --real against one another; no images needed")
    add("--all-checkpoints", action="store_true", help="score every checkpoint of a run")
    add("--judge", action="append", default=[], metavar="NAME=SOURCE", help="where a judge's weights are")
    add("--batch-size", type=_positive, default=8, metavar="N", help="images at a time (default: 8)")
    add("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    arguments = parser.parse_args()
    if bool(arguments.runs) + bool(arguments.images) + arguments.ceilings != 1:
        parser.error("expected run folders, or --images, or --ceilings")
    if not arguments.runs and not arguments.real:
        parser.error(f"{'--images' if arguments.images else '--ceilings'} needs --real, the photos of its subjects")
    if arguments.all_checkpoints and len(arguments.runs) != 1:
        parser.error("--all-checkpoints takes one run folder")
    if len(arguments.runs) > 1 and not arguments.output:
        parser.error("several runs need --output")
    return arguments


def evaluate(arguments: argparse.Namespace) -> None:
    """Draw what is to be drawn, score, write and print."""
    builtin = arguments.ceilings and arguments.real == BUILTIN
    tiny = builtin or (arguments.runs and read_run(arguments.runs[0]).base_model == "tiny")
    protocol = load_protocol(SubjectProtocol, arguments.protocol or (TINY_DEFAULT if tiny else DEFAULT))
    judges = load_scorers(protocol.judges, sources(arguments.judge), str(pick_device(arguments.device)))
    if arguments.ceilings:
        ceilings = find_ceilings(protocol, arguments.real, judges, arguments.batch_size)
        print(ceilings.table())
        if arguments.output:
            print(f"Ceilings: {ceilings.save(arguments.output / CEILINGS)}")
        return
    if arguments.images:
        found = find_images(protocol, arguments.images, arguments.real, arguments.identifier)
        save(score(protocol, found, judges, arguments), (arguments.output or arguments.images) / FILE)
        return
    output = arguments.output or arguments.runs[0] / "evaluation" / protocol.name.replace("/", "-")
    if not arguments.all_checkpoints:
        save(score(protocol, draw(protocol, arguments.runs, output, arguments), judges, arguments), output / FILE)
        return
    results = {}
    for name, path in checkpoints_of(arguments.runs[0]).items():
        found = draw(protocol, [path], output / name, arguments)
        results[name] = score(protocol, found, judges, arguments)
        results[name].save(output / name / FILE)
    chosen = choose(protocol, results)
    print(f"{chosen.table()}\nResults: {chosen.save(output)}")


def draw(
    protocol: SubjectProtocol, runs: list[Path], output: Path, arguments: argparse.Namespace
) -> list[SubjectImages]:
    """The images of each run."""
    options = {"real": arguments.real, "batch_size": arguments.batch_size, "device": arguments.device}
    found = [find_run(protocol, path) for path in runs]
    check_one_method({run.subject: {"method": run.method} for run in found})
    return [generate_run(protocol, run, output / "images", **options) for run in found]


def score(
    protocol: SubjectProtocol, found: list[SubjectImages], judges: dict[str, Loaded], arguments: argparse.Namespace
) -> Results:
    """One subject after another. Of runs their own subjects are asked for, of a folder all of the protocol's."""
    asked = [one.name for one in found] if arguments.runs else None
    told = recorded_settings(found)  # before the judges are asked
    scored = (score_subject(one, protocol, judges, arguments.batch_size) for one in found)
    return subject_results(protocol, scored, judges, told, asked)


def save(results: Results, path: Path) -> None:
    """Write results and print their table."""
    results.save(path)
    print(results.table())
    print(f"Results: {path}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/dreambooth.py", lambda: evaluate(parse())))
