"""FID and KID: how far the generated images' distribution of Inception features is from the real images'.

FID: Heusel et al. 2017. KID: Binkowski et al. 2018. FID falls with the number of images, and 2,000 are few; KID is
unbiased. Both come from the same features, so that each image passes the network once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.errors import UserError

from .accumulators import FeatureMetric

_ALL = "all"


class InceptionDistance(FeatureMetric):
    """FID and KID of two sets of images, by `load_inception` where numbers are compared with published ones.

    The features stay in memory, 8 kB an image. torchmetrics' metrics keep sums: those cannot be resampled, depend on
    the order of arrival in the last bits, and count an image twice that two processes have seen.
    """

    name = "FID"

    def update(self, images: Sequence[Image.Image], keys: Sequence[str], *, real: bool) -> Self:
        """Add images, one key each. Raises UserError: a key counted twice, or not one key an image."""
        return self._add(_ALL, images, keys, real)

    def update_features(self, features: Tensor, keys: Sequence[str], *, real: bool) -> Self:
        """As `update`, for (N, D) features that the backbone has computed already."""
        return self._add_features(_ALL, features, keys, real)

    def features(self, *, real: bool) -> tuple[tuple[str, ...], Tensor]:
        """The sorted keys, and (N, D) fp32 features in that order, for bootstrap intervals."""
        return (self.real if real else self.generated).of(_ALL)

    def compute(self) -> dict[str, Any]:
        """`fid`, `kid`, and the numbers of images, `real` and `generated`.

        Raises:
            UserError: fewer than two images of a kind.
        """
        self.check_counts()
        real, generated = self.features(real=True)[1], self.features(real=False)[1]
        return {
            "fid": frechet_distance(real, generated),
            "kid": kernel_distance(real, generated),
            "real": len(real),
            "generated": len(generated),
        }

    def check_counts(self) -> None:
        """Raise UserError for fewer than two images of a kind."""
        real, generated = (len(self.features(real=real)[0]) for real in (True, False))
        if min(real, generated) < 2:
            raise UserError(f"{self.name}: {real} real and {generated} generated images; needs two of each.")


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians fitted to (N, D) and (M, D) features; covariances over N - 1.

    `tr sqrt(S1 S2)` is the sum of the singular values of `A1 A2^T` for any `A` with `A^T A = S`. torchmetrics takes
    the eigenvalues of `S1 S2`, which loses half of the digits where there are fewer images than D.
    """
    (mean, root), (other_mean, other_root) = _gaussian(real), _gaussian(generated)
    cross = torch.linalg.svdvals(root @ other_root.T).sum()
    distance = (mean - other_mean).square().sum() + root.square().sum() + other_root.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # of equal sets rounding leaves as little below


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD of (N, D) and (M, D) features under the kernel `(x.y / D + 1)^3`; it may fall below 0.

    Over all images: the expectation of the usual mean over random subsets, without their noise. The kernel is
    torchmetrics'; its `poly_mmd` takes two sets for one size.
    """
    from torchmetrics.image.kid import poly_kernel

    x, y = real.double(), generated.double()
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (poly_kernel(x, x), poly_kernel(y, y))]
    return float(within[0] + within[1] - 2 * poly_kernel(x, y).mean())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, and a matrix A of at most D rows with A^T A the covariance."""
    features = features.double()
    mean = features.mean(dim=0)
    root = (features - mean) / (len(features) - 1) ** 0.5
    if len(root) > root.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return mean, root
