"""Kernel distance, the KID where the features are Inception's (Bińkowski et al. 2018, section 4); float64 inside.

MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (x·y/F + 1)³

with each of the first two means over pairs of distinct samples, which makes the estimate unbiased at any size. Two
draws of one distribution thus give 0 on average, and often less than 0. A set against itself does not give 0 but less,
2/S times the mean k of distinct samples minus that of a sample and itself: it is no second draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pitools.metrics.features import check_one_width, finite_features
from pitools.metrics.points import CHUNK


@dataclass(frozen=True)
class KernelDistance:
    """mean, std: of MMD² over the subsets; their std is 0 where all samples are used once.

    Subsets overlap: std is how far one subset's estimate is from another's, not the error of the mean."""

    mean: float
    std: float


def kernel_distance(
    x: Tensor,
    y: Tensor,
    subset_size: int | None = None,
    subsets: int = 100,
    generator: Generator | None = None,
) -> KernelDistance:
    """MMD² between features `[S, F]` and `[R, F]`; S and R may differ. Symmetric in the two.

    subset_size: without one, all samples are used at once, which is the best estimate, in (S + R)² F operations. With
        one, `subsets` pairs of subsets of that size are drawn, each without replacement; publications take 100 of 1000.
    Raises `ValueError` for sets of different widths, fewer than 2 samples, values that are not finite, or a
    subset_size or subsets out of range.
    """
    x, y = finite_features("x", x), finite_features("y", y)
    check_one_width(x, y)
    if subset_size is None:
        return KernelDistance(float(_mmd(x, y)), 0.0)
    if not 2 <= subset_size <= min(len(x), len(y)):
        most = min(len(x), len(y))
        raise ValueError(f"subset_size must lie in 2..{most}, the size of the smaller set, got {subset_size}")
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    found = torch.stack([_mmd(*(z[_subset(z, subset_size, generator)] for z in (x, y))) for _ in range(subsets)])
    return KernelDistance(float(found.mean()), float(found.std(correction=0)))


def _subset(x: Tensor, size: int, generator: Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.randperm(len(x), generator=generator, device=device)[:size].to(x.device)


def _mmd(x: Tensor, y: Tensor) -> Tensor:
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _sum(x, y) / (len(x) * len(y))


def _mean_of_pairs(x: Tensor) -> Tensor:
    own = (x.square().mean(1) + 1) ** 3
    return (_sum(x, x) - own.sum()) / (len(x) * (len(x) - 1))


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """Of k over all pairs, a chunk of x at a time."""
    rows = x.split(max(1, CHUNK // len(y)))
    return torch.stack([((part @ y.mT / x.shape[1] + 1) ** 3).sum() for part in rows]).sum()
