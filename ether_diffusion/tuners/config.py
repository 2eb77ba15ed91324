"""Settings of Naive and magnitude adapters, as PEFT configs."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ether_diffusion.ether.weight_config import BlocksConfig, WeightConfig


class TunerPeftType(str, enum.Enum):
    """The methods' names where PEFT expects members of its own, closed `PeftType`."""

    NAIVE = "NAIVE"
    MAGNITUDE = "MAGNITUDE"


@dataclass
class NaiveConfig(BlocksConfig):
    """Configuration of an adapter that multiplies a frozen layer's input by free, block-diagonal matrices.

    OFT without orthogonality: R = blockdiag(R_1 ... R_n), each R_i of (in/n)^2 free entries, and W' = W R^T for a
    weight W (out, in). It starts at R = I.

    Args:
        num_blocks: Number n of diagonal blocks. Must divide the input features of every layer. The number of
            parameters is in^2 / n a layer.
        init_weights: `False`: each R_i differs from the identity by random numbers.

    The others are those of `BlocksConfig` and `WeightConfig`, as are the errors.
    """

    num_blocks: int = field(default=4, metadata={"help": "Number of diagonal blocks."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TunerPeftType.NAIVE  # pyright: ignore[reportAttributeAccessIssue]


@dataclass
class MagnitudeConfig(WeightConfig):
    """Configuration of an adapter that scales each row of a frozen layer's weight: W' = diag(s) W, from s = 1 on.

    The bias stays as it is. OFT's authors re-fit these magnitudes after OFT, which cannot change them.

    Args:
        init_weights: `False`: each s differs from 1 by a random number. The others are those of `WeightConfig`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TunerPeftType.MAGNITUDE  # pyright: ignore[reportAttributeAccessIssue]
