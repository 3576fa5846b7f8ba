"""Metrics on points against SciPy and known answers."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import endpoint_rmse, energy_distance, mode_report, same_mode_rate, sliced_wasserstein


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
