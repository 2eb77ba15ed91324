"""FID and KID: how far the generated images' distribution of Inception features is from the real images'.

FID: Heusel et al. 2017. KID: Binkowski et al. 2018. FID falls with the number of images, and 2,000 are few; KID is
unbiased. Both of the same features, so that images pass the network once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from typing_extensions import Self

from ether_diffusion.errors import UserError

from .accumulators import FeatureTable, State
from .backbones import ImageBackbone

_ALL = "all"


class InceptionDistance:
    """FID and KID of two sets of images. Their features are kept: 8 kB an image.

    Args:
        backbone: Makes the features: `load_inception` for numbers that can be compared with published ones.
        batch_size: Images at a time.
    """

    name = "FID"

    def __init__(self, backbone: ImageBackbone, batch_size: int = 32) -> None:
        self.backbone = backbone
        self.batch_size = batch_size
        self.real = FeatureTable(f"{self.name}, real images")
        self.generated = FeatureTable(f"{self.name}, generated images")

    def update(self, images: Sequence[Image.Image], keys: Sequence[str], *, real: bool) -> Self:
        """Add images, one key each.

        Raises:
            UserError: a key counted twice, or not one key an image.
        """
        if len(images) != len(keys):
            raise UserError(f"{self.name}: {len(keys)} keys for {len(images)} images.")
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            self.update_features(self.backbone.image_features(images[part]), keys[part], real=real)
        return self

    def update_features(self, features: Tensor, keys: Sequence[str], *, real: bool) -> Self:
        """As `update`, for (N, D) features that the backbone has made already."""
        (self.real if real else self.generated).add(_ALL, keys, features)
        return self

    def features(self, *, real: bool) -> tuple[tuple[str, ...], Tensor]:
        """The sorted keys, and (N, D) fp32 features in that order: what bootstrap intervals draw from."""
        return (self.real if real else self.generated).of(_ALL)

    def compute(self) -> dict[str, Any]:
        """`fid`, `kid`, and the numbers of images, `real` and `generated`.

        Raises:
            UserError: fewer than two images of a kind.
        """
        real, generated = self.features(real=True)[1], self.features(real=False)[1]
        if min(len(real), len(generated)) < 2:
            raise UserError(f"{self.name}: {len(real)} real and {len(generated)} generated images; needs two of each.")
        return {
            "fid": frechet_distance(real, generated),
            "kid": kernel_distance(real, generated),
            "real": len(real),
            "generated": len(generated),
        }

    def state(self) -> State:
        """For `merge`, on another process."""
        return {"real": self.real.state(), "generated": self.generated.state()}

    def merge(self, state: State) -> Self:
        """Add what another process has seen. Raises UserError for an image that both have."""
        self.real.merge(state["real"])
        self.generated.merge(state["generated"])
        return self


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to (N, D) and (M, D) features; covariances over N - 1.

    `tr sqrt(S1 S2)` is the sum of the singular values of `A1 A2^T` for any `A` with `A^T A = S`. No square root of a
    matrix is taken, so that covariances of few images, which are singular, cost no digits.
    """
    (mean, root), (other_mean, other_root) = _gaussian(real), _gaussian(generated)
    cross = torch.linalg.svdvals(root @ other_root.T).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # of equal sets rounding leaves as little below


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD of (N, D) and (M, D) features under the kernel `(x.y / D + 1)^3`; it may fall below 0.

    Over all images: the expectation of the usual mean over random subsets, without their noise.
    """
    x, y = real.double(), generated.double()
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(within[0] + within[1] - 2 * _kernel(x, y).mean())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a matrix A of at most D rows with A^T A the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return mean, root


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
