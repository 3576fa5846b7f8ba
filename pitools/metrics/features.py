"""Metrics on features `[S, F]` of samples, one row a sample; float64 inside.

Fréchet distance   d² = ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½),  between the Gaussians with the sets' moments
class diversity    the mean over classes of the mean of ‖f - f'‖ over pairs of one class
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """d² between features `[S, F]` and `[R, F]`, in their squared units (Heusel et al. 2017, section 2: the FID).

    Covariances are the unbiased ones, over S - 1 and R - 1, and may be of any rank, as they are where S <= F.
    The estimate of two finite draws of one distribution is above 0: compare distances at one S and R only.
    Raises `ValueError` for sets of different widths, of fewer than 2 samples, or with values that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must be features [S, F] and [R, F], got {tuple(x.shape)} and {tuple(y.shape)}")
    x, y = _features("x", x), _features("y", y)
    return float((x.mean(0) - y.mean(0)).square().sum() + _bures(_root(x), _root(y)))


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
    features = _features("features", features)
    classes, counts = labels.unique(return_counts=True)
    if int(counts.min()) < 2:
        raise ValueError(f"labels must name each class at least twice, got class {classes[counts.argmin()]} only once")
    return float(torch.stack([torch.pdist(features[labels == one]).mean() for one in classes]).mean())


def _features(name: str, features: Tensor) -> Tensor:
    features = features.detach().double()
    if len(features) < 2:
        raise ValueError(f"{name} must hold at least 2 samples, got {len(features)}")
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {int((~features.isfinite()).sum())} values that are not")
    return features


def _root(x: Tensor) -> Tensor:
    """R `[F, F]` with RᵀR = Σ, by QR of the centred samples: their covariance, whose roots lose half of the digits,
    is never formed."""
    samples, width = x.shape
    root = torch.linalg.qr((x - x.mean(0)) / math.sqrt(samples - 1), mode="r").R  # [min(S, F), F]
    return torch.cat([root, root.new_zeros(width - len(root), width)])


def _bures(root: Tensor, other: Tensor) -> Tensor:
    """tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½) = min over orthogonal Q of ‖R₁ - Q R₂‖², at the polar factor of R₁R₂ᵀ.

    A sum of squares: real and never negative at any rank, and without cancellation where the two are close.
    """
    u, _, vh = torch.linalg.svd(root @ other.mT)
    gap: Tensor = root - u @ vh @ other
    return gap.square().sum()
