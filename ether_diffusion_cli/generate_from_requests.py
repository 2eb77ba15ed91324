"""`ether-diffusion generate --requests`: images by many adapters, in batches across them."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .generate_request import CONDITION_FLAGS, load, print_images, print_prompt_notes, refuse, sampling_of

if TYPE_CHECKING:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter
    from ether_diffusion.adapters.shelf import Shelf
    from ether_diffusion.generation import SavedRun


def generate_from_requests(arguments: Namespace) -> None:
    """Generate the images of `--requests`.

    Raises:
        UserError: options that exclude each other; a faulty request; or adapters that cannot share a batch.
    """
    from ether_diffusion.adapters.adapter_bank import AdapterBank
    from ether_diffusion.adapters.shelf import Shelf
    from ether_diffusion.generation import Sampling, generate_requests, read_requests
    from ether_diffusion.models.families.table import denoiser_of, family_of

    _check_options(arguments)
    requests = read_requests(arguments.requests)
    sampling = sampling_of(Sampling, arguments)
    names = list(dict.fromkeys(request.adapter for request in requests if request.adapter is not None))
    shelf = Shelf(arguments.shelf) if arguments.shelf is not None else None
    runs = {} if shelf is not None else _read_runs(names)
    first = _base_of(shelf) if shelf is not None else next(iter(runs.values()), None)
    output = Path(arguments.output or Path("images") / Path(arguments.requests).stem)
    pipeline, record = load(arguments, first, with_adapter=False)
    sampling = sampling_of(Sampling, arguments, family_of(pipeline).sampling)
    prompts = list(dict.fromkeys(request.prompt for request in requests))
    print_prompt_notes(pipeline, record["base_model"], prompts, sampling.negative_prompt, first)
    device = pipeline._execution_device
    if shelf is not None:
        bank = AdapterBank.open(shelf.path, denoiser_of(pipeline), max(arguments.batch_size, 64), device=device)
    else:
        bank = AdapterBank(denoiser_of(pipeline), max(1, len(names)), device=device)
        for name, run in runs.items():
            bank.load(name, _adapter(run))
    images = generate_requests(
        pipeline,
        bank,
        requests,
        output,
        sampling=sampling,
        resolution=arguments.resolution,
        batch_size=arguments.batch_size,
        record=record,
    )
    print_images(images, output)


def _check_options(arguments: Namespace) -> None:
    from ether_diffusion.errors import UserError

    refuse(arguments, "{} excludes --requests, which takes prompts alone.", *CONDITION_FLAGS)
    given = {
        "--adapter": arguments.adapter,
        "--lora": getattr(arguments, "lora", None),
        "--scale": arguments.scale != 1,
        "--seed": arguments.seed != 0,
        "--num-images": arguments.num_images != 1,
    }
    flag = next((flag for flag, value in given.items() if value), None)
    if flag is not None:
        raise UserError(f"generate: {flag} excludes --requests: each request states its own.")
    for flag, value in (
        ("--merge", arguments.merge),
        ("--compare", arguments.compare),
        ("--offload sequential", arguments.offload == "sequential"),
    ):
        if value:
            raise UserError(f"generate: {flag} excludes --requests, which mixes adapters in a batch.")


def _read_runs(names: list[str]) -> dict[str, SavedRun]:
    """The runs of these names, all of one base. Raises UserError: they are not, or one takes conditions."""
    from ether_diffusion.errors import UserError
    from ether_diffusion.generation import read_run

    runs = {name: read_run(name) for name in names}
    first = next(iter(runs.values()), None)
    for name, run in runs.items():
        if run.condition_encoder is not None:
            raise UserError(f"{name} is a controllable run; --requests takes prompts alone.")
        assert first is not None
        for what in ("base_model", "revision", "vae"):
            one, other = getattr(first, what), getattr(run, what)
            if one != other:
                raise UserError(
                    f"{name} cannot share a batch with {first.path}: their {what} is {other} and {one}. Generate "
                    "with one file of requests for each base."
                )
    return runs


def _adapter(run: SavedRun) -> SavedAdapter:
    from ether_diffusion.adapters.saved_adapter import SavedAdapter
    from ether_diffusion.errors import UserError

    if not isinstance(run.adapter, SavedAdapter):
        raise UserError(f"{run.path} is no adapter; --requests takes ETHER and ETHER+ adapters.")
    return run.adapter


def _base_of(shelf: Shelf) -> SavedRun:
    """What a shelf states of the base of its adapters, in the place of a run."""
    from ether_diffusion.generation import SavedRun

    stated = shelf.contents
    config = {"base_model": stated.base_model, "revision": stated.settings.get("revision"), "vae": stated.vae}
    return SavedRun(shelf.path, None, None, config)
