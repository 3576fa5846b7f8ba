"""Metrics on sets of points `[S, D]`, one row a sample.

sliced Wasserstein   SW₂² = E_θ W₂²(θ·x, θ·y), θ uniform on the sphere, by sorting projections
energy distance      D² = 2 E‖x - y‖ - E‖x - x'‖ - E‖y - y'‖                    (Székely & Rizzo 2013)
diversity            E‖x - x'‖ over the same of a reference
spread               (E‖x - μ‖²/D)^½/σ over the samples within 4σ of their nearest mode μ
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

OFF_MODE_DEVIATIONS = 4.0
EXACT = "donot_use_mm_for_euclid_dist"  # the faster product form loses small distances
CHUNK = 2**24  # numbers that stand in memory at once, where all pairs are too many


def sliced_wasserstein(x: Tensor, y: Tensor, projections: int = 256, generator: torch.Generator | None = None) -> float:
    """SW₂ between two point sets of the same size, `[S, D]` each; 0 if they are equal.

    Raises `ValueError` for sets that differ in shape.
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"two point sets must both be [S, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=x.dtype, device=x.device)
    directions = directions / directions.norm(dim=0)
    gap = (x @ directions).sort(dim=0).values - (y @ directions).sort(dim=0).values
    return float(gap.square().mean().sqrt())


def energy_distance(x: Tensor, y: Tensor) -> float:
    """D between the empirical distributions of `[S, D]` and `[R, D]`; 0 only if they are equal.

    Raises `ValueError` for different D or an empty set.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not (len(x) and len(y)):
        raise ValueError(f"two point sets must be [S, D] and [R, D], got {tuple(x.shape)} and {tuple(y.shape)}")
    within = [2 * float(torch.pdist(z).sum(dtype=torch.float64)) / len(z) ** 2 for z in (x, y)]
    between = float(torch.cdist(x, y, compute_mode=EXACT).mean(dtype=torch.float64))
    return math.sqrt(max(2 * between - sum(within), 0.0))


def endpoint_rmse(x: Tensor, reference: Tensor) -> float:
    """Root mean square over all elements of two sets of end points from the same noises."""
    if x.shape != reference.shape:
        raise ValueError(f"end points must have one shape, got {tuple(x.shape)} and {tuple(reference.shape)}")
    return float((x - reference).square().mean(dtype=torch.float64).sqrt())


def diversity(x: Tensor, reference: Tensor) -> float:
    """Mean distance of two distinct samples of `[S, D]`, over that of the reference's `[R, D]`; 0 for one point.

    Raises `ValueError` for sets of different widths or of fewer than 2 samples, and a reference that is one point.
    """
    if x.ndim != 2 or reference.ndim != 2 or x.shape[1] != reference.shape[1] or min(len(x), len(reference)) < 2:
        raise ValueError(
            f"two sets of at least 2 points must be [S, D] and [R, D], "
            f"got {tuple(x.shape)} and {tuple(reference.shape)}"
        )
    own, whole = (float(torch.pdist(z).mean(dtype=torch.float64)) for z in (x, reference))
    if whole == 0:
        raise ValueError("the reference is one point, and has no diversity to compare with")
    return own / whole


@dataclass(frozen=True)
class ModeReport:
    """nearest: `[S]`, the mode each sample is nearest to.  off_mode: share of the samples further than
    4 standard deviations from every mode.  covered: modes with at least one sample that is not.  spread: of those
    samples about their modes, over the modes' own; 1 is right, 0 where there are none."""

    nearest: Tensor
    off_mode: float
    covered: int
    spread: float


def mode_report(x: Tensor, modes: Tensor, std: float) -> ModeReport:
    """Where samples `[S, D]` fall among `modes` `[K, D]` of standard deviation `std` > 0."""
    if std <= 0:
        raise ValueError(f"std must be positive, got {std}")
    distance, nearest = torch.cdist(x, modes, compute_mode=EXACT).min(dim=1)
    on = distance <= OFF_MODE_DEVIATIONS * std
    spread = float((distance[on].square().mean(dtype=torch.float64) / x.shape[1]).sqrt()) / std if on.any() else 0.0
    return ModeReport(nearest, float((~on).double().mean()), len(nearest[on].unique()), spread)


def same_mode_rate(nearest: Tensor, reference: Tensor) -> float:
    """Share of the samples whose nearest mode is that of the reference's sample from the same noise."""
    return float((nearest == reference).double().mean())
