"""Captions by a BLIP model: one line of JSON per image, in a file that appears once it is complete."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import BlipConfig, BlipForConditionalGeneration, BlipProcessor

from ether_diffusion.data.pair_files import Pair, find_layout
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError, first_line
from ether_diffusion.files import make_folder, unfinished_of, write_whole
from ether_diffusion.input_files import read_text
from ether_diffusion.progress import progress_bar

BLIP = "Salesforce/blip-image-captioning-large"

SEARCH = {"num_beams": 3, "do_sample": False, "max_new_tokens": 40, "min_length": 5}
"""Beam search without sampling: one image always has one caption."""


class Captioned(NamedTuple):
    """The file of captions, how many it holds, how many this call wrote, and the images that got no caption."""

    file: Path
    total: int
    written: int
    wordless: tuple[str, ...]


class Captioner:
    """A BLIP model with its processor, from the hub or a folder.

    Args:
        start: The first words of each caption: "a photo of".

    Raises:
        UserError: The model is no BLIP captioning model, or cannot be loaded.
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
            BlipConfig.from_pretrained(where)  # one file, so that a missing model or network shows at once
            self._processor: Any = BlipProcessor.from_pretrained(where)
            loaded: Any = BlipForConditionalGeneration.from_pretrained(
                where, dtype=dtype or torch.float32, output_loading_info=True
            )
            network, report = loaded
        except Exception as error:  # missing files, no network, another architecture: each has errors of its own
            raise UserError(
                f"--model {model}: not a BLIP captioning model that can be loaded: {first_line(error):.200}"
            ) from None
        # transformers fills what a file lacks with random weights, and would caption with them.
        if report["missing_keys"] or report["mismatched_keys"]:
            missing = [*report["missing_keys"], *report["mismatched_keys"]]
            count = f"{len(missing)} weights are missing, first {missing[0]}"
            raise UserError(f"--model {model}: not a BLIP captioning model: {count}")
        self._model: Any = network.to(device).eval()

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per image; "" where the model returns no text."""
        words = {"text": [self.start] * len(images)} if self.start else {}
        inputs = self._processor(images=list(images), return_tensors="pt", **words)
        tokens = self._model.generate(**inputs.to(self._model.device, self._model.dtype), **SEARCH)
        return [" ".join(text.split()) for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


def images_of(folder: str | Path, split: str, cache_dir: Path | None = None) -> tuple[Path, list[Pair]]:
    """The data set's folder and the images of a split, with conditions where there are any.

    Raises:
        UserError: No such folder or split, or no images in it.
    """
    layout = find_layout(folder, cache_dir)
    images, conditions = layout.of_split(split)
    if not images:
        raise UserError(f"{layout.folder}: no images in split {split!r}")
    return layout.folder, [Pair(name, path, conditions.get(name)) for name, path in images.items()]


def write_captions(
    captioner: Captioner,
    folder: Path,
    files: Sequence[Pair],
    output: Path,
    *,
    kept: Mapping[str, str] = {},
    batch_size: int = 8,
    shown: bool = True,
) -> Captioned:
    """Caption images into `output`: `source`, `target`, `prompt` and `model` a line, paths from the data set's folder.

    A hidden file next to it collects the captions, and a later call with the same model resumes it; the output appears
    when no image is left. Another hidden file names the images that got no caption. Captions that images have already
    (`kept`, by name) are copied, without `model`.

    Raises:
        UserError: The output exists and misses images, or was begun otherwise; an image cannot be read.
    """
    by = f"{captioner.name} {captioner.start}".strip()
    wanted = {file.image.relative_to(folder).as_posix(): file for file in files if file.image}
    if output.exists():
        return Captioned(output, _check_finished(output, wanted), 0, ())
    make_folder(output.parent)
    unfinished = unfinished_of(output)
    rows = _resumed(unfinished, by)
    left = [target for target, file in wanted.items() if file.name not in kept and target not in rows]
    wordless = []
    with (
        unfinished.open("a", encoding="utf-8") as stream,
        progress_bar(len(wanted), "captions", "image", initial=len(wanted) - len(left), shown=shown) as bar,
    ):
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            texts = captioner([open_photo(folder / target) for target in batch])
            for target, text in zip(batch, texts, strict=True):
                if text:
                    rows[target] = _row(wanted[target], folder, text) | {"model": by}
                    stream.write(_lines([rows[target]]))
                else:
                    wordless.append(wanted[target].name)
            stream.flush()
            bar.update(len(batch))
    if len(wordless) == len(wanted):
        unfinished.unlink()
        raise UserError(f"--model {captioner.name}: no caption for any of {len(wanted):,} images")
    if wordless:
        write_whole(_wordless(output), "".join(f"{name}\n" for name in wordless))
    rows |= {target: _row(file, folder, kept[file.name]) for target, file in wanted.items() if file.name in kept}
    ordered = [rows.pop(target) for target in wanted if target in rows]
    write_whole(output, _lines([*ordered, *rows.values()]))
    unfinished.unlink()
    return Captioned(output, len(wanted) - len(wordless), len(left) - len(wordless), tuple(wordless))


def _row(file: Pair, folder: Path, text: str) -> dict[str, str]:
    paths = {"source": file.condition, "target": file.image}
    return {key: path.relative_to(folder).as_posix() for key, path in paths.items() if path} | {"prompt": text}


def _lines(rows: Iterable[dict[str, str]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _wordless(output: Path) -> Path:
    """The names of images for which a model returned no text, so that a later call does not repeat them."""
    return output.with_name(f".{output.name}.wordless")


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last one that was cut off. Raises UserError for any other line."""
    *lines, _ = read_text(file).split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)} if line else {})
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{file}:{number}: not a row of captions; delete the file, or mend that line") from None
    return [row for row in rows if "target" in row]


def _resumed(unfinished: Path, by: str) -> dict[str, dict[str, Any]]:
    """The rows of an unfinished file by image; it loses a line that was cut off, so that others can follow."""
    if not unfinished.exists():
        return {}
    rows = [row for row in _rows(unfinished) if "model" in row]  # without captions that images had already
    others = {row["model"] for row in rows} - {by}
    if others:
        given = ", ".join(sorted(others))
        raise UserError(f"{unfinished}: begun with {given}, not {by}; delete it, or name that --model")
    write_whole(unfinished, _lines(rows))
    return {row["target"]: row for row in rows}


def _check_finished(output: Path, wanted: Mapping[str, Pair]) -> int:
    try:
        named = {row["target"] for row in _rows(output)}
    except UserError:
        named = set()
    wordless = set(read_text(_wordless(output)).splitlines()) if _wordless(output).exists() else set()
    left = {target: file.name for target, file in wanted.items() if file.name not in wordless}
    missing = [name for target, name in left.items() if target not in named]
    if missing:
        count = f"{len(missing):,} of {len(wanted):,} images are not in it"
        raise UserError(f"{output}: exists, and {count}: first {missing[0]}; delete it, or name another --output")
    return len(left)
