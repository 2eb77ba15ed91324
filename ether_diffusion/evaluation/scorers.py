"""The scorers that a protocol names, as data, and their loading: networks, their weights and their preprocessing."""

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
    load_dinov2,
    load_inception,
    load_lpips,
    load_tiny_backbone,
    load_tiny_clip,
    load_tiny_segmenter,
    load_transformers_segmenter,
)
from ether_diffusion.metrics.preprocessing import Preprocessing


class _Scorer(Settings):
    sha256: str | None = None
    """Digest of the weights; other weights are refused. Null: any; results record it, and `compare` checks it."""

    @property
    def origin(self) -> str:
        """Where the weights come from, unless the user gives another source."""
        return getattr(self, "source", "tiny")

    def load(self, source: str | None, device: str) -> Any:
        """Load the network, from `source` instead of the protocol's if given. Raises UserError for missing weights."""
        raise NotImplementedError


class Dino(_Scorer):
    """DINO's ViT-S/16."""

    family: Literal["dino"]
    source: str
    preprocessing: Preprocessing

    def load(self, source: str | None, device: str) -> Any:
        return load_dino(source or self.source, self.preprocessing, device)


class Dinov2(_Scorer):
    """DINOv2."""

    family: Literal["dinov2"]
    source: str
    preprocessing: Preprocessing

    def load(self, source: str | None, device: str) -> Any:
        return load_dinov2(source or self.source, self.preprocessing, device)


class Clip(_Scorer):
    """OpenAI's CLIP."""

    family: Literal["clip"]
    architecture: str
    source: str
    preprocessing: Preprocessing

    def load(self, source: str | None, device: str) -> Any:
        loaded = load_clip(self.architecture, source or self.source, device)
        return dataclasses.replace(loaded, preprocessing=self.preprocessing)


class Lpips(_Scorer):
    """LPIPS, version 0.1."""

    family: Literal["lpips"]
    net: Literal["alex", "vgg"]
    preprocessing: Preprocessing

    @property
    def origin(self) -> str:
        return f"lpips {self.net}"

    def load(self, source: str | None, device: str) -> Any:
        return dataclasses.replace(load_lpips(self.net, source, device), preprocessing=self.preprocessing)


class Inception(_Scorer):
    """The Inception network of FID, as torch-fidelity converted it. It resizes images itself, as TensorFlow 1 did."""

    family: Literal["inception"]

    @property
    def origin(self) -> str:
        return "torch-fidelity"

    def load(self, source: str | None, device: str) -> Any:
        return load_inception(source, device)


class CsailUperNet(_Scorer):
    """CSAIL's UPerNet-101."""

    family: Literal["csail_upernet"]
    source: str
    """A folder with the two published files, or a repository on the hub."""
    short_sides: tuple[Annotated[int, Field(ge=32, le=4096)], ...] = Field(min_length=1)
    """Short sides in pixels of the scales whose probabilities are averaged."""

    def load(self, source: str | None, device: str) -> Any:
        where = source or self.source
        return load_csail_upernet(where, where, device, self.short_sides)


class TransformersSegmenter(_Scorer):
    """A segmenter from transformers, with its own preprocessing."""

    family: Literal["transformers_segmenter"]
    source: str

    def load(self, source: str | None, device: str) -> Any:
        return load_transformers_segmenter(source or self.source, device)


class TinyBackbone(_Scorer):
    """The miniature's backbone, in the role of DINO."""

    family: Literal["tiny_backbone"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_backbone()


class TinyClip(_Scorer):
    """The miniature's CLIP."""

    family: Literal["tiny_clip"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_clip()


class TinySegmenter(_Scorer):
    """The miniature's segmenter, in the role of UPerNet."""

    family: Literal["tiny_segmenter"]

    def load(self, source: str | None, device: str) -> Any:
        return load_tiny_segmenter(device)


FeatureScorer = Annotated[Dino | Dinov2 | Clip | Lpips | TinyBackbone | TinyClip, Field(discriminator="family")]
MapScorer = Annotated[
    CsailUperNet | TransformersSegmenter | Inception | Clip | TinySegmenter | TinyBackbone | TinyClip,
    Field(discriminator="family"),
]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded scorer: its network, the source of its weights, and their digest."""

    network: Any
    source: str
    sha256: str


def load_scorers(
    stated: Mapping[str, Any], given: Mapping[str, str] | None = None, device: str = "cpu"
) -> dict[str, Loaded]:
    """Load the scorers of a protocol, by their names in it.

    Args:
        stated: The protocol's `judges`.
        given: Files, folders or hub names that replace the protocol's sources, by scorer.

    Raises:
        UserError: weights are missing, or differ from the digest that the protocol states; or `given` names no scorer
            of the protocol.
    """
    given = given or {}
    for name in given:
        if name not in stated:
            near = did_you_mean(name, stated)
            raise UserError(f"--scorer {name}: the protocol has no such scorer.{near} It has {', '.join(stated)}.")
    found = {}
    for name, scorer in stated.items():
        source = given.get(name)
        if source is not None and scorer.family.startswith("tiny_"):
            raise UserError(f"--scorer {name}={source}: the miniature's own scorers have the package's weights alone.")
        network = scorer.load(source, device)
        if scorer.sha256 not in (None, network.digest):
            raise UserError(
                f"scorer {name}: its weights have digest {network.digest}; the protocol states {scorer.sha256}. To "
                "score with other weights, write a protocol of another name."
            )
        found[name] = Loaded(network, source or scorer.origin, network.digest)
    return found


def sources(options: Sequence[str]) -> dict[str, str]:
    """The NAME=SOURCE options of `--scorer` as a dictionary. Raises UserError for one without a source."""
    pairs = [option.partition("=") for option in options]
    for name, _, source in pairs:
        if not source:
            raise UserError(f"--scorer {name}: expected NAME=SOURCE; SOURCE is a file, a folder or a hub name.")
    return {name: source for name, _, source in pairs}
