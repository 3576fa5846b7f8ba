"""Metrics on features against SciPy, closed forms and a plain loop."""

import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import Moments, class_diversity, frechet_distance, pairwise_diversity

few = pytest.mark.filterwarnings("ignore:.*too few for the covariance")


def scipys(x: torch.Tensor, y: torch.Tensor) -> float:
    """The Fréchet distance as its definition has it, by the square root of a matrix that is not symmetric."""
    a, b = np.cov(x.numpy(), rowvar=False, ddof=1), np.cov(y.numpy(), rowvar=False, ddof=1)
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def with_moments(x: torch.Tensor, mean: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    """Samples `[S, F]` moved so that their mean is `mean` and their covariance `rootᵀ root`, exactly."""
    centred = x - x.mean(0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(centred.mT)).mT)
    return mean + whitened @ root


def rotation(g: torch.Generator, width: int) -> torch.Tensor:
    return torch.linalg.qr(randn(g, width, width)).Q


@given(st.integers(0, 2**31), st.integers(2, 6))
def test_frechet_distance_is_scipys(seed: int, width: int) -> None:
    g = random(seed)
    x, y = randn(g, 30, width) @ randn(g, width, width), 1 + randn(g, 25, width) @ randn(g, width, width)
    # Below about 1e-7 of the whole, it is SciPy's answer that is rounded.
    assert frechet_distance(x, y) == pytest.approx(scipys(x, y), rel=1e-6)


@given(st.integers(0, 2**31), st.integers(2, 5))
def test_frechet_distance_of_known_moments(seed: int, width: int) -> None:
    g = random(seed)
    means, deviations = randn(g, 2, width), randn(g, 2, width).exp()
    x, y = (
        with_moments(randn(g, size, width), mean, torch.diag(deviation))
        for size, mean, deviation in zip((40, 60), means, deviations, strict=True)
    )
    # Covariances that commute: Σ (σ₁ - σ₂)² over the axes.
    known = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(x, y) == pytest.approx(float(known), rel=1e-9)


@few
def test_frechet_distance_of_two_points_each() -> None:
    # Covariances 2 aaᵀ and 2 bbᵀ of rank one: tr = 2‖a‖² + 2‖b‖² - 4|a·b|, and no mean.
    a, b = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, -1.0, 7.0])
    x, y = torch.stack([a, -a]), torch.stack([b, -b])
    assert frechet_distance(x, y) == pytest.approx(2 * 25 + 2 * 51 - 4 * 1)


@few
@pytest.mark.parametrize(("samples", "width"), [(2, 8), (5, 8), (8, 8), (50, 8)])
def test_frechet_distance_at_any_rank(samples: int, width: int) -> None:
    g = random(samples)
    x, y = randn(g, samples, width), randn(g, 2 * samples, width)
    turn = rotation(g, width)
    distance = frechet_distance(x, y)
    assert distance > 0
    assert frechet_distance(y, x) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(x @ turn + 5, y @ turn + 5) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(3 * x, 3 * y) == pytest.approx(9 * distance, rel=1e-9)
    assert frechet_distance(x.flip(0), y) == pytest.approx(distance, rel=1e-9)
    # A width that is 0 everywhere, and a set beside itself: nothing is added, and nothing is negative.
    padded = [torch.nn.functional.pad(z, (0, 3)) for z in (x, y)]
    assert frechet_distance(*padded) == pytest.approx(distance, rel=1e-9)
    assert 0 <= frechet_distance(x, x) < 1e-24
    offset = torch.full((width,), 1e-6, dtype=torch.float64)
    assert frechet_distance(x, x + offset) == pytest.approx(width * 1e-12, rel=1e-6)  # not lost among the traces


def test_frechet_distance_is_float64_inside() -> None:
    g = random(0)
    x = randn(g, 40, 3).float()
    y = 1e4 + 2 * x
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(x.double(), y.double()), rel=1e-14)
    half = x.bfloat16()
    assert frechet_distance(half, x) == frechet_distance(half.double(), x.double())


@given(st.integers(0, 2**31), st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 6))
def test_moments_of_parts_merge_into_those_of_the_whole(seed: int, sizes: list[int], width: int) -> None:
    g = random(seed)
    x = 100 * randn(g, width) + randn(g, sum(sizes), width) @ randn(g, width, width)
    parts = [Moments.of(part) for part in x.split(sizes)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    scatter = (x - x.mean(0)).mT @ (x - x.mean(0))
    scale = float(scatter.abs().max())
    for moments in (Moments.of(x), merged):
        assert moments.count == len(x)
        torch.testing.assert_close(moments.mean, x.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(moments.root.mT @ moments.root, scatter, rtol=0, atol=1e-11 * (scale + 1))
    assert parts[0].count == sizes[0]  # and nothing was merged in place


@few
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 41))
def test_the_distance_of_merged_moments_is_that_of_the_sets(seed: int, samples: int, at: int) -> None:
    g = random(seed)
    x, y = randn(g, samples, 5), 0.5 + randn(g, 30, 5)
    at = 1 + at % (samples - 1)
    merged = Moments.of(x[at:]).merged(Moments.of(x[:at]))
    distance = frechet_distance(x, y)
    assert frechet_distance(merged, Moments.of(y)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(y, merged) == pytest.approx(distance, rel=1e-9)
    assert 0 <= frechet_distance(merged, x) < 1e-24


def test_a_shift_of_a_set_has_its_square_for_a_distance() -> None:
    x = randn(random(0), 90, 4)
    assert frechet_distance(x, x + torch.tensor([3.0, 0.0, -4.0, 0.0])) == pytest.approx(25, rel=1e-12)


def test_no_more_samples_than_features_warn() -> None:
    x = randn(random(0), 9, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(x, x.flip(1))
        frechet_distance(Moments.of(x[:4]).merged(Moments.of(x[4:])), x)
    for sets in ((x, x[:8]), (x[:8], x), (Moments.of(x), Moments.of(x[:8])), (x[:8], x[1:])):
        with pytest.warns(UserWarning, match=r"8 samples are too few .* 8 features.*kernel_distance") as caught:
            frechet_distance(*sets)
        assert len(caught) == 1
        assert caught[0].filename == __file__  # the caller's line


@given(st.integers(0, 2**31), st.integers(2, 30), st.integers(1, 4))
def test_pairwise_diversity_is_scipys(seed: int, samples: int, width: int) -> None:
    g = random(seed)
    x = 10 + randn(g, samples, width)
    known = float(scipy.spatial.distance.pdist(x.numpy()).mean())
    assert pairwise_diversity(x) == pytest.approx(known, rel=1e-12)
    assert pairwise_diversity(x.flip(0) @ rotation(g, width) + 7) == pytest.approx(known, rel=1e-9)
    assert pairwise_diversity(x) == pytest.approx(class_diversity(x, torch.zeros(samples)), rel=1e-12)
    assert pairwise_diversity(x[:1].expand(samples, -1)) == 0


def test_pairwise_diversity_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = randn(random(0), 23, 3)
    whole = pairwise_diversity(x)
    monkeypatch.setattr("pitools.metrics.features.CHUNK", 23 * 5)
    assert pairwise_diversity(x) == pytest.approx(whole, rel=1e-14)


@given(st.integers(0, 2**31), st.integers(1, 4))
def test_class_diversity_is_a_loop(seed: int, width: int) -> None:
    g = random(seed)
    features = randn(g, 23, width)
    labels = torch.cat(
        [torch.tensor([0, 0, 2, 2, 5, 5]), torch.tensor([0, 2, 5])[torch.randint(3, (17,), generator=g)]]
    )
    means = []
    for label in (0, 2, 5):
        members = [f for f, one in zip(features, labels.tolist(), strict=True) if one == label]
        pairs = [(i, j) for i in range(len(members)) for j in range(len(members)) if i != j]
        means.append(sum(math.dist(members[i], members[j]) for i, j in pairs) / len(pairs))
    diversity = class_diversity(features, labels)
    assert diversity == pytest.approx(sum(means) / 3, rel=1e-12)
    assert class_diversity(2 * features @ rotation(g, width) + 7, labels) == pytest.approx(2 * diversity, rel=1e-9)


def test_class_diversity_looks_within_classes_only() -> None:
    features = torch.tensor([[0.0], [1.0], [100.0], [103.0], [106.0]])
    assert class_diversity(features, torch.tensor([4, 4, 1, 1, 1])) == pytest.approx((1 + 4) / 2)
    assert class_diversity(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])) == 0


def test_features_that_do_not_fit_are_refused() -> None:
    x = torch.zeros(4, 3)
    for y in (torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 3, 1)):
        with pytest.raises(ValueError, match=r"\[S, F\] and \[R, F\]"):
            frechet_distance(x, y)
    with pytest.raises(ValueError, match="y must hold at least 2 samples, got 1"):
        frechet_distance(x, x[:1])
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="x must be finite, got 1 "):
            frechet_distance(torch.tensor([[0.0], [bad]]), torch.zeros(2, 1))
        with pytest.raises(ValueError, match="features must be finite, got 1 "):
            class_diversity(torch.tensor([[0.0], [bad]]), torch.tensor([0, 0]))
        with pytest.raises(ValueError, match="features must be finite, got 1 "):
            Moments.of(torch.tensor([[0.0], [bad]]))
        with pytest.raises(ValueError, match="features must be finite, got 1 "):
            pairwise_diversity(torch.tensor([[0.0], [bad]]))
    with pytest.raises(ValueError, match="x must hold at least 2 samples, got 1"):
        frechet_distance(Moments.of(x[:1]), x)
    with pytest.raises(ValueError, match=r"\[S, F\] and \[R, F\], got \(4, 3\) and \(4, 2\)"):
        frechet_distance(x, Moments.of(x[:, :2]))
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        Moments.of(x).merged(Moments.of(x[:, :2]))
    with pytest.raises(ValueError, match=r"features must be features \[S, F\]"):
        Moments.of(x[0])
    with pytest.raises(ValueError, match="at least 1 samples"):
        Moments.of(x[:0])
    with pytest.raises(ValueError, match="at least 2 samples"):
        pairwise_diversity(x[:1])
    with pytest.raises(ValueError, match="features and labels"):
        class_diversity(x, torch.zeros(3))
    with pytest.raises(ValueError, match="class 7 only once"):
        class_diversity(x, torch.tensor([1, 1, 1, 7]))
