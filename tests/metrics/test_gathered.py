"""Features in batches against the same all at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import (
    FeatureSet,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    pairwise_diversity,
    precision_recall,
)


def gathered(x: torch.Tensor, logits: torch.Tensor, sizes: list[int]) -> FeatureSet:
    found = FeatureSet(keep=True)
    for part, own in zip(x.split(sizes), logits.split(sizes), strict=True):
        found.add(part, own)
    return found


@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=8), st.booleans())
def test_batches_give_what_the_whole_gives(seed: int, sizes: list[int], single: bool) -> None:
    g, samples = random(seed), sum(sizes) + 8
    dtype = torch.float32 if single else torch.float64
    x, y, logits = randn(g, samples, 4).to(dtype), (1 + randn(g, 30, 4)).to(dtype), randn(g, samples, 3).to(dtype)
    batches, reference = gathered(x, logits, [*sizes, 8]), gathered(y, logits[:1].expand(30, -1), [7, 23])
    assert batches.count == samples
    assert frechet_distance(batches.moments, reference.moments) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    # The rest is of the very same numbers.
    assert kernel_distance(batches.features, reference.features) == kernel_distance(x, y)
    assert precision_recall(batches.features, reference.features) == precision_recall(x, y)
    assert density_coverage(batches.features, reference.features) == density_coverage(x, y)
    assert pairwise_diversity(batches.features) == pairwise_diversity(x)
    assert inception_score(batches.logits, 2) == inception_score(logits, 2)


def test_moments_are_those_of_all_samples_at_any_time() -> None:
    x = randn(random(0), 300, 6)
    batches = FeatureSet()
    for start in range(0, 300, 25):
        batches.add(x[start : start + 25])
        so_far = x[: start + 25]
        assert batches.moments.count == len(so_far)
        assert frechet_distance(batches.moments, so_far) < 1e-24
        assert frechet_distance(batches.moments, x) == pytest.approx(frechet_distance(so_far, x), rel=1e-9, abs=1e-24)
    with pytest.raises(ValueError, match=r"FeatureSet\(keep=True\)"):
        batches.features  # noqa: B018
    with pytest.raises(ValueError, match="no logits were given"):
        batches.logits  # noqa: B018
    with pytest.raises(ValueError, match="no samples were added"):
        FeatureSet().moments  # noqa: B018


def test_few_samples_wait_and_many_do_not() -> None:
    batches = FeatureSet()
    for _ in range(1000):
        batches.add(torch.randn(3, 5, generator=random(1)))
        assert sum(map(len, batches._waiting)) < 4 * 5 + 3
    assert batches.moments.count == 3000


def test_a_batch_that_is_overwritten_later_stays_as_it_was() -> None:
    buffer, batches = torch.zeros(9, 2), FeatureSet(keep=True)
    for value in (1.0, 2.0):
        buffer.fill_(value)
        batches.add(buffer, buffer)
    assert batches.features.equal(torch.tensor([1.0, 2.0]).repeat_interleave(9)[:, None].expand(-1, 2))
    assert batches.logits.equal(batches.features)
    assert batches.moments.mean.tolist() == [1.5, 1.5]


def test_half_precision_and_gradients_do_not_matter() -> None:
    x = randn(random(0), 50, 3).bfloat16().requires_grad_()
    batches = FeatureSet(keep=True)
    batches.add(x)
    assert not batches.features.requires_grad
    assert batches.features.dtype == torch.bfloat16
    assert frechet_distance(batches.moments, x.double()) < 1e-24


def test_batches_that_do_not_fit_are_refused_and_change_nothing() -> None:
    batches = FeatureSet(keep=True)
    x = torch.zeros(4, 3)
    batches.add(x, x)
    for features, logits, message in (
        (x[0], x, r"features must be features \[S, F\]"),
        (x[:, :2], x, "features must be 3 wide, as before, got 2"),
        (x / 0, x, "features must be finite"),
        (x, None, "with every batch or with none"),
        (x, x[:3], r"a row for each of 4 samples .* got \(3, 3\)"),
        (x, x[:, :2], r"as wide as before, got \(4, 2\)"),
        (x, x[:, 0], r"logits must be \[B, classes\]"),
    ):
        with pytest.raises(ValueError, match=message):
            batches.add(features, logits)
    assert (batches.count, len(batches.features), len(batches.logits), batches.moments.count) == (4, 4, 4, 4)
    plain = FeatureSet()
    plain.add(x)
    with pytest.raises(ValueError, match="with every batch or with none"):
        plain.add(x, x)
    assert math.isfinite(float(plain.moments.mean.sum()))
