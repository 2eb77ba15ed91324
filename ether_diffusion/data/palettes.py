"""Palettes of label maps: one colour per class, row 0 black for unlabelled pixels. ADE20K's is written out here."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ether_diffusion.errors import UserError
from ether_diffusion.input_files import read_text


@dataclass(frozen=True)
class Classes:
    """The classes of a data set: `palette` (N + 1, 3) uint8, label 0 for unlabelled, and N `names`, or none."""

    palette: np.ndarray
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.palette) - 1


def read_classes(folder: Path) -> Classes:
    """Colours from `colorN.csv` in a data set's folder, else ADE20K's 150; names from there or from `objectInfoN.txt`.

    Raises:
        UserError: A file that cannot be read, several of one kind, or names and colours that differ in number.
    """
    colours, table = _the_file(folder, "color*.csv"), _the_file(folder, "objectInfo*.txt")
    classes = _coloured(colours) if colours is not None else Classes(ADE20K)
    if classes.names or table is None:
        return classes
    names = _names(table)
    if len(names) != len(classes):
        source = colours.name if colours else "ADE20K's palette"
        wanted = f"color{len(names)}.csv"
        raise UserError(f"{table}: {len(names)} classes, but {source} has {len(classes)} colours; expected {wanted}")
    return Classes(classes.palette, names)


def _the_file(folder: Path, pattern: str) -> Path | None:
    files = sorted(folder.glob(pattern))
    if len(files) > 1:
        raise UserError(f"{folder}: {' and '.join(file.name for file in files)}; expected one file {pattern}")
    return files[0] if files else None


def _coloured(file: Path) -> Classes:
    """Rows of class, red, green, blue, name, in the order of the classes, 1 to N."""
    rows = list(csv.DictReader(read_text(file).splitlines()))
    try:
        colours = [[int(row[key]) for key in ("red", "green", "blue")] for row in rows]
        palette = np.array([[0, 0, 0], *colours])
        numbers = [int(row["class"]) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not a table of class,red,green,blue,name with whole numbers") from None
    if numbers != list(range(1, len(rows) + 1)) or not rows:
        raise UserError(f"{file}: expected the classes 1 to N in this order, one row each")
    if palette.min() < 0 or palette.max() > 255:
        raise UserError(f"{file}: a colour outside 0 to 255")
    names = tuple((row.get("name") or "").strip() for row in rows)
    return Classes(palette.astype(np.uint8), names if all(names) else ())


def _names(file: Path) -> tuple[str, ...]:
    text = read_text(file)
    try:
        header, *rows = text.splitlines()
        column = header.split("\t").index("Name")
        return tuple(row.split("\t")[column].strip() for row in rows if row.strip())
    except (ValueError, IndexError):
        raise UserError(f"{file}: not a tab-separated table with a column Name") from None


# The colours of ADE20K's scene parsing benchmark (CSAIL), classes 1 to 150. Classes 7 and 45 share one.
_ADE20K = """
    787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07 96053d 787846 08ff33
    ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff
    08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff
    eb0cff a09614 00a3ff 8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
    0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00 0052ff 00ff29 00ffad
    0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014 ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2
    00ff52 000aff 0070ff 3300ff 00c2ff 007aff 00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa
    8500ff 00ff5c b800ff ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
    ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff ffff00 0099ff 0029ff
    00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
"""

ADE20K: np.ndarray = np.array(
    [(0, 0, 0), *(tuple(bytes.fromhex(colour)) for colour in _ADE20K.split())], dtype=np.uint8
)
