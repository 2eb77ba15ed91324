"""The pairs of a controllable run: those to train on, and those to validate with."""

from __future__ import annotations

from pathlib import Path

from ether_diffusion.data.builtin import SCENES
from ether_diffusion.data.pair_captions import captions_of_split
from ether_diffusion.data.pair_dataset import ControllableDataset
from ether_diffusion.data.pair_files import find_layout
from ether_diffusion.data.pairs import Pairs, find_pairs
from ether_diffusion.errors import UserError

from .controllable_config import ControllableConfig


def training_pairs(config: ControllableConfig) -> Pairs:
    """The pairs to train on. Raises UserError as `find_pairs`."""
    return _find_pairs(config, config.data.split, config.data.captions, config.data.limit)


def validation_pairs(config: ControllableConfig, trained: Pairs) -> tuple[Pairs, str | None]:
    """The pairs to validate with, and a note if they are not those of the default split.

    A fault in them is an error only if the config names their split or captions, and images are to be generated.

    Args:
        trained: The pairs to train on.
    """
    data, validation, split = config.data, config.validation, _validation_split(config)
    if split == trained.split:
        return trained, None
    captions = captions_of_split(split, trained.split, data.captions, validation.captions)
    try:
        return _find_pairs(config, split, captions, validation.images or 1), None
    except UserError as error:
        if not validation.enabled:
            return trained, None
        if validation.split is not None or validation.captions is not None:
            raise
        return trained, f'validation uses pairs of split "{trained.split}": {str(error).splitlines()[0]}'


def make_dataset(config: ControllableConfig, pairs: Pairs, caption_dropout: float = 0.0) -> ControllableDataset:
    """Samples of pairs as the config says."""
    data = config.data
    return ControllableDataset(
        pairs,
        resolution=data.resolution,
        crop=data.crop,
        horizontal_flip=data.horizontal_flip,
        caption_dropout=caption_dropout,
        seed=config.seed,
    )


def _find_pairs(config: ControllableConfig, split: str, captions: Path | None, limit: int | None) -> Pairs:
    data = config.data
    return find_pairs(
        data.dataset_dir,
        split=split,
        condition=data.condition,
        captions=captions,
        caption_template=data.caption_template,
        cache_dir=data.cache_dir,
        limit=limit,
    )


def _validation_split(config: ControllableConfig) -> str:
    """The split that the config names; else `validation` if there is one; else the training split."""
    if config.validation.split:
        return config.validation.split
    folder = config.data.dataset_dir
    splits = tuple(SCENES) if folder.startswith("builtin:") else find_layout(Path(folder).expanduser()).splits
    return "validation" if "validation" in splits else config.data.split
