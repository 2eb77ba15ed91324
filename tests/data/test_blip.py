"""Captions by BLIP: a small model with random weights, in the real models' layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

import ether_diffusion_cli
from ether_diffusion.data.blip import Captioner, images_of, write_captions
from ether_diffusion.data.check import check_folder
from ether_diffusion.data.pairs import find_pairs
from ether_diffusion.data.photos import open_photo
from ether_diffusion.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
WORDS = ["a", "photo", "of", "the", "house", "tree", "sky", "ball", "cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    special = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**sizes, **special, "vocab_size": len(SPECIAL + WORDS), "encoder_hidden_size": 32},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(1)
    blip = BlipForConditionalGeneration(config)
    with torch.no_grad():  # small random weights give one caption for all images
        for name, weight in blip.named_parameters():
            if weight.ndim > 1:
                weight.mul_(40 if "crossattention" in name or "patch_embedding" in name else 8)
    blip.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(model: Path) -> Captioner:
    return Captioner(str(model))


def rows_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_captions_are_the_models_whatever_the_batches(captioner: Captioner, scenes: Path):
    images = [open_photo(path) for path in sorted((scenes / "images/training").iterdir())]
    alone = [captioner([image])[0] for image in images]
    assert len(set(alone)) > 1
    assert captioner(images) == alone
    assert set(" ".join(alone).split()) <= set(WORDS)


def test_captions_begin_with_given_words(model: Path, scenes: Path):
    image = open_photo(next((scenes / "images/training").iterdir()))
    assert Captioner(str(model), start="a photo of")([image])[0].startswith("a photo of ")


def test_training_reads_what_is_written(captioner: Captioner, ade20k: Path):
    (ade20k / "captions/training.jsonl").unlink()
    folder, files = images_of(ade20k, "training")
    done = write_captions(captioner, folder, files, ade20k / "captions/training.jsonl", batch_size=4, shown=False)
    assert (done.total, done.written, done.wordless) == (6, 6, ())
    pairs = find_pairs(ade20k)
    assert [pair.caption for pair in pairs.pairs] == captioner([open_photo(p.image) for p in pairs.pairs if p.image])
    rows = rows_of(done.file)
    assert rows[0]["source"] == "annotations/training/ADE_train_00000001.png"
    assert rows[0]["model"] == captioner.name
    assert [row["target"] for row in rows] == sorted(row["target"] for row in rows)
    assert check_folder(ade20k).faults == 0
    assert not list((ade20k / "captions").glob(".*"))
    again = write_captions(captioner, folder, files, done.file, shown=False)
    assert (again.total, again.written) == (6, 0)


def test_an_interrupted_call_resumes(captioner: Captioner, model: Path, ade20k: Path, tmp_path: Path):
    folder, files = images_of(ade20k, "training")
    whole = write_captions(captioner, folder, files, tmp_path / "whole.jsonl", shown=False).file.read_text()

    class Stops(Captioner):
        def __call__(self, images):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(images)

    output, partial = tmp_path / "cut.jsonl", tmp_path / ".cut.jsonl.partial"
    with pytest.raises(KeyboardInterrupt):
        write_captions(Stops(str(model)), folder, files, output, batch_size=2, shown=False)
    assert not output.exists()
    assert len(rows_of(partial)) == 4
    partial.write_text(partial.read_text()[:-9])  # as if the power had failed within a line
    done = write_captions(captioner, folder, files, output, shown=False)
    assert (done.total, done.written) == (6, 3)
    assert output.read_text() == whole
    assert sorted(path.name for path in tmp_path.glob("*cut*")) == ["cut.jsonl"]


def test_captions_of_another_model_are_not_mixed_in(captioner: Captioner, ade20k: Path, tmp_path: Path):
    folder, files = images_of(ade20k, "validation")
    row = {"target": "images/validation/ADE_val_00000001.jpg", "prompt": "x", "model": "another"}
    (tmp_path / ".out.jsonl.partial").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"begun with another, not .*; delete it, or name that --model"):
        write_captions(captioner, folder, files, tmp_path / "out.jsonl", shown=False)


@pytest.mark.parametrize("line", ["{", "[1]", "3", "[" * 100_000])
def test_a_damaged_line_is_named_and_kept(captioner: Captioner, ade20k: Path, tmp_path: Path, line: str):
    folder, files = images_of(ade20k, "validation")
    unfinished = tmp_path / ".out.jsonl.partial"
    unfinished.write_text('{"target": "a"}\n' + line + "\n")
    before = unfinished.read_bytes()
    with pytest.raises(UserError, match=r"\.out\.jsonl\.partial:2: not a row of captions"):
        write_captions(captioner, folder, files, tmp_path / "out.jsonl", shown=False)
    assert unfinished.read_bytes() == before


def test_a_finished_file_that_misses_images_is_left_alone(captioner: Captioner, ade20k: Path):
    file = ade20k / "captions/training.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    folder, files = images_of(ade20k, "training")
    with pytest.raises(UserError, match=r"exists, and 2 of 6 images are not in it: first ADE_train_00000005"):
        write_captions(captioner, folder, files, file, shown=False)
    assert file.read_text() == "".join(lines[:4])


def test_models_that_are_not_blip(model: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not a BLIP captioning model that can be loaded") as caught:
        Captioner(str(tmp_path))
    assert "\n" not in str(caught.value)
    from safetensors.torch import load_file, save_file

    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "crossattention" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"not a BLIP captioning model: .* weights are missing, first .*crossattention"):
        Captioner(str(tmp_path))


def test_the_command(model: Path, ade20k: Path, capsys: pytest.CaptureFixture[str]):
    (ade20k / "captions/validation.jsonl").unlink()
    caption = ["data", "caption", str(ade20k), "--model", str(model), "--device", "cpu"]
    assert ether_diffusion_cli.main([*caption, "--split", "validation"]) == 0
    file = ade20k / "captions/validation.jsonl"
    assert f"4 captions in {file}, 4 of them written by this call" in capsys.readouterr().out
    assert len(rows_of(file)) == 4
    assert ether_diffusion_cli.main([*caption, "--split", "test"]) == 2
    assert "no split 'test'; it has training, validation" in capsys.readouterr().err


def test_captions_that_images_have_are_kept(model: Path, ade20k: Path, capsys: pytest.CaptureFixture[str]):
    (ade20k / "captions/training.jsonl").unlink()
    images = sorted((ade20k / "images/training").iterdir())
    for image in images[:2]:
        image.with_suffix(".txt").write_text(f"my words for {image.stem}")
    command = ["data", "caption", str(ade20k), "--model", str(model), "--device", "cpu"]
    assert ether_diffusion_cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "6 captions" in printed
    assert "4 of them written by this call" in printed
    assert "Captions copied from the data set: 2" in printed
    captions = {pair.name: pair.caption for pair in find_pairs(ade20k).pairs}
    assert [captions[image.stem] for image in images[:2]] == [f"my words for {image.stem}" for image in images[:2]]
    assert not any("my words" in captions[image.stem] for image in images[2:])


def test_images_without_a_caption_are_not_tried_again(captioner: Captioner, model: Path, ade20k: Path, tmp_path: Path):
    class Silent(Captioner):
        def __call__(self, images):
            return ["", *super().__call__(images)[1:]]

    folder, files = images_of(ade20k, "training")
    done = write_captions(Silent(str(model)), folder, files, tmp_path / "out.jsonl", batch_size=6, shown=False)
    assert (done.total, len(done.wordless)) == (5, 1)
    again = write_captions(captioner, folder, files, done.file, shown=False)
    assert (again.total, again.written) == (5, 0)
