"""Fidelity and coverage by nearest neighbours, on features `[S, F]`; float64 inside.

A set Φ spreads a ball about each of its points φ', out to its k-th nearest of the others; φ is inside where
‖φ - φ'‖ <= ‖φ' - NN_k(φ', Φ)‖.

precision   share of the samples inside any ball of the reference             (Kynkäänniemi et al. 2019, Eqs. 1, 2)
recall      share of the reference inside any ball of the samples
density     balls of the reference that a sample is inside, on average over k          (Naeem et al. 2020, section 3)
coverage    share of the reference's balls with any sample inside                                  (likewise)

Precision and recall of a set against itself are 1, and coverage is: each point is inside its own ball. Its density
is not: a point is inside its own ball, and on average inside k others, which makes 1 + 1/k without ties. Over draws of
one distribution density is 1 on average, and it may exceed 1, where samples gather among the densest of the reference.

Distances are compared exactly: by a matrix product, which is fast and rounds, and once more, difference by difference,
wherever its rounding could decide. Without that a point would fall out of its own ball. A core takes an hour or so for
the precision and recall of 50,000 samples of 2048 features, and a twenty-fifth of that for 10,000.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.metrics.features import check_one_width, finite_features
from pitools.metrics.points import CHUNK, EXACT


@dataclass(frozen=True)
class PrecisionRecall:
    """precision: share of the samples that look real.  recall: share of the reference that samples look like."""

    precision: float
    recall: float


@dataclass(frozen=True)
class DensityCoverage:
    """density: 1 on average where the two distributions are equal, and may be above.  coverage: in [0, 1]."""

    density: float
    coverage: float


def precision_recall(x: Tensor, reference: Tensor, k: int = 3) -> PrecisionRecall:
    """Of samples' features `[S, F]` against `[R, F]` (Kynkäänniemi et al. 2019, Eqs. 1 and 2).

    Both depend on S and R: compare values at one size of each only, best S = R.
    Raises `ValueError` for sets of different widths, of no more than k samples, or with values that are not finite.
    """
    x, reference = _sets(x, reference, k, k + 1)
    own, others = _radii(x, k), _radii(reference, k)
    real, reached = [], torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, about in _squares(x, reference):
        real.append(about.within(others).any(1))
        reached |= about.within(own[rows, None]).any(0)
    return PrecisionRecall(float(torch.cat(real).double().mean()), float(reached.double().mean()))


def density_coverage(x: Tensor, reference: Tensor, k: int = 5) -> DensityCoverage:
    """Of samples' features `[S, F]` against `[R, F]` (Naeem et al. 2020, section 3).

    The balls are the reference's, which no outlier among the samples can widen. Of one distribution, with S = R,
    coverage is 1 - 2^-k on average as R grows: choose k so that it is near to 1.
    Raises `ValueError` for sets of different widths, an empty x, a reference of no more than k samples, or values that
    are not finite.
    """
    x, reference = _sets(x, reference, k, 1)
    radii = _radii(reference, k)
    inside, covered = 0, torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for _, about in _squares(x, reference):
        in_ball = about.within(radii)
        inside += int(in_ball.sum())
        covered |= in_ball.any(0)
    return DensityCoverage(inside / (k * len(x)), float(covered.double().mean()))


def _sets(x: Tensor, reference: Tensor, k: int, least: int) -> list[Tensor]:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    sets = [finite_features("x", x, least), finite_features("reference", reference, k + 1)]
    check_one_width(*sets)
    return sets


def _radii(x: Tensor, k: int) -> Tensor:
    """`[S]`: from each point to the k-th nearest of the others."""
    found = []
    for rows, about in _squares(x, x):
        about.squares[:, rows].fill_diagonal_(torch.inf)
        bound = about.squares.kthvalue(k, dim=1, keepdim=True).values
        near = about.squares <= bound + 2 * about.slack  # the k nearest are among these
        apart = torch.full_like(about.squares, torch.inf).masked_scatter_(near, about.exact(near))
        found.append(apart.kthvalue(k, dim=1).values)
    return torch.cat(found)


@dataclass(frozen=True)
class _Squares:
    """‖x - y‖² `[S, R]` of points `[S, F]` and `[R, F]`, to within slack."""

    x: Tensor
    y: Tensor
    squares: Tensor
    slack: float

    def within(self, radii: Tensor) -> Tensor:
        """`[S, R]`: whether ‖x - y‖ <= radii, which broadcast and are distances as `exact` has them."""
        gap = self.squares - radii.square()
        inside, close = gap <= 0, gap.abs() <= self.slack
        return inside.masked_scatter_(close, self.exact(close) <= radii.expand_as(close)[close])

    def exact(self, pairs: Tensor) -> Tensor:
        """`[P]`: the distances of those pairs that are true in `[S, R]`; the same bits wherever two points meet."""
        parts = (index.split(max(1, CHUNK // self.x.shape[1])) for index in pairs.nonzero(as_tuple=True))
        found = [
            torch.cdist(self.x[i, None], self.y[j, None], compute_mode=EXACT).flatten()
            for i, j in zip(*parts, strict=True)
        ]
        return torch.cat(found)


def _squares(x: Tensor, y: Tensor) -> Iterator[tuple[slice, _Squares]]:
    """A slice of the rows of x at a time, so that not all pairs stand in memory at once."""
    centre = y.mean(0)
    a, b = x - centre, y - centre
    a_squares, b_squares = a.square().sum(1), b.square().sum(1)
    # Sums of F terms round by at most F epsilon/2 of (‖a‖ + ‖b‖)² <= 2 (‖a‖² + ‖b‖²), here as in the exact distance.
    largest = float(a_squares.amax() + b_squares.amax())
    slack = 4 * (x.shape[1] + 8) * torch.finfo(x.dtype).eps * largest
    step = max(1, CHUNK // len(y))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, _Squares(x[rows], y, a_squares[rows, None] + b_squares - 2 * a[rows] @ b.mT, slack)
