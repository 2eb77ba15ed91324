"""`ether-diffusion generate` under conditions: those of a data set, or label maps, painted maps and photos in files."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .generate_request import (
    DATASET_FLAGS,
    check_prompts,
    load,
    print_images,
    print_prompt_notes,
    print_sheets,
    prompts_of,
    refuse,
    sampling_of,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ether_diffusion.data.condition_kind import ConditionKind
    from ether_diffusion.data.pairs import Pairs
    from ether_diffusion.generation import ControllableSampling, GeneratedImages, SavedRun, Source


def generate_under_conditions(arguments: Namespace, saved: SavedRun, encoder: Path) -> None:
    """Generate the images of a controllable run.

    Args:
        encoder: The folder of its condition encoder, or of its ControlNet.

    Raises:
        UserError: arguments that exclude each other, or what the parts that they name raise.
    """
    from ether_diffusion.data.condition_kind import read_condition_kind
    from ether_diffusion.generation import ControllableSampling, conditioned_rows, generate_conditioned
    from ether_diffusion.models.module_files import module_digest
    from ether_diffusion.own_files import check_own
    from ether_diffusion.pictures import save_sheets

    sources_of = _planned(arguments, saved, read_condition_kind(encoder))
    sampling, output = sampling_of(ControllableSampling, arguments), Path(arguments.output)
    pipeline, record = load(arguments, saved)
    record["condition_encoder"] = module_digest(encoder)
    sources = sources_of(pipeline)
    prompts = [source.prompt for source in sources]
    check_prompts(prompts, arguments)
    print_prompt_notes(pipeline, record["base_model"], prompts, sampling.negative_prompt, saved)

    def generated(
        pipeline: Any, sampling: ControllableSampling, folder: Path, record: dict[str, Any]
    ) -> GeneratedImages:
        return generate_conditioned(
            pipeline,
            sources,
            folder,
            images_per_source=arguments.num_images,
            seed=arguments.seed,
            sampling=sampling,
            batch_size=arguments.batch_size,
            record=record,
        )

    check_own(output / "grid.png", *[output / "contact_sheet.png"] * arguments.compare)
    after = generated(pipeline, sampling, output, record)
    columns = [("generated", after.files)]
    sheets = save_sheets(conditioned_rows(sources, columns), output / "grid.png", own=True)
    print_images(replace(after, sheets=sheets), output)
    if arguments.compare:
        del pipeline  # before another takes as much memory
        # Without features a controllable pipeline generates what the base does, from the same noise.
        pipeline, record = load(arguments, saved, with_adapter=False)
        before = generated(pipeline, sampling.model_copy(update={"condition_scale": 0.0}), output / "before", record)
        rows = conditioned_rows(sources, [("the base alone", before.files), *columns])
        print_sheets(save_sheets(rows, output / "contact_sheet.png", own=True))


def _planned(
    arguments: Namespace, saved: SavedRun, kind: ConditionKind | None
) -> Callable[[DiffusionPipeline], list[Source]]:
    """What to generate, as far as it can be checked without a base; the base's resolution gives the rest."""
    from ether_diffusion.data.other_worlds import pairs_note
    from ether_diffusion.errors import UserError
    from ether_diffusion.generation import find_conditions, pair_sources
    from ether_diffusion.models.bases import TINY

    if (arguments.dataset is None) == (arguments.condition is None):
        raise UserError(
            f"generate: {saved.path} follows conditions: give --dataset DIR, or --condition FILE with --prompt TEXT."
        )
    if kind is not None and arguments.preprocessor not in (None, kind.preprocessor):
        print(f"Note:    {saved.path} was trained on {kind.kind}, not on --preprocessor {arguments.preprocessor}")
    prompts, is_tiny = prompts_of(arguments), (arguments.base_model or saved.base_model) == TINY
    if arguments.dataset is not None:
        if prompts is not None:
            raise UserError("generate: --dataset has captions of its own; leave out --prompt and --prompts.")
        square = "images of --dataset are square; leave out {}, or give --resolution."
        refuse(arguments, square, "height", "width")
        pairs = _pairs(arguments, saved, kind)
        if is_tiny:
            _print_note(pairs_note(pairs))
        return lambda pipeline: pair_sources(pairs, arguments.resolution or _resolution(pipeline))
    refuse(arguments, "{} needs --dataset.", *DATASET_FLAGS)
    if prompts is None:
        raise UserError("generate: --condition needs --prompt TEXT, or --prompts FILE.")
    if arguments.resolution is not None:
        refuse(arguments, "give --resolution, or --height and --width.", "height", "width")
    files = find_conditions(arguments.condition)
    return lambda pipeline: _read_files(arguments, files, prompts, kind, is_tiny, pipeline)


def _pairs(arguments: Namespace, saved: SavedRun, kind: ConditionKind | None) -> Pairs:
    from ether_diffusion.data.conditions import AS_IT_IS
    from ether_diffusion.data.pairs import find_pairs
    from ether_diffusion.errors import UserError

    data, split = saved.config.get("data") or {}, arguments.split or "validation"
    captions = Path(arguments.captions) if arguments.captions else _captions_of_run(saved, arguments.dataset, split)
    pairs = find_pairs(
        arguments.dataset,
        split=split,
        condition={AS_IT_IS: "image"}.get(arguments.preprocessor, arguments.preprocessor)
        or (kind.kind if kind else "auto"),
        captions=captions,
        caption_template=arguments.caption_template or data.get("caption_template"),
        cache_dir=Path(data["cache_dir"]) if data.get("cache_dir") else None,
        limit=arguments.limit,
    )
    for note in pairs.notes:
        print(f"Note:    {note}")
    if kind is not None and not kind.same_colours(pairs.palette):
        raise UserError(f"--dataset {arguments.dataset}: its maps have other colours than {saved.path} was trained on.")
    what = f"label maps of {len(pairs.palette) - 1} classes" if pairs.palette is not None else pairs.kind
    print(f'Pairs:   {len(pairs):,} in {pairs.folder}, split "{pairs.split}", conditions: {what}')
    return pairs


def _captions_of_run(saved: SavedRun, dataset: str, split: str) -> Path | None:
    """The captions that the run's config names for this split, if it was trained on this data set."""
    from ether_diffusion.data.pair_captions import captions_of_split

    data, validation = saved.config.get("data") or {}, saved.config.get("validation") or {}
    if not data.get("dataset_dir") or Path(data["dataset_dir"]).expanduser() != Path(dataset).expanduser():
        return None
    own = validation.get("captions") if split == (validation.get("split") or "validation") else None
    given = data.get("captions")
    return captions_of_split(split, data["split"], Path(given) if given else None, Path(own) if own else None)


def _read_files(
    arguments: Namespace,
    files: Sequence[Path],
    prompts: Sequence[str],
    kind: ConditionKind | None,
    is_tiny: bool,
    pipeline: DiffusionPipeline,
) -> list[Source]:
    from ether_diffusion.data.other_worlds import conditions_note
    from ether_diffusion.generation import file_sources, fitting_size, read_conditions

    sources, counts, sizes = [], {}, set()
    for file, condition in read_conditions(files, kind=kind, preprocessor=arguments.preprocessor):
        size = fitting_size(
            condition.image.size,
            resolution=arguments.resolution or _resolution(pipeline),
            multiple=_multiple(pipeline),
            height=arguments.height,
            width=arguments.width,
        )
        sizes.add(condition.image.size)
        line = f"read as {condition.taken_for}, images of {size[0]} x {size[1]}"
        counts[line] = counts.get(line, 0) + 1
        sources += file_sources(file, condition, prompts, size)
    for line, count in counts.items():
        print(f"{arguments.condition}: {f'{count} files ' * (len(files) > 1)}{line}")
    if is_tiny:
        _print_note(conditions_note(arguments.condition, sizes, kind))
    return sources


def _print_note(note: str | None) -> None:
    if note:
        print(f"ether-diffusion: {note}.", file=sys.stderr)


def _resolution(pipeline: Any) -> int:
    return int(pipeline.unet.config["sample_size"]) * pipeline.vae_scale_factor


def _multiple(pipeline: Any) -> int:
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)
