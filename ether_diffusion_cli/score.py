"""`ether-diffusion score`: runs, checkpoints or images under a protocol -> results.json and a table."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Commands, add_batch_size, add_device

if TYPE_CHECKING:
    from ether_diffusion.evaluation.own_subject import OwnSubject
    from ether_diffusion.evaluation.protocols import MapProtocol, SubjectProtocol
    from ether_diffusion.evaluation.run_scores import RunScores

SUBJECTS, TINY_SUBJECTS = "dreambooth/subject-macro-v1", "tinyworld/dreambooth-v1"
MAPS, TINY_MAPS = "s2i/csail-v1", "tinyworld/s2i-v1"
SUBJECT_OPTIONS = ("ceilings", "real", "identifier", "photos", "class_name", "prompts")
MAP_OPTIONS = ("dataset", "captions", "caption_template")

DESCRIPTION = f"""\
Score runs, checkpoints or images under a protocol: results.json with intervals, and a table.

  RUN                                  generates the protocol's images with a run, and scores them
  RUN --all-checkpoints                every checkpoint, and the Pareto set of the protocol's two main metrics
  RUN --photos DIR                     one's own subject: against one's photos, with the prompts of its kind
  --images DIR --real PHOTOS           DIR/SUBJECT/images.jsonl or DIR/SUBJECT/PROMPT/, against PHOTOS/SUBJECT/
  --images DIR --dataset DATASET       images named as the scenes of a data set of label maps
  --ceilings --real PHOTOS             photos against one another, with the same scorers; needs no images

The protocol is --protocol, or the default of the run's kind: {SUBJECTS} for subjects,
{MAPS} for a controllable run; on the base tiny, {TINY_SUBJECTS} and {TINY_MAPS}."""


def add_parser(commands: Commands) -> None:
    parser = commands.add(
        "score",
        run,
        "score runs or images under a protocol, to compare methods",
        DESCRIPTION,
    )
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders, one a subject; or checkpoints")
    add("--images", type=Path, metavar="DIR", help="images that exist already, instead of runs")
    add("--protocol", metavar="NAME", help="a shipped protocol or a file (default: above)")
    add("--output", type=Path, metavar="DIR", help="default: RUN/evaluation/PROTOCOL, or --images")
    add("--all-checkpoints", action="store_true", help="score every checkpoint of a run")
    add(
        "--scorer",
        "--judge",
        dest="scorers",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="the file, folder or hub name of a scorer's weights (default: the protocol's); may be given several times",
    )
    add_batch_size(parser, 8)
    add_device(parser)
    subjects = parser.add_argument_group("protocols of subjects").add_argument
    subjects("--real", metavar="DIR", help="photos by subject; builtin: for the miniature's (default: each run's)")
    subjects("--identifier", metavar="WORD", help="in the prompts of --images (default: the protocol's)")
    subjects("--ceilings", action="store_true", help="score the photos of --real against one another")
    own = parser.add_argument_group("one's own subject").add_argument
    own("--photos", metavar="DIR", help="its photos, or builtin:SUBJECT; any class, on any base")
    own("--class", dest="class_name", metavar="WORD", help="its category, such as dog (default: the run's)")
    own("--prompts", metavar="FILE", help="a prompt a line, with {subject}; or object, or live (default: by the class)")
    maps = parser.add_argument_group("protocols of label maps").add_argument
    maps("--dataset", metavar="DIR", help="maps and real images, or builtin:scenes (default: the run's)")
    maps("--captions", type=Path, metavar="PATH", help="JSON lines or text files (default: those of the data set)")
    maps("--caption-template", metavar="TEXT", help='for images without a caption: "a photo of a {scene}"')


def run(arguments: Namespace) -> None:
    """Generate what is missing, score, write and print.

    Raises:
        UserError: arguments that exclude each other, or what the parts that they name raise.
    """
    from ether_diffusion.evaluation.comparison import FILE as CHOICE
    from ether_diffusion.evaluation.results import FILE
    from ether_diffusion.own_files import check_own

    _check(arguments)
    own = _own_subject(arguments)
    protocol = own.protocol if own else _protocol(arguments)
    if arguments.ceilings:
        _print_ceilings(arguments, protocol)
        return
    output = arguments.output or arguments.images
    if output is None:
        output = arguments.runs[0] / "evaluation" / protocol.name.replace("/", "-")
    check_own(output / (CHOICE if arguments.all_checkpoints else FILE))
    scores = _run_scores(arguments, protocol, own)
    if own:
        from ether_diffusion.evaluation.own_subject import NOTE

        print(f"{len(own.protocol.templates(own.run.subject))} prompts ({own.kind}). {NOTE}")
    if arguments.all_checkpoints:
        choice = scores.of_checkpoints(arguments.runs[0], output)
        print(f"{choice.table()}\nResults: {output / CHOICE}")
        return
    results = scores.of_images(arguments.images, output) if arguments.images else scores.of_runs(arguments.runs, output)
    print(f"{results.table()}\nResults: {output / FILE}")


def _check(arguments: Namespace) -> None:
    from ether_diffusion.errors import UserError

    if bool(arguments.runs) + bool(arguments.images) + arguments.ceilings != 1:
        raise UserError("score: expected RUN, or --images DIR, or --ceilings; see --help.")
    if arguments.images and not (arguments.real or arguments.dataset):
        raise UserError("score: --images needs --real, the photos of its subjects, or --dataset, its maps.")
    if arguments.real and arguments.dataset:
        raise UserError("score: --real is for subjects, and --dataset for label maps; give one of them.")
    if arguments.ceilings and not arguments.real:
        raise UserError("score: --ceilings needs --real, the photos of the subjects.")
    if arguments.all_checkpoints and len(arguments.runs) != 1:
        raise UserError("score: --all-checkpoints needs one RUN.")
    if len(arguments.runs) > 1 and not arguments.output:
        raise UserError("score: several runs need --output.")
    if arguments.photos and (len(arguments.runs) != 1 or arguments.protocol or arguments.real):
        raise UserError("score: --photos needs one RUN, and takes neither --protocol nor --real.")
    for option in ("class_name", "prompts"):
        if getattr(arguments, option) and not arguments.photos:
            raise UserError(f"score: --{option.removesuffix('_name')} is for --photos, one's own subject; give both.")


def _own_subject(arguments: Namespace) -> OwnSubject | None:
    from ether_diffusion.evaluation.own_subject import own_subject

    if not arguments.photos:
        return None
    _protocol(arguments)  # refuses options of label maps, and controllable runs
    return own_subject(
        arguments.runs[0], arguments.photos, arguments.class_name, arguments.prompts, arguments.identifier
    )


def _protocol(arguments: Namespace) -> SubjectProtocol | MapProtocol:
    """The protocol that was given, or the default for what is scored. Refuses options and runs of the other kind."""
    from ether_diffusion.errors import UserError
    from ether_diffusion.evaluation.protocols import MapProtocol, load_any_protocol
    from ether_diffusion.evaluation.subject_images import BUILTIN
    from ether_diffusion.generation import read_run

    runs = [read_run(path) for path in arguments.runs]
    name = arguments.protocol
    if name is None:
        is_tiny = runs[0].base_model == "tiny" if runs else arguments.ceilings and arguments.real == BUILTIN
        is_of_maps = runs[0].condition_encoder is not None if runs else arguments.dataset is not None
        name = (TINY_MAPS if is_tiny else MAPS) if is_of_maps else (TINY_SUBJECTS if is_tiny else SUBJECTS)
    protocol = load_any_protocol(name)
    is_of_maps = isinstance(protocol, MapProtocol)
    what = f"{protocol.name} is a protocol of {'label maps' if is_of_maps else 'subjects'}"
    for option in SUBJECT_OPTIONS if is_of_maps else MAP_OPTIONS:
        if getattr(arguments, option):
            raise UserError(f"score: --{option.replace('_', '-')}: {what}, which has no such option.")
    for path, run in zip(arguments.runs, runs, strict=True):
        if (run.condition_encoder is not None) != is_of_maps:
            kind = "a run of a subject" if is_of_maps else "a controllable run"
            raise UserError(f"{path}: {kind}, but {what}. Give another --protocol.")
    return protocol


def _run_scores(arguments: Namespace, protocol: SubjectProtocol | MapProtocol, own: OwnSubject | None) -> RunScores:
    from ether_diffusion.errors import UserError
    from ether_diffusion.evaluation.map_images import find_scenes
    from ether_diffusion.evaluation.own_subject import OwnSubjectScores
    from ether_diffusion.evaluation.protocols import SubjectProtocol
    from ether_diffusion.evaluation.run_scores import MapRunScores, SubjectRunScores
    from ether_diffusion.evaluation.scorers import load_scorers, sources
    from ether_diffusion.generation import pick_device, read_run

    given, device = sources(arguments.scorers), str(pick_device(arguments.device))
    common = {"batch_size": arguments.batch_size, "device": arguments.device}
    if isinstance(protocol, SubjectProtocol):
        scorers = load_scorers(protocol.judges, given, device)
        if own:
            return OwnSubjectScores(protocol=protocol, scorers=scorers, subject=own, **common)
        return SubjectRunScores(
            protocol=protocol, scorers=scorers, real=arguments.real, identifier=arguments.identifier, **common
        )
    dataset = arguments.dataset
    if dataset is None:
        saved = read_run(arguments.runs[0])
        dataset = (saved.config.get("data") or {}).get("dataset_dir")
        if dataset is None:
            raise UserError(f"{saved.path} is in no run folder whose config.yaml names its data set; give --dataset.")
    # Images that exist already need no captions.
    template = arguments.caption_template or ("{name}" if arguments.images else None)
    pairs = find_scenes(protocol, dataset, arguments.captions, template)
    return MapRunScores(protocol=protocol, scorers=load_scorers(protocol.judges, given, device), pairs=pairs, **common)


def _print_ceilings(arguments: Namespace, protocol: SubjectProtocol | MapProtocol) -> None:
    from ether_diffusion.evaluation.ceilings import FILE, find_ceilings
    from ether_diffusion.evaluation.protocols import SubjectProtocol
    from ether_diffusion.evaluation.scorers import load_scorers, sources
    from ether_diffusion.generation import pick_device
    from ether_diffusion.own_files import check_own

    assert isinstance(protocol, SubjectProtocol)
    if arguments.output:
        check_own(arguments.output / FILE)
    scorers = load_scorers(protocol.judges, sources(arguments.scorers), str(pick_device(arguments.device)))
    ceilings = find_ceilings(protocol, arguments.real, scorers, arguments.batch_size)
    print(ceilings.table())
    if arguments.output:
        print(f"Ceilings: {ceilings.save(arguments.output / FILE)}")
