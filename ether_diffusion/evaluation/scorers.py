"""The judges that a protocol states, as data: which network, whose weights, what it is shown. And their loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ether_diffusion.config import Settings
from ether_diffusion.errors import UserError, did_you_mean
from ether_diffusion.metrics import (
    load_clip,
    load_csail_upernet,
    load_dino,
    load_inception,
    load_lpips,
    load_tiny_backbone,
    load_tiny_clip,
    load_tiny_segmenter,
    load_transformers_segmenter,
)
from ether_diffusion.metrics.preprocessing import Preprocessing


class _Judge(Settings):
    sha256: str | None = None
    """Of the weights, as results tell it: others are refused. Null: told by the results, and compared there."""

    @property
    def origin(self) -> str:
        """Where its weights come from, unless the user says otherwise."""
        return getattr(self, "source", None) or "tiny"

    def load(self, source: str | None, device: str) -> Any:
        """The network; `source` takes the place of the protocol's. Raises UserError."""
        raise NotImplementedError


class Dino(_Judge):
    """DINO's ViT-S/16."""

    family: Literal["dino"]
    source: str
    preprocessing: Preprocessing

    def load(self, source: str | None, device: str) -> Any:
        return load_dino(source or self.source, self.preprocessing, device)


class Clip(_Judge):
    """OpenAI's CLIP."""

    family: Literal["clip"]
    architecture: str
    source: str
    preprocessing: Preprocessing

    def load(self, source: str | None, device: str) -> Any:
        loaded = load_clip(self.architecture, source or self.source, device)
        return dataclasses.replace(loaded, preprocessing=self.preprocessing)


class Lpips(_Judge):
    """LPIPS, version 0.1."""

    family: Literal["lpips"]
    net: Literal["alex", "vgg"]
    preprocessing: Preprocessing

    @property
    def origin(self) -> str:
        return f"lpips {self.net}"

    def load(self, source: str | None, device: str) -> Any:
        return dataclasses.replace(load_lpips(self.net, source, device), preprocessing=self.preprocessing)


class Inception(_Judge):
    """The Inception of FID, as torch-fidelity converted it; it resizes by itself, as TensorFlow 1 did."""

    family: Literal["inception"]

    @property
    def origin(self) -> str:
        return "torch-fidelity"

    def load(self, source: str | None, device: str) -> Any:
        return load_inception(source, device)


class CsailUperNet(_Judge):
    """CSAIL's UPerNet-101."""

    family: Literal["csail_upernet"]
    source: str
    """A folder with the two published files, or a repository of the hub."""
    short_sides: tuple[int, ...]
    """Of the scales whose probabilities are averaged, in pixels."""

    def load(self, source: str | None, device: str) -> Any:
        where = source or self.source
        return load_csail_upernet(where, where, device, self.short_sides)


class TransformersSegmenter(_Judge):
    """A segmenter of transformers, with its own preprocessing."""

    family: Literal["transformers_segmenter"]
    source: str

    def load(self, source: str | None, device: str) -> Any:
        return load_transformers_segmenter(source or self.source, device)


class TinyBackbone(_Judge):
    """The miniature's, in the role of DINO."""

    family: Literal["tiny_backbone"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_backbone()


class TinyClip(_Judge):
    """The miniature's, in the role of CLIP."""

    family: Literal["tiny_clip"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_clip()


class TinySegmenter(_Judge):
    """The miniature's, in the role of UPerNet."""

    family: Literal["tiny_segmenter"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_segmenter(device)


FeatureJudge = Annotated[Dino | Clip | Lpips | TinyBackbone | TinyClip, Field(discriminator="family")]
MapJudge = Annotated[
    CsailUperNet | TransformersSegmenter | Inception | TinySegmenter | TinyBackbone, Field(discriminator="family")
]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A judge, and what the results say of it."""

    network: Any
    source: str
    sha256: str


def load_scorers(
    stated: Mapping[str, Any], given: Mapping[str, str] | None = None, device: str = "cpu"
) -> dict[str, Loaded]:
    """The judges of a protocol, by their names there.

    Args:
        stated: The protocol's `judges`.
        given: Files, folders or hub names to take instead of the protocol's, by the judges' names.

    Raises:
        UserError: weights that cannot be had, or others than the protocol states; a source for no judge.
    """
    given = given or {}
    for name in given:
        if name not in stated:
            near = did_you_mean(name, stated)
            raise UserError(f"--judge {name}: no such judge in the protocol.{near} Its judges: {', '.join(stated)}.")
    found = {}
    for name, judge in stated.items():
        source = given.get(name)
        network = judge.load(source, device)
        if judge.sha256 is not None and network.digest != judge.sha256:
            raise UserError(
                f"judge {name}: its weights have digest {network.digest}; the protocol states {judge.sha256}. Numbers "
                "by other weights belong to another protocol."
            )
        found[name] = Loaded(network, source or judge.origin, network.digest)
    return found


def sources(options: Sequence[str]) -> dict[str, str]:
    """`NAME=SOURCE` options as a dictionary. Raises UserError for one without a source."""
    pairs = [option.partition("=") for option in options]
    for name, _, source in pairs:
        if not source:
            raise UserError(f"--judge {name}: expected NAME=SOURCE, a file, a folder or a hub name.")
    return {name: source for name, _, source in pairs}
