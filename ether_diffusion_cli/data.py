"""`ether-diffusion data`: checks a folder of pairs, captions its images, and fetches the public data sets."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ether_diffusion.data.check import check_folder
from ether_diffusion.data.public_sets import PUBLIC_SETS, fetch_set
from ether_diffusion.errors import UserError
from ether_diffusion.pictures import save_png


def run_data(arguments: Namespace) -> None:
    """Do what the arguments say.

    Raises:
        UserError: what the parts raise; for `check`, faults in the folder, after the report.
    """
    {"check": _check, "caption": _caption, **dict.fromkeys(PUBLIC_SETS, _fetch)}[arguments.action](arguments)


def _check(arguments: Namespace) -> None:
    findings = check_folder(
        arguments.folder,
        split=arguments.split,
        condition=arguments.condition,
        captions=Path(arguments.captions) if arguments.captions else None,
        shown=True,
    )
    print("\n".join(findings.lines()))
    if arguments.sheet:
        print(f"Sheet: {save_png(findings.sheet(), arguments.sheet)}")
    if findings.faults:
        raise UserError(f"{findings.folder} has faults")


def _caption(arguments: Namespace) -> None:
    from ether_diffusion.data.blip import BLIP, Captioner, images_of, write_captions
    from ether_diffusion.data.pair_captions import own_captions
    from ether_diffusion.generation import pick_device, pick_dtype

    folder, files = images_of(arguments.folder, arguments.split)
    output = Path(arguments.output) if arguments.output else folder / "captions" / f"{arguments.split}.jsonl"
    # Elsewhere nothing takes the place of what the data set has.
    kept = {} if arguments.output or output.exists() else own_captions(files, folder, arguments.split)
    device = pick_device(arguments.device)
    captioner = Captioner(
        arguments.model or BLIP, device=device, dtype=pick_dtype(device, arguments.dtype), start=arguments.start
    )
    output = output.expanduser()
    done = write_captions(captioner, folder, files, output, kept=kept, batch_size=arguments.batch_size)
    print(f"{done.total:,} captions in {done.file}, {done.written:,} of them written by this call")
    if kept:
        print(f"Captions that the data set had already, copied: {len(kept):,}")
    if done.wordless:
        print(f"Without a word, and not in it: {len(done.wordless):,}: {', '.join(done.wordless[:3])}")


def _fetch(arguments: Namespace) -> None:
    which = PUBLIC_SETS[arguments.action]
    folder, written = fetch_set(which, arguments.to)
    print(f"{folder}: whole; files written by this call: {written:,}. Licence: {which.licence}.")
    if which.before:
        print(which.before.format(folder=folder))
    print(f"Train with {which.use.format(folder=folder)}")
