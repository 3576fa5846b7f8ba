"""Metrics on points against SciPy and known answers."""

import numpy as np
import pytest
import scipy.spatial
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import diversity, endpoint_rmse, energy_distance, mode_report, same_mode_rate, sliced_wasserstein


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40))
def test_energy_distance_is_scipys_in_1d(seed: int, n: int, m: int) -> None:
    g = random(seed)
    x, y = randn(g, n, 1), 1 + 2 * randn(g, m, 1)
    # SciPy's form is sqrt(2 ∫ (F - G)²), which is the same distance in one dimension.
    assert energy_distance(x, y) == pytest.approx(scipy.stats.energy_distance(x[:, 0], y[:, 0]), rel=1e-9, abs=1e-7)


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_sliced_wasserstein_is_exact_in_1d(seed: int, n: int) -> None:
    g = random(seed)
    x, y = randn(g, n, 1), 1 + 2 * randn(g, n, 1)
    exact = np.sqrt(np.mean((np.sort(x[:, 0].numpy()) - np.sort(y[:, 0].numpy())) ** 2))
    assert sliced_wasserstein(x, y, projections=4) == pytest.approx(exact, rel=1e-9)


def test_a_shift_of_a_cloud_has_a_known_distance() -> None:
    x, offset = randn(random(0), 500, 3), torch.tensor([3.0, 0.0, 4.0])
    # W₂ of a projection is |θ·offset|, and E(θ·offset)² = ‖offset‖²/D.
    assert sliced_wasserstein(x, x + offset, 20_000, random(1)) == pytest.approx(5 / 3**0.5, rel=0.02)
    assert sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-12)
    assert energy_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert endpoint_rmse(x + offset, x) == pytest.approx((25 / 3) ** 0.5)


def test_modes() -> None:
    modes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    x = torch.tensor([[0.1, 0.0], [0.9, 0.0], [0.41, 0.0], [1.39, 0.0], [1.41, 0.0]])
    report = mode_report(x, modes, std=0.1)
    assert report.nearest.tolist() == [0, 1, 0, 1, 1]
    assert report.off_mode == pytest.approx(2 / 5)  # 4.1 standard deviations away, twice
    assert report.covered == 2
    assert same_mode_rate(report.nearest, torch.tensor([0, 1, 1, 1, 0])) == pytest.approx(3 / 5)


def test_sets_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[S, D\]"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"\[S, D\]"):
        energy_distance(torch.zeros(3, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="one shape"):
        endpoint_rmse(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="std"):
        mode_report(torch.zeros(3, 2), torch.zeros(1, 2), 0.0)


def test_the_spread_of_a_mode_s_own_samples_is_one_and_shrinks_with_them() -> None:
    modes, std = torch.tensor([[-3.0, 0.0], [2.0, 1.0]], dtype=torch.float64), 0.2
    mode = modes[torch.arange(40_000) % 2]
    x = mode + std * randn(random(0), 40_000, 2)
    assert mode_report(x, modes, std).spread == pytest.approx(1, abs=0.01)
    assert mode_report(mode + 0.3 * (x - mode), modes, std).spread == pytest.approx(0.3, abs=0.003)
    # As NumPy has it, sample by sample, of those within 4 standard deviations; one far away does not count.
    own = [np.linalg.norm(z - m) for z, m in zip(x.numpy(), mode.numpy(), strict=True)]
    expected = np.sqrt(np.mean([d**2 for d in own if d <= 4 * std]) / 2) / std
    far = torch.cat([x, torch.tensor([[0.0, 9.0]])])
    assert mode_report(far, modes, std).spread == pytest.approx(expected, rel=1e-9)
    assert mode_report(far[-1:], modes, std).spread == 0


def test_diversity_is_a_ratio_of_mean_distances() -> None:
    g = random(0)
    x, y = randn(g, 30, 3), randn(g, 20, 3)
    means = [scipy.spatial.distance.pdist(z.numpy()).mean() for z in (x, y)]
    assert diversity(x, y) == pytest.approx(means[0] / means[1])
    assert diversity(0.5 * y + 7, y) == pytest.approx(0.5)
    assert diversity(x[:1].expand(5, -1), y) == 0
    with pytest.raises(ValueError, match="at least 2 points"):
        diversity(x[:1], y)
    with pytest.raises(ValueError, match="one point"):
        diversity(x, y[:1].expand(5, -1))
