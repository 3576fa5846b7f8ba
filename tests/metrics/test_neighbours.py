"""Precision, recall, density and coverage against loops over their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import DensityCoverage, PrecisionRecall, density_coverage, precision_recall

POINT = st.tuples(*[st.integers(-2, 2)] * 2)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Squared, and so exact for integers."""
    return float(((a - b) ** 2).sum())


def radius(points: np.ndarray, i: int, k: int) -> float:
    return sorted(apart(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def inside(phi: np.ndarray, points: np.ndarray, k: int) -> list[bool]:
    """For each of `points`, whether `phi` is in its ball."""
    return [apart(phi, points[i]) <= radius(points, i, k) for i in range(len(points))]


def loops(x: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage, sample by sample."""
    balls = np.array([inside(f, reference, k) for f in x])
    reached = np.array([inside(f, x, k) for f in reference]) if len(x) > k else np.zeros((1, 1))
    return balls.any(1).mean(), reached.any(1).mean(), balls.sum() / (k * len(x)), balls.any(0).mean()


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(5, 25), st.integers(5, 25), st.integers(1, 6))
def test_they_are_brute_force(seed: int, k: int, samples: int, references: int, width: int) -> None:
    g = random(seed)
    x, y = 0.3 + 1.2 * randn(g, samples, width), randn(g, references, width)
    precision, recall, density, coverage = loops(x.numpy(), y.numpy(), k)
    assert precision_recall(x, y, k) == PrecisionRecall(pytest.approx(precision), pytest.approx(recall))
    assert density_coverage(x, y, k) == DensityCoverage(pytest.approx(density), pytest.approx(coverage))


@given(st.integers(0, 2**31), st.sampled_from([0, 2**20, 2**26, 2**28, 2**40]), st.integers(1, 3))
def test_rounding_decides_nothing(seed: int, gap: int, k: int) -> None:
    # Two clusters so far apart that a product form, about any centre, has lost the distances in them, which are exact.
    g = random(seed)
    x, y = (torch.randint(-4, 5, (size, 4), generator=g).double() for size in (14, 12))
    x[::2] += gap
    y[::2] += gap
    precision, recall, density, coverage = loops(x.numpy(), y.numpy(), k)
    assert precision_recall(x, y, k) == PrecisionRecall(pytest.approx(precision), pytest.approx(recall))
    assert density_coverage(x, y, k) == DensityCoverage(pytest.approx(density), pytest.approx(coverage))


@given(st.lists(POINT, min_size=3, max_size=12), st.lists(POINT, min_size=3, max_size=12), st.integers(1, 2))
def test_ties_and_repeated_points_are_brute_force(a: list[tuple[int, int]], b: list[tuple[int, int]], k: int) -> None:
    # On a lattice most neighbours are tied, and many points are one.
    x, y = torch.tensor(a, dtype=torch.float32), torch.tensor(b, dtype=torch.float32)
    precision, recall, density, coverage = loops(x.double().numpy(), y.double().numpy(), k)
    assert precision_recall(x, y, k) == PrecisionRecall(pytest.approx(precision), pytest.approx(recall))
    assert density_coverage(x, y, k) == DensityCoverage(pytest.approx(density), pytest.approx(coverage))


@given(
    st.integers(0, 2**31), st.integers(6, 40), st.integers(1, 40), st.integers(1, 5), st.sampled_from([0.0, 1e4, 1e8])
)
def test_a_set_against_itself(seed: int, samples: int, width: int, k: int, offset: float) -> None:
    # The offset is what costs a product form of the distances its digits: a point would leave its own ball.
    x = offset + randn(random(seed), samples, width)
    repeated = torch.cat([x, x, x[:1].expand(2 * k, -1)])
    for points in (x, x.float(), repeated, repeated.float()):
        assert precision_recall(points, points, k) == PrecisionRecall(1.0, 1.0)
        assert density_coverage(points, points, k).coverage == 1.0
    if offset == 0:  # and there are no ties: its own ball, and k others on average
        assert density_coverage(x, x, k).density == pytest.approx(1 + 1 / k)


def test_known_sets() -> None:
    g = random(0)
    y = randn(g, 60, 3)
    assert precision_recall(y + 1e3, y) == PrecisionRecall(0.0, 0.0)
    assert density_coverage(y + 1e3, y) == DensityCoverage(0.0, 0.0)
    # Half of the samples lie elsewhere: their own balls reach nothing new.
    x = torch.cat([y[:30], y[:30] + 1e3])
    assert precision_recall(x, y).precision == 0.5
    # One point of the reference, over and over: all real, nothing covered besides the balls that it is in.
    one = y[:1].expand(50, -1)
    balls = sum(inside(y[0].numpy(), y.numpy(), 5))
    assert precision_recall(one, y) == PrecisionRecall(1.0, 1 / 60)
    assert density_coverage(one, y) == DensityCoverage(pytest.approx(balls / 5), pytest.approx(balls / 60))
    assert density_coverage(y[:1], y).density == pytest.approx(balls / 5)  # a single sample is a set


def test_equal_distributions_have_the_documented_means() -> None:
    g, k, size = random(3), 3, 150
    found = [density_coverage(randn(g, size, 4), randn(g, size, 4), k) for _ in range(60)]
    density, coverage = (torch.tensor([getattr(one, name) for one in found]) for name in ("density", "coverage"))
    assert abs(float(density.mean()) - 1) < 4 * float(density.std()) / 60**0.5
    # 1 - ∏ (S - i)/(2S - i) over i = 1..k, of which 1 - 2^-k is the limit
    exact = 1 - math.prod((size - i) / (2 * size - i) for i in range(1, k + 1))
    assert abs(float(coverage.mean()) - exact) < 4 * float(coverage.std()) / 60**0.5
    assert exact == pytest.approx(1 - 2**-k, abs=0.01)


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_order_motion_and_chunks_do_not_matter(seed: int, width: int) -> None:
    g = random(seed)
    x, y = 0.5 + randn(g, 33, width), randn(g, 27, width)
    turn, shift = torch.linalg.qr(randn(g, width, width)).Q, randn(g, width)
    moved = [z[torch.randperm(len(z), generator=g)] @ turn + shift for z in (x, y)]
    quality, spread = precision_recall(x, y), density_coverage(x, y)
    assert precision_recall(*moved) == quality
    assert density_coverage(*moved) == spread
    assert precision_recall(y, x) == PrecisionRecall(quality.recall, quality.precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pitools.metrics.neighbours.CHUNK", 100)
        assert precision_recall(x, y) == quality
        assert density_coverage(x, y) == spread


def test_sets_that_cannot_be_compared_are_refused() -> None:
    x = torch.zeros(6, 3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        precision_recall(x, x, 0)
    with pytest.raises(ValueError, match="x must hold at least 4 samples, got 3"):
        precision_recall(x[:3], x)
    with pytest.raises(ValueError, match="reference must hold at least 6 samples, got 5"):
        density_coverage(x, x[:5])
    with pytest.raises(ValueError, match="x must hold at least 1 samples, got 0"):
        density_coverage(x[:0], x)
    with pytest.raises(ValueError, match="same features, got 3 and 2"):
        density_coverage(x, x[:, :2])
    with pytest.raises(ValueError, match="reference must be finite, got 18 "):
        precision_recall(x, x / 0)
