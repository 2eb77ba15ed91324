"""What a call of `generate` asks for, by prompts or under conditions: a pipeline, sampling settings, prompts."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ether_diffusion.generation import GeneratedImages, Sampling, SavedRun

S = TypeVar("S", bound="Sampling")

DATASET_FLAGS = ("split", "captions", "caption_template", "limit")
LARGEST = {"num_images": 100_000, "batch_size": 1024, "resolution": 8192, "height": 8192, "width": 8192}
MOST_IMAGES = 1_000_000
CONDITION_FLAGS = (
    "dataset",
    "condition",
    "preprocessor",
    "condition_scale",
    "condition_start",
    "condition_end",
    "height",
    "width",
    *DATASET_FLAGS,
)


def read_parts(arguments: Namespace) -> SavedRun | None:
    """What `--adapter` and `--lora` name; None: nothing. One adapter alone has its strength in `arguments.scale` then.

    Raises:
        UserError: as `read_run` and `read_sum`.
    """
    from ether_diffusion.generation import read_run, read_sum
    from ether_diffusion.hub import local_copy

    if len(arguments.adapter) == 1 and not arguments.lora:
        ((path, strength),) = arguments.adapter
        arguments.scale *= strength
        return read_run(local_copy(path))
    parts = [*arguments.adapter, *arguments.lora]
    return read_sum(parts) if parts else None


def default_output(arguments: Namespace, saved: SavedRun | None) -> Path:
    """`RUN/images/NAME`, named for the prompt, or for the file or data set of prompts or conditions.

    Of several runs together, `images/RUNS-NAME`.
    """
    from ether_diffusion.files import CHECKPOINTS
    from ether_diffusion.generation import SummedRuns

    file = arguments.condition or arguments.dataset or arguments.prompts
    words = f"{Path(file).stem if file else ''} {arguments.prompt or ''}"
    name = re.sub(r"\W+", "-", words.lower()).strip("-")[:60].rstrip("-") or "all"
    if isinstance(saved, SummedRuns):
        return Path("images") / "-".join([*(part.path.stem for part, _ in saved.parts), name])[:200]
    is_here = saved is not None and Path(arguments.adapter[0][0]).exists()  # and not in the hub's cache
    root = saved.path if saved is not None and is_here else Path()
    if root.parent.name == CHECKPOINTS:
        root, name = root.parent.parent, f"{root.name}-{name}"
    elif root.name == "adapter":
        root = root.parent
    return root / "images" / name


def load(
    arguments: Namespace, saved: SavedRun | None, *, with_adapter: bool = True
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline, and the facts about its models that each image's file records.

    Args:
        with_adapter: False: the base alone; in place of a controllable run, in a pipeline that takes conditions.
    """
    from ether_diffusion.generation import SummedRuns, load_pipeline

    base_model = arguments.base_model or (saved.base_model if saved else None)
    vae = arguments.vae or (saved.vae if saved else None)
    scale = arguments.scale if with_adapter else 1.0
    pipeline, adapter = load_pipeline(
        saved if with_adapter else None,
        base_model=base_model,
        revision=saved.revision_of(base_model) if saved else None,
        vae=vae,
        allow_pickle=arguments.allow_pickle,
        scale=scale,
        merged=arguments.merge and with_adapter,
        takes_conditions=saved is not None and saved.condition_encoder is not None,
        device=arguments.device,
        dtype=arguments.dtype,
        resolution=arguments.resolution,
        quantization=arguments.quantization,
        offload=arguments.offload,
    )
    record: dict[str, Any] = {"base_model": base_model}
    if arguments.quantization is not None:
        record["quantization"] = arguments.quantization
    if vae is not None:
        record["vae"] = vae
    if with_adapter and isinstance(saved, SummedRuns):
        record["weight_changes"] = saved.record(scale)
    elif adapter is not None:
        record |= {"adapter": adapter.digest, "scale": scale, "merged": arguments.merge}
    return pipeline, record


def check_numbers(arguments: Namespace) -> None:
    """Refuse numbers that no machine can follow.

    Raises:
        UserError: the first of them.
    """
    from ether_diffusion.errors import UserError

    for name, most in LARGEST.items():
        value = getattr(arguments, name)
        if value is not None and value > most:
            raise UserError(f"generate: --{name.replace('_', '-')} {value}: expected at most {most:,}.")


def check_prompts(prompts: Sequence[str], arguments: Namespace) -> None:
    """Refuse prompts that are too long, and more images than a folder should hold. Raises UserError."""
    from ether_diffusion.errors import UserError
    from ether_diffusion.generation.folders import check_prompt

    for prompt in prompts:
        check_prompt(prompt)
    if (count := len(prompts) * arguments.num_images) > MOST_IMAGES:
        raise UserError(f"generate: {count:,} images; expected at most {MOST_IMAGES:,} in a call.")


def print_prompt_notes(
    pipeline: DiffusionPipeline,
    base_model: str,
    prompts: Sequence[str],
    negative_prompt: str,
    saved: SavedRun | None,
) -> None:
    """Print once what the text encoder does not read of the prompts."""
    from ether_diffusion.models.bases import TINY
    from ether_diffusion.models.families.table import family_of
    from ether_diffusion.models.prompt_notes import long_texts_note, unknown_words_note

    texts = [*prompts, *filter(None, [negative_prompt])]
    notes = [long_texts_note(*family_of(pipeline).prompt_reader(pipeline.components), texts)]
    if base_model == TINY:
        data = [run.config.get("data") or {} for run in (saved.runs if saved else ())]
        notes.append(unknown_words_note(prompts, " ".join(str(one.get("identifier") or "") for one in data).split()))
    for note in filter(None, notes):
        print(f"ether-diffusion: {note}.", file=sys.stderr)


def sampling_of(kind: type[S], arguments: Namespace, defaults: Mapping[str, Any] = MappingProxyType({})) -> S:
    """The settings that were given, and this kind's defaults for the others. Raises UserError: a value out of range.

    Args:
        defaults: Of a base's family, before this kind's.
    """
    import pydantic

    from ether_diffusion.errors import UserError

    given = {name: getattr(arguments, name) for name in kind.model_fields if getattr(arguments, name) is not None}
    try:
        return kind(**{**defaults, **given})
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        flag = "".join(f"--{str(name).replace('_', '-')} {fault['input']}: " for name in fault["loc"])
        raise UserError(f"generate: {flag}{fault['msg'].removeprefix('Value error, ')}.") from error


def prompts_of(arguments: Namespace) -> list[str] | None:
    """The prompt, or the prompts of the file, that was given; None: neither was."""
    from ether_diffusion.generation import read_prompts

    if arguments.prompt is not None:
        return [arguments.prompt]
    return read_prompts(arguments.prompts) if arguments.prompts is not None else None


def refuse(arguments: Namespace, reason: str, *names: str) -> None:
    """Raise UserError if one of these options was given; `reason` with the option in the place of {}."""
    from ether_diffusion.errors import UserError

    for name in names:
        if getattr(arguments, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UserError("generate: " + reason.replace("{}", flag, 1))


def print_images(images: GeneratedImages, output: Path) -> None:
    """Print how many images there are, and warn of those that are black or hold NaN."""
    files, faults = images.files, list(images.faults.values())
    grids = " to ".join(dict.fromkeys(sheet.name for sheet in (*images.sheets[:1], *images.sheets[-1:])))
    print(f"{len(files):,} image{'s' * (len(files) != 1)}, {grids or 'grid.png'} and images.jsonl in {output}")
    if faults:
        counts = f"{faults.count('nan')} NaN and {faults.count('black')} black"
        print(
            f"ether-diffusion: of {len(files)} images {counts}; images.jsonl says which. Try --dtype fp32.",
            file=sys.stderr,
        )


def print_sheets(files: Sequence[Path]) -> None:
    """Print where a contact sheet and its further pages are."""
    print(f"Contact sheet: {files[0]}{f' to {files[-1].name}' * (len(files) > 1)}")
