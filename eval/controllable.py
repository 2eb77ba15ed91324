"""Semantic maps to images under a protocol: a run or images in, results.json and a table out.

python eval/controllable.py RUN                                  # draws the protocol's scenes of a run, and scores them
python eval/controllable.py RUN --all-checkpoints                # each, and the Pareto set
python eval/controllable.py --images IMAGES --dataset ADEChallengeData2016 --judge segmenter=FOLDER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ether_diffusion.quiet import quiet_dependencies

quiet_dependencies()  # before the imports below, some of which warn

from ether_diffusion.errors import UserError, exit_code  # noqa: E402
from ether_diffusion.evaluation.choice import checkpoints_of, choose  # noqa: E402
from ether_diffusion.evaluation.map_images import MapImages, find_map_images, generate_map_images  # noqa: E402
from ether_diffusion.evaluation.map_scores import find_scenes, score_maps  # noqa: E402
from ether_diffusion.evaluation.protocols import MapProtocol, load_protocol  # noqa: E402
from ether_diffusion.evaluation.results import FILE, Results  # noqa: E402
from ether_diffusion.evaluation.scorers import load_scorers, sources  # noqa: E402
from ether_diffusion.generation import SavedRun, pick_device, read_run  # noqa: E402
from ether_diffusion_cli.main import _positive  # noqa: E402

DEFAULT, TINY_DEFAULT = "s2i/csail-v1", "tinyworld/s2i-v1"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", nargs="?", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints")
    add("--images", type=Path, metavar="DIR", help="images that are drawn already, instead of a run")
    add("--dataset", metavar="DIR", help="maps and real images, or builtin:scenes (default: the run's)")
    add("--captions", type=Path, metavar="PATH", help="JSON lines or text files (default: what the data set has)")
    add("--caption-template", metavar="TEXT", help='for images without a caption: "a photo of a {scene}"')
    add("--protocol", metavar="NAME", help=f"or a file (default: {DEFAULT}; {TINY_DEFAULT} on base tiny)")
    add("--output", type=Path, metavar="DIR", help="default: RUN/evaluation/PROTOCOL, or --images")
    add("--all-checkpoints", action="store_true", help="score every checkpoint of the run")
    add("--judge", action="append", default=[], metavar="NAME=SOURCE", help="where a judge's weights are")
    add("--batch-size", type=_positive, default=8, metavar="N", help="images at a time (default: 8)")
    add("--device", metavar="NAME", help="default: cuda, else mps, else cpu")
    arguments = parser.parse_args()
    if bool(arguments.run) == bool(arguments.images):
        parser.error("expected a run folder, or --images")
    if arguments.images and (not arguments.dataset or arguments.all_checkpoints):
        parser.error("--images needs --dataset, its maps and real images, and has no checkpoints")
    return arguments


def evaluate(arguments: argparse.Namespace) -> None:
    """Draw what is to be drawn, score, write and print."""
    run = read_run(arguments.run) if arguments.run else SavedRun(arguments.images, None, None)
    tiny = run.base_model == "tiny"
    protocol = load_protocol(MapProtocol, arguments.protocol or (TINY_DEFAULT if tiny else DEFAULT))
    dataset = arguments.dataset or run.config.get("data", {}).get("dataset_dir")
    if dataset is None:
        raise UserError(f"{run.path} lies in no run folder, whose config.yaml names the data set; give --dataset.")
    # Images that are drawn already need no captions.
    template = arguments.caption_template or ("{name}" if arguments.images else None)
    pairs = find_scenes(protocol, dataset, arguments.captions, template)
    judges = load_scorers(protocol.judges, sources(arguments.judge), str(pick_device(arguments.device)))

    def score(images: MapImages, path: Path) -> Results:
        results = score_maps(protocol, pairs, images, judges, dict(images.facts), arguments.batch_size)
        results.save(path)
        return results

    def draw(source: Path, output: Path) -> MapImages:
        options = {"batch_size": arguments.batch_size, "device": arguments.device}
        return generate_map_images(protocol, source, pairs, output, **options)

    if arguments.all_checkpoints:
        output = arguments.output or arguments.run / "evaluation" / protocol.name.replace("/", "-")
        results = {
            name: score(draw(path, output / name), output / name / FILE)
            for name, path in checkpoints_of(arguments.run).items()
        }
        chosen = choose(protocol, results)
        print(f"{chosen.table()}\nResults: {chosen.save(output)}")
        return
    if arguments.images:
        images, output = find_map_images(protocol, arguments.images, pairs), arguments.output or arguments.images
    else:
        output = arguments.output or arguments.run / "evaluation" / protocol.name.replace("/", "-")
        images = draw(arguments.run, output)
    print(f"{score(images, output / FILE).table()}\nResults: {output / FILE}")


if __name__ == "__main__":
    sys.exit(exit_code("eval/controllable.py", lambda: evaluate(parse())))
