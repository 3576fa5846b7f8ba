"""The kernel distance against torchmetrics and what is known of it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import KernelDistance, kernel_distance


def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((x[:, None] * y).sum(-1) / x.shape[1] + 1) ** 3


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 6))
def test_the_estimate_is_torchmetrics(seed: int, samples: int, width: int) -> None:
    from torchmetrics.image.kid import poly_mmd

    g = random(seed)
    x, y = randn(g, samples, width), 0.5 + 2 * randn(g, samples, width)
    known = float(poly_mmd(x, y))
    assert kernel_distance(x, y) == KernelDistance(pytest.approx(known, rel=1e-9, abs=1e-11), 0.0)
    assert kernel_distance(y, x).mean == pytest.approx(known, rel=1e-9, abs=1e-11)
    # Subsets of all samples are all the same.
    assert kernel_distance(x, y, samples, 3, g).mean == pytest.approx(known, rel=1e-9, abs=1e-11)
    assert kernel_distance(x, y, samples, 3, g).std < 1e-9 * (abs(known) + 1)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
def test_the_subsets_are_torchmetrics() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    g = random(0)
    x, y = randn(g, 80, 7), 0.3 + randn(g, 60, 7)
    theirs = KernelInceptionDistance(feature=torch.nn.Identity(), subset_size=20, subsets=9).double()
    theirs.set_dtype(torch.float64)
    theirs.update(x, real=True)
    theirs.update(y, real=False)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, std = theirs.compute()
    found = kernel_distance(x, y, 20, 9, random(5))
    assert mean.dtype == torch.float64
    assert found.mean == pytest.approx(float(mean), rel=1e-9)
    assert found.std == pytest.approx(float(std), rel=1e-9)
    assert found == kernel_distance(x, y, 20, 9, random(5))
    assert found != kernel_distance(x, y, 20, 9, random(6))


@settings(max_examples=8)
@given(st.integers(0, 2**31), st.integers(2, 4), st.integers(2, 3))
def test_the_estimate_is_unbiased_at_any_sizes(seed: int, s: int, r: int) -> None:
    # Over all draws of s from two points and r from three, the mean is MMD² of the two uniform distributions.
    g = random(seed)
    x, y = randn(g, 2, 2), randn(g, 3, 2)
    exact = float(kernel(x, x).mean() + kernel(y, y).mean() - 2 * kernel(x, y).mean())
    draws = [
        kernel_distance(x[list(i)], y[list(j)]).mean
        for i in itertools.product(range(2), repeat=s)
        for j in itertools.product(range(3), repeat=r)
    ]
    assert sum(draws) / len(draws) == pytest.approx(exact, rel=1e-9, abs=1e-9)


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_a_set_against_itself_is_not_0_as_documented(seed: int, samples: int) -> None:
    x = randn(random(seed), samples, 3)
    k = kernel(x, x)
    own = float(k.diagonal().mean())
    others = float((k.sum() - k.diagonal().sum()) / (samples * (samples - 1)))
    assert kernel_distance(x, x).mean == pytest.approx(2 / samples * (others - own), rel=1e-9, abs=1e-9)
    assert kernel_distance(x, x).mean < 0


def test_a_larger_shift_is_farther_and_one_distribution_is_0_within_its_error() -> None:
    g = random(1)
    x = randn(g, 400, 6)
    distances = [kernel_distance(x, randn(g, 300, 6) + shift).mean for shift in (0, 0.5, 1, 2)]
    assert distances == sorted(distances)
    within = [kernel_distance(randn(g, 60, 6), randn(g, 50, 6)).mean for _ in range(200)]
    mean, error = sum(within) / 200, float(torch.tensor(within).std()) / 200**0.5
    assert abs(mean) < 4 * error
    assert min(within) < 0


def test_rotations_and_order_do_not_matter_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    g = random(2)
    x, y = randn(g, 40, 5), 1 + randn(g, 31, 5)
    turn = torch.linalg.qr(randn(g, 5, 5)).Q
    distance = kernel_distance(x, y).mean
    assert kernel_distance(x.flip(0) @ turn, y @ turn).mean == pytest.approx(distance, rel=1e-9)
    assert kernel_distance(x.float(), y).mean == pytest.approx(kernel_distance(x.float().double(), y).mean, rel=1e-14)
    monkeypatch.setattr("pitools.metrics.kernel.CHUNK", 100)
    assert kernel_distance(x, y).mean == pytest.approx(distance, rel=1e-12)


def test_sets_that_cannot_be_compared_are_refused() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="same features, got 3 and 2"):
        kernel_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="y must hold at least 2 samples, got 1"):
        kernel_distance(x, x[:1])
    with pytest.raises(ValueError, match="x must be finite"):
        kernel_distance(x / 0, x)
    with pytest.raises(ValueError, match=r"x must be features \[S, F\]"):
        kernel_distance(x[0], x)
    for size in (1, 4):
        with pytest.raises(ValueError, match=rf"subset_size must lie in 2\.\.3.*got {size}"):
            kernel_distance(x, x[:3], size)
    with pytest.raises(ValueError, match="subsets must be at least 1, got 0"):
        kernel_distance(x, x, 2, 0)
    assert math.isfinite(kernel_distance(x, x).mean)
