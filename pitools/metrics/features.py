"""Metrics on features `[S, F]` of samples, one row a sample; float64 inside.

Fréchet distance    d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½),  between the Gaussians with the sets' moments
pairwise diversity  the mean of ‖f - f'‖ over pairs of distinct samples
class diversity     the mean over classes of the same, over pairs of one class

The FID is the Fréchet distance of Inception features of images, the patch FID that of features of their `patches`.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.metrics.points import CHUNK, EXACT


@dataclass(frozen=True, eq=False)
class Moments:
    """What the Fréchet distance needs of a set, and what sets that come in parts add up to.

    count: samples.  mean: μ `[F]`.  root: R, at most `[F, F]`, with RᵀR = Σ (f - μ)(f - μ)ᵀ, a sum over samples, found
    by QR: the covariance, whose own root has lost half of the digits, is never formed.
    """

    count: int
    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features `[S, F]`, on their device. `ValueError` unless S >= 1 and they are finite."""
        features = finite_features("features", features, least=1)
        mean = features.mean(0)
        return cls(len(features), mean, _triangle(features - mean))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets together; `ValueError` for other features than these.

        Σ (f - μ)(f - μ)ᵀ = R₁ᵀR₁ + R₂ᵀR₂ + (S₁S₂/S)(μ₂ - μ₁)(μ₂ - μ₁)ᵀ     (Chan, Golub & LeVeque 1983)
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments must be of features of one width, got {len(self.mean)} and {len(other.mean)}")
        count, shift = self.count + other.count, other.mean - self.mean
        between = math.sqrt(self.count * other.count / count) * shift
        root = _triangle(torch.cat([self.root, other.root, between[None]]))
        return Moments(count, self.mean + other.count / count * shift, root)


def frechet_distance(x: Tensor | Moments, y: Tensor | Moments) -> float:
    """d² between features `[S, F]` and `[R, F]`, in their squared units (Heusel et al. 2017, section 2: the FID).

    Either may be the `Moments` of a set instead. Covariances are the unbiased ones, over S - 1 and R - 1, and may be
    of any rank. A set against itself gives 0, but two finite draws of one distribution something above 0: compare
    distances at one S and R only. Where a set has no more samples than features its covariance is singular, much
    of the distance is that of the draw, and a `UserWarning` says so.
    Raises `ValueError` for sets of different widths, of fewer than 2 samples, or with values that are not finite.
    """
    shapes = [(z.count, *z.mean.shape) if isinstance(z, Moments) else tuple(z.shape) for z in (x, y)]
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"x and y must be features [S, F] and [R, F], got {shapes[0]} and {shapes[1]}")
    for name, (samples, _) in zip("xy", shapes, strict=True):
        if samples < 2:
            raise ValueError(f"{name} must hold at least 2 samples, got {samples}")
    sets = [z if isinstance(z, Moments) else Moments.of(finite_features(n, z)) for n, z in (("x", x), ("y", y))]
    few, width = min(one.count for one in sets), shapes[0][1]
    if few <= width:
        warnings.warn(
            f"{few} samples are too few for the covariance of {width} features: it is singular, and the distance of "
            f"two draws biased upwards. Give many times {width} samples, or take kernel_distance, which has no bias",
            stacklevel=2,
        )
    roots = [one.root / math.sqrt(one.count - 1) for one in sets]
    return float((sets[0].mean - sets[1].mean).square().sum() + _bures(*roots))


def pairwise_diversity(features: Tensor) -> float:
    """The mean distance of two distinct samples of features `[S, F]`, in their units; 0 if all are one point.

    Exact, in S² F operations, of which a core does about 5·10⁸ a second: a few thousand samples tell it well enough.
    Raises `ValueError` for fewer than 2 samples, or features that are not finite.
    """
    features = finite_features("features", features)
    parts = features.split(max(1, CHUNK // len(features)))
    total = sum(float(torch.cdist(part, features, compute_mode=EXACT).sum()) for part in parts)
    return total / (len(features) * (len(features) - 1))


def class_diversity(features: Tensor, labels: Tensor) -> float:
    """How far apart samples of one class lie: features `[S, F]`, labels `[S]`; 0 if each class is one point.

    The Euclidean distances of all pairs of distinct samples of a class are averaged, then the classes that
    `labels` names, each with the same weight.
    Raises `ValueError` for labels that do not fit, features that are not finite, or a class of a single sample.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features and labels must be [S, F] and [S], got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    features = finite_features("features", features)
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(f"labels must name each class at least twice, got class {classes[counts.argmin()]} only once")
    return float(torch.stack([torch.pdist(features[labels == one]).mean() for one in classes]).mean())


def finite_features(name: str, features: Tensor, least: int = 2) -> Tensor:
    """The argument `name` in float64; `ValueError` unless it is `[S, F]`, S >= `least`, F >= 1, and finite."""
    if features.ndim != 2 or not features.shape[1]:
        raise ValueError(f"{name} must be features [S, F], one row a sample, got {tuple(features.shape)}")
    features = features.detach().double()
    if len(features) < least:
        raise ValueError(f"{name} must hold at least {least} samples, got {len(features)}")
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~features.isfinite()).sum())} values that are not")
    return features


def check_one_width(x: Tensor, y: Tensor) -> None:
    """`ValueError` unless both sets have as many features."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"two sets must be of the same features, got {x.shape[1]} and {y.shape[1]} features")


def _triangle(rows: Tensor) -> Tensor:
    """R `[min(S, F), F]` with RᵀR = Σ rrᵀ over the rows r of `[S, F]`."""
    root: Tensor = torch.linalg.qr(rows, mode="r").R
    return root


def _bures(root: Tensor, other: Tensor) -> Tensor:
    """tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) = min over orthogonal Q of ‖R₁ - Q R₂‖², at the polar factor of R₁R₂ᵀ.

    A sum of squares: real and never negative at any rank, and without cancellation where the two are close.
    """
    rows = max(len(root), len(other))  # rows of zeros do not change RᵀR
    root, other = (torch.nn.functional.pad(r, (0, 0, 0, rows - len(r))) for r in (root, other))
    u, _, vh = torch.linalg.svd(root @ other.mT)
    gap: Tensor = root - u @ vh @ other
    return gap.square().sum()
