"""The Fréchet distance of two sets of features (FID where they are Inception's), in float64.

Sums are gathered piece by piece, so that memory does not grow with the images. The trace of the
root is that of a symmetric matrix, real by construction; torch-fidelity's eigenvalues of the
product and scipy's sqrtm give the same number as long as all is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gaussian:
    """Mean [d] and covariance [d, d] of a set of features, float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    count: int


class FeatureSums:
    """Gathers features; `gaussian()` is that of all of them."""

    def __init__(self, width: int) -> None:
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)
        self.count = 0

    def add(self, features: torch.Tensor) -> None:
        """Adds features [n, width] of any floating type to the sums."""
        rows = features.double()
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows
        self.count += len(rows)

    def gaussian(self) -> Gaussian:
        """Covariance as an estimate from a sample (n - 1). Raises ValueError for fewer than two."""
        if self.count < 2:
            raise ValueError(f"{self.count} image(s) have no covariance; FID needs two of each set")
        mean = self._sum / self.count
        centred = self._products - self.count * torch.outer(mean, mean)
        return Gaussian(mean, centred / (self.count - 1), self.count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The Fréchet distance of two Gaussians:
    m1 - m2
    ^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))."""
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ other.covariance @ root)
    difference = one.mean - other.mean
    traces = one.covariance.trace() + other.covariance.trace()
    return float(difference @ difference + traces - 2 * product.clamp(min=0).sqrt().sum())
