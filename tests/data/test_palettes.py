"""Palettes: ADE20K's as its benchmark publishes it, and those in a data set's folder."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ether_diffusion.data.palettes import ADE20K, read_classes
from ether_diffusion.errors import UserError
from ether_diffusion.tinyworld.render import LABELS, PALETTE


def test_ade20ks_colours_are_those_that_its_benchmark_publishes(shared: Path):
    with (shared / "data/ade20k_sample/color150.csv").open(newline="") as file:
        published = [[int(row[key]) for key in ("red", "green", "blue")] for row in csv.DictReader(file)]
    assert ADE20K[0].tolist() == [0, 0, 0]
    assert ADE20K[1:].tolist() == published


@pytest.mark.slow  # importing controlnet_aux takes ten seconds
def test_ade20ks_colours_are_controlnet_auxs():
    from controlnet_aux.util import ade_palette

    assert ADE20K[1:].tolist() == ade_palette()


def test_a_data_sets_own_colours_and_names(scenes: Path):
    classes = read_classes(scenes)
    assert np.array_equal(classes.palette, PALETTE)
    assert classes.palette.dtype == np.uint8
    assert classes.names == LABELS[1:]
    assert len(classes) == 23


def test_without_colours_ade20ks_with_names_from_the_table(tmp_path: Path):
    assert np.array_equal(read_classes(tmp_path).palette, ADE20K)
    assert read_classes(tmp_path).names == ()
    rows = "".join(f"{k}\t0.1\t1\t1\tthing {k}, other\n" for k in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + rows)
    assert read_classes(tmp_path).names[149] == "thing 150, other"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("color2.csv", "class,red,green\n1,2,3\n", "not a table of class,red,green,blue,name"),
        ("color2.csv", "class,red,green,blue,name\n1,2,3,x,a\n", "not a table of class,red,green,blue,name"),
        ("color2.csv", "class,red,green,blue,name\n1,2,3,4,a\n3,2,3,4,b\n", "expected the classes 1 to N"),
        ("color2.csv", "class,red,green,blue,name\n", "expected the classes 1 to N"),
        ("color2.csv", "class,red,green,blue,name\n1,2,3,256,a\n", "a colour outside 0 to 255"),
        (
            "objectInfo3.txt",
            "Idx\tName\n1\ta\n2\tb\n",
            r"2 classes, but ADE20K's palette has 150 colours; expected color2",
        ),
        ("objectInfo3.txt", "Idx,Name\n1,a\n", "not a tab-separated table with a column Name"),
    ],
)
def test_faulty_tables(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        read_classes(tmp_path)


def test_two_palettes_are_one_too_many(scenes: Path, tmp_path: Path):
    for name in ("color23.csv", "color24.csv"):
        (tmp_path / name).write_bytes((scenes / "color23.csv").read_bytes())
    with pytest.raises(UserError, match=r"color23\.csv and color24\.csv; expected one file color\*\.csv"):
        read_classes(tmp_path)


def test_painting_the_miniatures_maps_gives_a_different_colour_for_each_label(scenes: Path):
    palette = read_classes(scenes).palette
    assert len(np.unique(palette, axis=0)) == len(palette)
    labels = np.asarray(Image.open(next((scenes / "annotations/training").iterdir())))
    painted = palette[labels]
    back = (painted[:, :, None] == palette).all(-1).argmax(-1)
    assert np.array_equal(back, labels)
