"""The record next to a saved adapter's weights: what was checked when they were written, and on which base.

PEFT and diffusers ignore it. Adapters of other programs and of earlier versions have none, and count as unmarked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ether_diffusion.files import digest_of_json

CERTIFICATE = "certificate.json"
OWN = "own_sha256"
DAMAGED = "record"


@dataclass(frozen=True)
class Certificate:
    """Which checks an adapter failed, and what they measured."""

    faults: Mapping[str, str] = field(default_factory=dict)
    """Sentences by the name of the fault; empty: it passed."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Numbers: layers, how far they moved, what they change."""
    base: Mapping[str, str] = field(default_factory=dict)
    """`name` of the base; `digest` of the adapted model as `base_digest` computes it, and the `dtype` that it had, both
    with `text_encoder_` before them for the text encoder, where it is adapted. Those that are not known are absent."""
    weights_sha256: str = ""
    """The digest of the weights that were checked, as `SavedAdapter.weights_digest`."""

    @property
    def line(self) -> str:
        """All faults in one line; empty: there are none."""
        return "; ".join(f"{name}: {sentence}" for name, sentence in self.faults.items())

    def of(self, weights_sha256: str) -> Certificate:
        """This certificate as it counts for weights of this digest."""
        if self.weights_sha256 in ("", weights_sha256):
            return self
        return Certificate({DAMAGED: f"the weights are not those that {CERTIFICATE} is about"})

    def to_text(self) -> str:
        """The content of its file, with its own digest."""
        values = {
            "passed": not self.faults,
            "faults": dict(self.faults),
            "measured": dict(self.measured),
            "base": dict(self.base),
            "weights_sha256": self.weights_sha256,
        }
        return json.dumps({**values, OWN: digest_of_json(values, sort_keys=True)}, indent=1) + "\n"


def read_certificate(content: bytes) -> Certificate:
    """The certificate in a file's content. One that was changed or damaged is a fault of its own, not an error."""
    try:
        values = json.loads(content.decode("utf-8"))
        own = values.pop(OWN)
        if own == digest_of_json(values, sort_keys=True):
            return Certificate(values["faults"], values["measured"], values["base"], values["weights_sha256"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return Certificate({DAMAGED: f"{CERTIFICATE} is not what was written"})
