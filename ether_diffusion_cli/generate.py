"""`ether-diffusion generate`: arguments -> a pipeline, and images from prompts, from conditions or from a data set."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from PIL import Image

from ether_diffusion.data.condition_kind import ConditionKind, read_condition_kind
from ether_diffusion.data.conditions import AS_IT_IS
from ether_diffusion.data.pair_captions import captions_of_split
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.data.photos import find_photos
from ether_diffusion.errors import UserError
from ether_diffusion.generation import (
    ControllableSampling,
    Sampling,
    SavedRun,
    Source,
    conditioned_sheet,
    file_sources,
    find_conditions,
    fitting_size,
    generate,
    generate_conditioned,
    pair_sources,
    read_conditions,
    read_run,
)
from ether_diffusion.models.condition_encoder import condition_encoder_digest
from ether_diffusion.pictures import read_settings, save_png, sheet

from .generate_arguments import given_flags, load, prompts_of, sampling_of


def run_generate(arguments: Namespace) -> None:
    """Draw what the arguments say.

    Raises:
        UserError: arguments that do not go together, or what the parts they name raise.
    """
    if arguments.adapter is None and arguments.base_model is None:
        raise UserError("generate: give --adapter RUN, or --base-model NAME to draw from a base alone.")
    run = read_run(arguments.adapter) if arguments.adapter is not None else None
    if run is not None and run.condition_encoder is not None:
        files = _from_conditions(arguments, run, run.condition_encoder)
    else:
        files = _from_prompts(arguments, run)
    _report_faults(files)


def _from_prompts(arguments: Namespace, run: SavedRun | None) -> list[Path]:
    given = given_flags(arguments, *_CONDITION_FLAGS)
    if given:
        what = f"{run.path} holds no condition_encoder/" if run else "a base alone knows no conditions"
        raise UserError(f"generate: {given[0]} goes with a controllable run; {what}.")
    prompts = prompts_of(arguments)
    if prompts is None:
        raise UserError("generate: give --prompt TEXT, or --prompts FILE.")
    sampling, output = sampling_of(Sampling, arguments), Path(arguments.output)

    def drawn(with_adapter: bool, folder: Path) -> list[Path]:
        pipeline, record = load(arguments, run, with_adapter=with_adapter)
        return generate(
            pipeline,
            prompts,
            folder,
            images_per_prompt=arguments.num_images,
            seed=arguments.seed,
            sampling=sampling,
            resolution=arguments.resolution,
            batch_size=arguments.batch_size,
            record=record,
        )

    after = drawn(True, output)
    print(_summary(after, output))
    if arguments.compare and run is not None:
        before = drawn(False, output / "before")
        rows = [("before: the base alone", before), ("after: with the adapter", after)]
        page = sheet([*_photo_row(run), *((title, _open(files)) for title, files in rows)])
        print(f"Contact sheet: {save_png(page, output / 'contact_sheet.png')}")
    return after


def _from_conditions(arguments: Namespace, run: SavedRun, encoder: Path) -> list[Path]:
    sources_of = _planned(arguments, run, read_condition_kind(encoder))
    sampling, output = sampling_of(ControllableSampling, arguments), Path(arguments.output)
    pipeline, record = load(arguments, run)
    record["condition_encoder"] = condition_encoder_digest(encoder)
    sources = sources_of(pipeline)

    def drawn(pipeline: Any, sampling: ControllableSampling, folder: Path, record: dict[str, Any]) -> list[Path]:
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

    after = drawn(pipeline, sampling, output, record)
    columns = [("drawn", after)]
    save_png(conditioned_sheet(sources, columns), output / "grid.png")
    print(_summary(after, output))
    if arguments.compare:
        del pipeline  # before another takes as much memory
        # Without adapter and features a controllable pipeline is the base, and starts from the same noise.
        pipeline, record = load(arguments, run, with_adapter=False)
        before = drawn(pipeline, sampling.model_copy(update={"condition_scale": 0.0}), output / "before", record)
        page = conditioned_sheet(sources, [("the base alone", before), *columns])
        print(f"Contact sheet: {save_png(page, output / 'contact_sheet.png')}")
    return after


def _planned(
    arguments: Namespace, run: SavedRun, kind: ConditionKind | None
) -> Callable[[StableDiffusionPipeline], list[Source]]:
    """What is to be drawn, as far as it can be checked without a base; the base's resolution gives the rest."""
    if (arguments.dataset is None) == (arguments.condition is None):
        raise UserError(
            f"generate: {run.path} follows conditions: give --dataset DIR, or --condition FILE with --prompt TEXT."
        )
    if kind is not None and arguments.preprocessor not in (None, kind.preprocessor):
        print(
            f"Note:    {run.path} was trained on {kind.kind}, not on what --preprocessor {arguments.preprocessor} makes"
        )
    prompts = prompts_of(arguments)
    if arguments.dataset is not None:
        if prompts is not None:
            raise UserError("generate: --dataset brings its captions along; leave out --prompt and --prompts.")
        wrong = given_flags(arguments, "height", "width")
        if wrong:
            raise UserError(f"generate: --dataset is drawn in squares; leave out {wrong[0]}, or take --resolution.")
        pairs = _pairs(arguments, run, kind)
        return lambda pipeline: pair_sources(pairs, arguments.resolution or _resolution(pipeline))
    wrong = given_flags(arguments, *_DATASET_FLAGS)
    if wrong:
        raise UserError(f"generate: {wrong[0]} goes with --dataset.")
    if prompts is None:
        raise UserError("generate: --condition needs --prompt TEXT, or --prompts FILE.")
    if arguments.resolution is not None and given_flags(arguments, "height", "width"):
        raise UserError("generate: give --resolution, or --height and --width.")
    files = find_conditions(arguments.condition)
    return lambda pipeline: _read_files(arguments, files, prompts, kind, pipeline)


def _pairs(arguments: Namespace, run: SavedRun, kind: ConditionKind | None) -> Pairs:
    data, split = run.config.get("data") or {}, arguments.split or "validation"
    captions = Path(arguments.captions) if arguments.captions else _captions_of_run(run, arguments.dataset, split)
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
        raise UserError(f"--dataset {arguments.dataset}: painted with other colours than {run.path} was trained with.")
    what = f"label maps of {len(pairs.palette) - 1} classes" if pairs.palette is not None else pairs.kind
    print(f'Pairs:   {len(pairs):,} in {pairs.folder}, split "{pairs.split}", conditions: {what}')
    return pairs


def _captions_of_run(run: SavedRun, dataset: str, split: str) -> Path | None:
    """What the run itself takes for the captions of this split, where it was trained on this data set."""
    data, validation = run.config.get("data") or {}, run.config.get("validation") or {}
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
    pipeline: StableDiffusionPipeline,
) -> list[Source]:
    sources, counts = [], {}
    for file, condition in read_conditions(files, kind=kind, preprocessor=arguments.preprocessor):
        size = fitting_size(
            condition.image.size,
            resolution=arguments.resolution or _resolution(pipeline),
            multiple=_multiple(pipeline),
            height=arguments.height,
            width=arguments.width,
        )
        told = f"taken for {condition.taken_for}, drawn at {size[0]} x {size[1]}"
        counts[told] = counts.get(told, 0) + 1
        sources += file_sources(file, condition, prompts, size)
    for told, count in counts.items():
        print(f"{arguments.condition}: {f'{count} ' * (len(files) > 1)}{told}")
    return sources


_DATASET_FLAGS = ("split", "captions", "caption_template", "limit")
_CONDITION_FLAGS = (
    "dataset",
    "condition",
    "preprocessor",
    "condition_scale",
    "condition_start",
    "condition_end",
    "height",
    "width",
    *_DATASET_FLAGS,
)


def _resolution(pipeline: Any) -> int:
    return int(pipeline.unet.config["sample_size"]) * pipeline.vae_scale_factor


def _multiple(pipeline: Any) -> int:
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config["block_out_channels"]) - 1)


def _summary(files: list[Path], output: Path) -> str:
    return f"{len(files):,} image{'s' * (len(files) != 1)}, grid.png and images.jsonl in {output}"


def _report_faults(files: list[Path]) -> None:
    faults = [(read_settings(file) or {}).get("fault") for file in files]
    if any(faults):
        counts = f"{faults.count('nan')} NaN and {faults.count('black')} black"
        print(
            f"ether-diffusion: of {len(files)} images {counts}; images.jsonl says which. Try --dtype fp32.",
            file=sys.stderr,
        )


def _photo_row(run: SavedRun) -> list[tuple[str, list[Image.Image]]]:
    """The photos that the adapter was trained on, where its run folder still names them."""
    data = run.config.get("data") or {}
    if not data.get("instance_dir"):
        return []
    try:
        photos = find_photos(data["instance_dir"])
    except UserError:
        return []
    title = f'the photos: {photos.folder}, "{data.get("instance_prompt")}"'
    return [(title, [photo.open() for photo in photos.photos])]


def _open(files: list[Path]) -> list[Image.Image]:
    return [Image.open(file).convert("RGB") for file in files]
