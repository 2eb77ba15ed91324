"""Bad photos, pairs, masks, captions and prompts."""

from __future__ import annotations

import struct
import zlib

from PIL import Image

from robustness.case import (
    GENERATE,
    GENERATE_MAPS,
    TRAIN,
    TRAIN_MAPS,
    Case,
    Change,
    Make,
    copy,
    directory,
    fifo,
    file,
    link,
    mode,
    photos,
    png,
    split,
    together,
    unix_socket,
)


def bomb() -> bytes:
    """A PNG whose header promises 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a picture",
    "cut": png()[:-40],
    "cut header": png()[:20],
    "zeros": bytes(5000),
    "html": b"<html>404</html>",
    "bomb": bomb(),
    "flipped byte": png()[:50] + bytes([png()[50] ^ 255]) + png()[51:],
    "no pixels": png().replace(struct.pack(">II", 80, 64), struct.pack(">II", 0, 64)),
}
PHOTOS: dict[str, tuple[str, Make | None]] = {
    "missing": ("ph", None),
    "a file": ("ph", file("ph", png())),
    "empty": ("ph", directory("ph")),
    "only text": ("ph", file("ph/a.txt", "a")),
    "only folders": ("ph", directory("ph/inner")),
    "a link to itself": ("ph", link("ph", "ph")),
    "a dangling link": ("ph", link("ph", "nowhere")),
    "a pipe": ("ph", fifo("ph")),
    "a name too long": ("p" * 300, None),
    "no name": ("''", None),
    "an unknown built-in": ("builtin:robott", None),
    "an unknown user's home": ("~nobody_of_this_name/ph", None),
    "a device": ("/dev/zero", None),
}
IN_FOLDER: dict[str, Make] = {
    "a pipe": fifo("ph/pipe.png"),
    "a socket": unix_socket("ph/socket.png"),
    "a dangling link": link("ph/link.png", "nowhere.png"),
    "a link to itself": link("ph/link.png", "link.png"),
    "a device": link("ph/zero.png", "/dev/zero"),
}
PROMPTS: dict[str, tuple[str, Make | None]] = {
    "missing": ("prompts.txt", None),
    "a folder": ("prompts.txt", directory("prompts.txt")),
    "empty": ("prompts.txt", file("prompts.txt")),
    "only comments": ("prompts.txt", file("prompts.txt", "# a\n\n#b\n")),
    "binary": ("prompts.txt", file("prompts.txt", bytes(range(256)))),
    "Latin-1": ("prompts.txt", file("prompts.txt", b"caf\xe9\n")),
    "UTF-16": ("prompts.txt", file("prompts.txt", "a toy\n".encode("utf-16"))),
    "UTF-16 without a mark": ("prompts.txt", file("prompts.txt", "a toy\n".encode("utf-16-le"))),
    "a pipe": ("prompts.txt", fifo("prompts.txt")),
    "a socket": ("prompts.txt", unix_socket("prompts.txt")),
    "a device": ("/dev/zero", None),
    "a terminal's": ("/dev/tty", None),
    "a picture": ("prompts.txt", file("prompts.txt", png())),
    "only a mark": ("prompts.txt", file("prompts.txt", b"\xef\xbb\xbf")),
}
CONDITIONS: dict[str, tuple[str, Make | None]] = {
    "missing": ("map.png", None),
    "a pipe": ("map.png", fifo("map.png")),
    "a socket": ("map.png", unix_socket("map.png")),
    "a device": ("/dev/zero", None),
    "text": ("map.png", file("map.png", "text")),
    "cut": ("map.png", file("map.png", png()[:-40])),
    "bomb": ("map.png", file("map.png", bomb())),
    "an empty folder": ("maps", directory("maps")),
    "a pipe in a folder": ("maps", photos("maps", fifo("maps/pipe.png"))),
    "labels out of range": ("map.png", file("map.png", png(64, 64, 251, "L"))),
    "a name too long": ("m" * 300, None),
    "a dangling link": ("map.png", link("map.png", "nowhere.png")),
}
# Of a data set in ADE20K's layout; the first training image, its map, and its captions.
IMAGES, MAPS = "images/training", "annotations/training"
NAME = "ADE_train_00000001"
PAIRS: dict[str, dict[str, Change]] = {
    "no images": {"images": None},
    "no maps": {"annotations": None},
    "no map of one image": {f"{MAPS}/{NAME}.png": None},
    "a cut image": {f"{IMAGES}/{NAME}.jpg": lambda old: old[: len(old) // 2]},
    "a cut map": {f"{MAPS}/{NAME}.png": lambda old: old[: len(old) // 2]},
    "an empty image": {f"{IMAGES}/{NAME}.jpg": b""},
    "an empty map": {f"{MAPS}/{NAME}.png": b""},
    "text for an image": {f"{IMAGES}/{NAME}.jpg": b"text"},
    "a map of another size": {f"{MAPS}/{NAME}.png": png(32, 32, 3, "L")},
    "a map of labels out of range": {f"{MAPS}/{NAME}.png": png(64, 64, 255, "L")},
    "a map in colours": {f"{MAPS}/{NAME}.png": png(64, 64)},
    "a bomb": {f"{MAPS}/{NAME}.png": bomb()},
}
CAPTIONS: dict[str, Make] = {
    "missing": directory("other"),
    "empty": file("c.jsonl"),
    "not JSON": file("c.jsonl", "a caption\n"),
    "a list": file("c.jsonl", "[1, 2]\n"),
    "no caption": file("c.jsonl", '{"image": "a.png"}\n'),
    "a number for a caption": file("c.jsonl", f'{{"image": "{NAME}.jpg", "caption": 3}}\n'),
    "null for a name": file("c.jsonl", '{"image": null, "caption": "a"}\n'),
    "of other images": file("c.jsonl", '{"image": "nowhere.jpg", "caption": "a"}\n'),
    "cut": file("c.jsonl", f'{{"image": "{NAME}.jpg", "cap'),
    "binary": file("c.jsonl", bytes(range(256))),
    "NUL": file("c.jsonl", bytes(100)),
    "a pipe": fifo("c.jsonl"),
    "a socket": unix_socket("c.jsonl"),
    "nested": file("c.jsonl", "[" * 100_000 + "\n"),
}
MASKS: dict[str, Make | None] = {
    "missing": None,
    "empty": directory("masks"),
    "a file": file("masks", png()),
    "text": file("masks/good.png", "text"),
    "another size": file("masks/good.png", png(10, 10, 255, "L")),
    "all black": file("masks/good.png", png(80, 64, 0, "L")),
    "a pipe": fifo("masks/good.png"),
}
FACES = (*TRAIN, "data.instance_dir=ph", "data.class_name=dog")


def tiff_bomb() -> bytes:
    """A TIFF whose directory points at itself."""
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", 0) + struct.pack("<I", 8)


CASES = [
    *(
        Case("photos that are no folder with photos", (*TRAIN, f"data.instance_dir={path}"), "", make, name=name)
        for name, (path, make) in PHOTOS.items()
    ),
    *(
        Case("a damaged photo", FACES, "bad.png", photos("ph", file("ph/bad.png", content)), name=name)
        for name, content in DAMAGED.items()
    ),
    Case("a damaged photo", FACES, "bad.tif", photos("ph", file("ph/bad.tif", tiff_bomb())), name="a TIFF in a circle"),
    *(Case("no file among the photos", FACES, "ph", photos("ph", make), name=name) for name, make in IN_FOLDER.items()),
    Case(
        "no file among the photos",
        FACES,
        "",
        photos("ph", mode("ph/good.png", 0)),
        limits={"PRIVILEGES": 0},
        name="without permission",
    ),
    Case(
        "no file among the photos",
        FACES,
        "",
        together(photos("ph"), mode("ph", 0)),
        limits={"PRIVILEGES": 0},
        name="a folder without permission",
    ),
    *(
        Case(
            "names that are not UTF-8",
            (*TRAIN, *more),
            "",
            photos("ph", file("ph/caf\udce9.png", png())),
            codes,
            name=name,
        )
        for name, more, codes in (
            ("photos", ("data.instance_dir=ph", "data.crop=random", "data.cache=false"), (0, 2)),
            ("cached photos", ("data.instance_dir=ph", "data.crop=center", "data.cache=true"), (0, 2)),
            ("photos with captions", ("data.instance_dir=ph", "data.captions=true"), (0, 2)),
            ("a folder", ("data.instance_dir=ph\udce9",), (2,)),
            ("an output folder", ("output_dir=out\udce9", "data.instance_dir=nowhere"), (2,)),
            ("a class", ("data.class_name=caf\udce9",), (0, 2)),
        )
    ),
    *(
        Case("captions next to photos", (*FACES, "data.captions=true"), "good.txt", photos("ph", make), name=name)
        for name, make in (
            ("binary", file("ph/good.txt", bytes(range(128, 256)))),
            ("a pipe", fifo("ph/good.txt")),
            ("a folder", directory("ph/good.txt")),
            ("a socket", unix_socket("ph/good.txt")),
            ("a device", link("ph/good.txt", "/dev/zero")),
        )
    ),
    *(
        Case(
            "bad masks",
            (*FACES, "data.masks=masks"),
            "mask",
            together(photos("ph"), *([make] if make else [])),
            name=name,
        )
        for name, make in MASKS.items()
    ),
    *(
        Case("bad class images", (*TRAIN, "data.prior={class_dir: cls}"), "cls", make, name=name)
        for name, make in (
            ("missing", None),
            ("empty", directory("cls")),
            ("damaged", file("cls/a.png", "text")),
            ("a pipe", fifo("cls/a.png")),
            ("a file", file("cls", png())),
        )
    ),
    *(
        Case("a bad file of prompts", (*GENERATE, "--prompts", path), path, make, name=name)
        for name, (path, make) in PROMPTS.items()
    ),
    *(
        Case("a bad condition", (*GENERATE_MAPS, "--prompt", "a", "--condition", path), "", make, name=name)
        for name, (path, make) in CONDITIONS.items()
    ),
    *(
        Case(
            "a damaged set of pairs",
            (*TRAIN_MAPS, "data.dataset_dir=set"),
            "",
            copy("SCENES", "set", damage),
            name=name,
        )
        for name, damage in PAIRS.items()
    ),
    *(
        Case("a damaged set of pairs, checked", split("data check set"), "", copy("SCENES", "set", damage), name=name)
        for name, damage in PAIRS.items()
        if name != "no images"  # then they are conditions to generate from
    ),
    *(
        Case(
            "captions that cannot be used",
            (*TRAIN_MAPS, "data.dataset_dir=$SCENES", "data.captions=c.jsonl"),
            "",
            make,
            name=name,
        )
        for name, make in CAPTIONS.items()
    ),
    *(
        Case("a set of pairs that is none", (*command, path), "", make, name=f"{command[1]} of {name}")
        for command in (split("data check"), split("data caption"))
        for name, path, make in (
            ("nothing", "nowhere", None),
            ("a file", "set", file("set", "a")),
            ("an empty folder", "set", directory("set")),
            ("a pipe among images", "set", together(photos("set/images"), fifo("set/images/pipe.png"))),
            ("a pipe", "set", fifo("set")),
            ("a name too long", "s" * 300, None),
        )
    ),
    *(
        Case("a bad option of data", split(command), "", name=command)
        for command in (
            "data check $SCENES --split nowhere",
            "data check $SCENES --condition cany",
            "data check $SCENES --captions nowhere",
            "data check $SCENES --sheet /proc/nowhere/sheet.png",
            "data caption $SCENES --model nowhere",
            "data caption $SCENES --split nowhere",
            "data caption $SCENES --device gpu",
            "data caption $SCENES --batch-size 0",
            "data ade20k --to /dev/null",
            "data dreambooth --to /proc/nowhere",
            "data nothing",
            "data",
        )
    ),
]
assert Image.MAX_IMAGE_PIXELS is not None  # the bombs need it
