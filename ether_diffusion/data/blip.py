"""Captions by a BLIP model: a line of JSON an image, resumed where it stopped, complete or not there at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

from ether_diffusion.data.builtin import builtin_scenes
from ether_diffusion.data.pair_files import Files, find_layout
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError
from ether_diffusion.files import write_whole
from ether_diffusion.progress import progress_bar

BLIP = "Salesforce/blip-image-captioning-large"

SEARCH = {"num_beams": 3, "do_sample": False, "max_new_tokens": 40, "min_length": 5}
"""Beam search without chance: one image, one caption."""


class Captioned(NamedTuple):
    """The file of captions, how many it holds, how many were written by this call, and images that got no words."""

    file: Path
    total: int
    written: int
    wordless: tuple[str, ...]


class Captioner:
    """A BLIP model with its processor, from the hub or a folder.

    Args:
        start: Words that each caption begins with: "a photo of".

    Raises:
        UserError: What was named is no BLIP captioning model, or cannot be loaded.
    """

    def __init__(
        self,
        model: str = BLIP,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        start: str = "",
    ):
        self.name, self.start = model, start
        where = str(Path(model).expanduser())
        try:
            BlipConfig.from_pretrained(where)  # one file, so that an absent model or network is told soon
            self._processor: Any = BlipProcessor.from_pretrained(where)
            loaded: Any = BlipForConditionalGeneration.from_pretrained(
                where, dtype=dtype or torch.float32, output_loading_info=True
            )
            network, report = loaded
        except Exception as error:  # absent files, no network, another architecture: each has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--model {model}: no BLIP captioning model that can be loaded: {reason:.200}") from None
        # transformers fills what a file lacks with random weights, and would caption with them.
        if report["missing_keys"] or report["mismatched_keys"]:
            lacking = [*report["missing_keys"], *report["mismatched_keys"]]
            raise UserError(
                f"--model {model}: no BLIP captioning model: {len(lacking)} weights lack, {lacking[0]} first"
            )
        self._model: Any = network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """A caption an image; "" where the model has nothing to say."""
        words = {"text": [self.start] * len(images)} if self.start else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **words)
        tokens = self._model.generate(**inputs.to(self._model.device, self._model.dtype), **SEARCH)
        return [" ".join(text.split()) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def images_of(folder: str | Path, split: str, cache_dir: Path | None = None) -> tuple[Path, list[Files]]:
    """The data set's folder and its images, with conditions where there are any.

    Raises:
        UserError: No such folder or split, or no images in it.
    """
    path = builtin_scenes(str(folder), cache_dir) if str(folder).startswith("builtin:") else Path(folder).expanduser()
    layout = find_layout(path)
    images, conditions = layout.of_split(split)
    if not images:
        raise UserError(f"{layout.folder}: no images in split {split!r}")
    return layout.folder, [Files(name, path, conditions.get(name)) for name, path in images.items()]


def write_captions(
    captioner: Captioner,
    folder: Path,
    files: Sequence[Files],
    output: Path,
    *,
    kept: Mapping[str, str] = {},
    batch_size: int = 8,
    shown: bool = True,
) -> Captioned:
    """Captions images into `output`: `source`, `target`, `prompt` and `model` a line, paths from the data set's folder.

    What is done waits in a partial file beside it, of which a later call with the same model goes on; the output takes
    its place when no image is left. Images that got no words are not in it; a file beside it names them.

    Args:
        kept: Captions that images have already, by name: they are copied, without `model`.

    Raises:
        UserError: The output exists and misses images, or was made otherwise; an image cannot be read.
    """
    by = f"{captioner.name} {captioner.start}".strip()
    wanted = [file for file in files if file.image]
    if output.exists():
        return Captioned(output, _check_finished(output, wanted, folder), 0, ())
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    done = _resumed(partial, by, captioner.name)
    left = [file for file in wanted if file.name not in kept and _relative(file.image, folder) not in done]
    wordless = []
    with (
        partial.open("a", encoding="utf-8") as stream,
        progress_bar(len(wanted), "captions", "image", initial=len(wanted) - len(left), shown=shown) as bar,
    ):
        for batch in _batches(left, batch_size):
            for file, text in zip(batch, captioner([open_photo(f.image) for f in batch if f.image]), strict=True):
                if not text:
                    wordless.append(file.name)
                    continue
                stream.write(_line(file, folder, text, {"model": by}))
            stream.flush()
            bar.update(len(batch))
        stream.writelines(_line(file, folder, kept[file.name], {}) for file in wanted if file.name in kept)
    if len(wordless) == len(wanted):
        partial.unlink()
        raise UserError(f"--model {captioner.name}: not a word for any of {len(wanted):,} images")
    _sort(partial, [_relative(file.image, folder) for file in wanted])
    if wordless:
        write_whole(_wordless(output), "".join(f"{name}\n" for name in wordless))
    partial.replace(output)
    return Captioned(output, len(wanted) - len(wordless), len(left) - len(wordless), tuple(wordless))


def _batches(files: Sequence[Files], size: int) -> Iterator[list[Files]]:
    remaining = iter(files)
    while batch := list(islice(remaining, size)):
        yield batch


def _relative(path: Path | None, folder: Path) -> str:
    assert path is not None
    return path.relative_to(folder).as_posix()


def _line(file: Files, folder: Path, text: str, by: dict[str, str]) -> str:
    source = {"source": _relative(file.condition, folder)} if file.condition else {}
    row = {**source, "target": _relative(file.image, folder), "prompt": text, **by}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _wordless(output: Path) -> Path:
    """The names of images that a model had no words for: a later call need not ask again."""
    return output.with_name(f".{output.name}.wordless")


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last one that was cut off."""
    *lines, _ = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _resumed(partial: Path, by: str, model: str) -> set[str]:
    """The images that a partial file has; a line that was cut off is cut away, so that others can follow."""
    if not partial.exists():
        return set()
    rows = [row for row in _lines(partial) if "model" in row]  # without captions that images had already
    others = {row["model"] for row in rows} - {by}
    if others:
        raise UserError(f"{partial}: begun with {', '.join(sorted(others))}, not {by}; delete it, or name that --model")
    _write(partial, rows)
    return {row["target"] for row in rows}


def _check_finished(output: Path, wanted: Sequence[Files], folder: Path) -> int:
    try:
        named = {row.get("target") for row in _lines(output)}
    except (OSError, ValueError, AttributeError):
        named = set()
    wordless = set(_wordless(output).read_text(encoding="utf-8").splitlines()) if _wordless(output).exists() else set()
    left = [file for file in wanted if file.name not in wordless]
    missing = [file.name for file in left if _relative(file.image, folder) not in named]
    if missing:
        count = f"{len(missing):,} of {len(wanted):,} images are not in it"
        raise UserError(f"{output}: exists, and {count}: {missing[0]} first; delete it, or name another --output")
    return len(left)


def _sort(file: Path, order: Sequence[str]) -> None:
    place = {name: k for k, name in enumerate(order)}
    _write(file, sorted(_lines(file), key=lambda row: place.get(row["target"], len(place))))


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    own = file.with_name(f"{file.name}.whole")
    own.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    own.replace(file)
