"""A bad input as one entry of a table: how to make it, the command that gets it, and what must come of it."""

from __future__ import annotations

import io
import os
import shutil
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

World = Mapping[str, Path]
"""What cases share and may not change: `RUN`, `MAPS`, `SCENES`, `RESULTS`; `$RUN` stands for its path in a command."""
Make = Callable[[Path, World], object]
"""Makes the input in the case's own folder, which is also the command's working directory."""
Change = bytes | str | Callable[[bytes], bytes] | None
"""What a file becomes: this content, a function of its content, or None: it goes."""


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        kind: What is wrong, in a few words; cases of one kind share a cause.
        words: The command.
        says: What its line on stderr must name, as a rule the value or the path that was given.
        make: Makes the input.
        codes: The exit codes that are right.
        faults: How many faults it has, each of which takes a line; 0: any number.
        writes: It may have written whole files of its own before it fails.
        environment: Variables to set, or, with None, to leave out.
        limits: Resource limits, as `fork_server.run` takes them.
        name: Tells the case from others of its kind; default: its number.
    """

    kind: str
    words: tuple[str, ...]
    says: str = ""
    make: Make | None = None
    codes: tuple[int, ...] = (2,)
    faults: int = 1
    writes: bool = False
    environment: Mapping[str, str | None] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    name: str = ""


def cases(kind: str, command: Sequence[str], values: Sequence[str], says: str | None = None) -> list[Case]:
    """A command with one more word, which is also what the line names unless `says` is given."""
    return [Case(kind, (*command, value), value if says is None else says, name=value) for value in values]


def split(text: str) -> tuple[str, ...]:
    """The words of a command without quotes."""
    return tuple(text.split())


TRAIN = split(
    "train dreambooth --config quickstart/dreambooth output_dir=out training.steps=1 training.warmup_steps=0 "
    "training.batch_size=1 "
    "data.prior=null validation.prompts=[] training.tracker=none"
)
TRAIN_MAPS = split(
    "train controllable --config quickstart/controllable output_dir=out training.steps=1 training.warmup_steps=0 "
    "training.batch_size=1 "
    "validation.images=0 training.tracker=none"
)
GENERATE = split("generate --base-model tiny --steps 1 --output out")
"""Lacks a prompt."""
GENERATE_MAPS = split("generate --adapter $MAPS --steps 1 --output out")
"""Lacks a condition."""


def together(*makes: Make) -> Make:
    """Make several things."""

    def make(folder: Path, world: World) -> None:
        for one in makes:
            one(folder, world)

    return make


def file(name: str, content: bytes | str = b"") -> Make:
    """A file with this content."""

    def make(folder: Path, world: World) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def directory(name: str) -> Make:
    return lambda folder, world: (folder / name).mkdir(parents=True)


def fifo(name: str) -> Make:
    """A named pipe without a writer: whoever opens it waits."""

    def make(folder: Path, world: World) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return make


def unix_socket(name: str) -> Make:
    def make(folder: Path, world: World) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        before = Path.cwd()
        os.chdir((folder / name).parent)  # a socket's name has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(Path(name).name)
        finally:
            os.chdir(before)

    return make


def link(name: str, target: str) -> Make:
    def make(folder: Path, world: World) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(target)

    return make


def png(width: int = 80, height: int = 64, colour: object = (200, 90, 40), mode: str = "RGB") -> bytes:
    """The bytes of a picture."""
    buffer = io.BytesIO()
    Image.new(mode, (width, height), colour).save(buffer, "PNG")  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def photos(name: str, *others: Make) -> Make:
    """A folder with one good photo, and other things."""
    return together(file(f"{name}/good.png", png()), *others)


def mode(name: str, bits: int) -> Make:
    """The mode of something that is there."""
    return lambda folder, world: (folder / name).chmod(bits)


def copy(which: str, name: str, changes: Mapping[str, Change]) -> Make:
    """A copy of something of the world, with some of its files changed."""

    def make(folder: Path, world: World) -> None:
        to = Path(shutil.copytree(world[which], folder / name))
        for relative, change in changes.items():
            path = to / relative
            if change is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                continue
            content = change(path.read_bytes()) if callable(change) else change
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make
