"""`ether-diffusion data`: checks a folder of pairs, captions its images, and fetches the public data sets."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from .arguments import Commands, add_batch_size, add_device, add_dtype

DATA_SETS = {
    "dreambooth": "DreamBooth's 30 subjects (158 photos, 112 MB)",
    "ade20k": "ADE20K's scene parsing set (22,210 images with label maps, 1 GB)",
}


def add_parser(commands: Commands) -> None:
    actions = commands.group(
        "data",
        "ACTION",
        "check a folder of photos, or of images and conditions; caption images; fetch the paper's data sets",
        "Check, caption and fetch training data.",
    )
    _add_check(actions)
    _add_caption(actions)
    for name, what in DATA_SETS.items():
        fetch = actions.add(
            name,
            run_fetch,
            f"fetch {what}",
            f"Fetch {what}, and unpack it into DIR. The next call resumes an interrupted one; files that "
            "are there are kept. Without a network it prints what to fetch by hand, and where to put it.",
        )
        fetch.add_argument("--to", required=True, metavar="DIR", help="the folder that holds the data set's own folder")
        fetch.set_defaults(data_set=name)


def _add_check(actions: Commands) -> None:
    parser = actions.add(
        "check",
        run_check,
        "find what would stop or spoil a training",
        "Read every file of a folder of photos, or of a data set of images and conditions, and count faults: missing "
        "pairs, damaged files, labels out of range, colours that are not the palette's, maps as JPEG, sizes that "
        "differ, empty captions. Exit code: 0 clean, 2 faults.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="as data.instance_dir or data.dataset_dir of a config; or builtin:scenes")
    add("--split", metavar="NAME", help="default: all")
    add("--condition", metavar="KIND", default="auto", help="auto, labels, image, or a preprocessor (default: auto)")
    add("--captions", metavar="PATH", help="JSON lines or text files (default: those of the data set)")
    add("--base-model", metavar="NAME", help="count the captions' tokens with this base's tokenizer (default: words)")
    add("--sheet", metavar="FILE", help="write a PNG of a few pairs: image, condition, one over the other")


def _add_caption(actions: Commands) -> None:
    parser = actions.add(
        "caption",
        run_caption,
        "caption images with a BLIP model",
        "Write FOLDER/captions/SPLIT.jsonl, a line an image. The next call resumes an interrupted one.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="as data.dataset_dir of a config; or builtin:scenes")
    add("--split", metavar="NAME", default="training", help="default: training")
    add("--model", metavar="NAME", help="a BLIP captioning model of the hub, or a folder")
    add("--start", metavar="TEXT", default="", help="words that each caption begins with")
    add("--output", metavar="FILE", help="default: FOLDER/captions/SPLIT.jsonl")
    add_batch_size(parser, 8)
    add_device(parser)
    add_dtype(parser)


def run_check(arguments: Namespace) -> None:
    """Print what was found, and write the sheet.

    Raises:
        UserError: as `check_folder`; or faults in the folder, after the report.
    """
    from ether_diffusion.data.check import check_folder
    from ether_diffusion.errors import UserError
    from ether_diffusion.models.bases import load_prompt_reader
    from ether_diffusion.models.prompt_notes import long_texts_note
    from ether_diffusion.own_files import check_own
    from ether_diffusion.pictures import save_png

    if arguments.sheet and arguments.sheet.endswith("/"):
        raise UserError(f"--sheet {arguments.sheet}: a folder; expected the name of a PNG file")
    if arguments.sheet:
        check_own(Path(arguments.sheet))
    reader = load_prompt_reader(arguments.base_model) if arguments.base_model else None
    findings = check_folder(
        arguments.folder,
        split=arguments.split,
        condition=arguments.condition,
        captions=Path(arguments.captions) if arguments.captions else None,
        long_texts=partial(long_texts_note, *reader, what="captions") if reader else None,
        shown=True,
    )
    print("\n".join(findings.lines()))
    if arguments.sheet:
        print(f"Sheet: {save_png(findings.sheet(), arguments.sheet, own=True)}")
    if findings.faults:
        raise UserError(f"{findings.folder} has faults")


def run_caption(arguments: Namespace) -> None:
    """Caption the images that have no caption, and print how many there are.

    Raises:
        UserError: no images there, or no such model.
    """
    from ether_diffusion.data.blip import BLIP, Captioner, images_of, write_captions
    from ether_diffusion.data.pair_captions import own_captions
    from ether_diffusion.generation import pick_device, pick_dtype

    folder, files = images_of(arguments.folder, arguments.split)
    output = Path(arguments.output) if arguments.output else folder / "captions" / f"{arguments.split}.jsonl"
    # In the default file, captions of the data set come first: it takes their place. Another file replaces nothing.
    kept = {} if arguments.output or output.exists() else own_captions(files, folder, arguments.split)
    device = pick_device(arguments.device)
    captioner = Captioner(
        arguments.model or BLIP, device=device, dtype=pick_dtype(device, arguments.dtype), start=arguments.start
    )
    output = output.expanduser()
    done = write_captions(captioner, folder, files, output, kept=kept, batch_size=arguments.batch_size)
    print(f"{done.total:,} captions in {done.file}, {done.written:,} of them written by this call")
    if kept:
        print(f"Captions copied from the data set: {len(kept):,}")
    if done.wordless:
        print(f"Left out, for their caption is empty: {len(done.wordless):,}: {', '.join(done.wordless[:3])}")


def run_fetch(arguments: Namespace) -> None:
    """Fetch a data set, and print how to train on it. Raises UserError as `fetch_set`."""
    from ether_diffusion.data.public_sets import PUBLIC_SETS, fetch_set

    which = PUBLIC_SETS[arguments.data_set]
    folder, written = fetch_set(which, arguments.to)
    print(f"{folder}: complete; files written by this call: {written:,}. Licence: {which.licence}.")
    if which.before:
        print(which.before.format(folder=folder))
    print(f"Train with {which.use.format(folder=folder)}")
