"""The path's conversions, the time shift, segments and substep grids."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import rand, randn, random

from pitools import segments, shift_time, unshift_time
from pitools.path import align, as_time, diffuse, noise_from_velocity, substep_grid, velocity_from_x0, x0_from_velocity


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_conversions_round_trip(seed: int, batch: int) -> None:
    g = random(seed)
    x_0, noise, t = randn(g, batch, 3, 2), randn(g, batch, 3, 2), 0.01 + 0.99 * rand(g, batch)
    x_t = diffuse(x_0, noise, t)
    u = velocity_from_x0(x_0, x_t, t)
    torch.testing.assert_close(u, noise - x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x0_from_velocity(u, x_t, t), x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(noise_from_velocity(u, x_t, t), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffuse(x_0, noise, 1.0), noise)
    torch.testing.assert_close(diffuse(x_0, noise, 0.0), x_0)


@given(st.floats(0, 1), st.floats(0.1, 10))
def test_shift_round_trips_and_keeps_the_ends(raw: float, m: float) -> None:
    assert unshift_time(shift_time(raw, m), m) == pytest.approx(raw, abs=1e-12)
    assert (shift_time(0.0, m), shift_time(1.0, m)) == (0.0, pytest.approx(1.0))
    assert shift_time(raw, 1.0) == raw


def test_published_schedule() -> None:
    # interop.md: 4 steps, final step scale 0.5, shift 3.2.
    raw = segments(4, 0.5)
    assert raw == pytest.approx((1, 5 / 7, 3 / 7, 1 / 7, 0))
    assert [shift_time(r, 3.2) for r in raw[:-1]] == pytest.approx([1, 0.8889, 0.7059, 0.3478], abs=5e-5)
    t = torch.tensor([shift_time(r, 3.2) for r in raw], dtype=torch.float64)
    counts = [len(substep_grid(a, b[None], 1 / 128, 3.2).times) - 1 for a, b in pairwise(t)]
    assert counts == [37, 37, 37, 19]


@given(st.integers(1, 50), st.floats(0.1, 3))
def test_segments_fall_from_one_to_zero_with_one_odd_last_step(nfe: int, scale: float) -> None:
    raw = segments(nfe, scale)
    lengths = [a - b for a, b in pairwise(raw)]
    assert len(raw) == nfe + 1
    assert (raw[0], raw[-1]) == (1.0, 0.0)
    assert all(length == pytest.approx(lengths[0]) for length in lengths[:-1])
    if nfe > 1:
        assert lengths[-1] == pytest.approx(scale * lengths[0])


@given(st.integers(1, 64), st.integers(0, 127), st.sampled_from([1.0, 3.2]))
def test_aligned_intervals_take_no_step_too_many(steps: int, start: int, shift: float) -> None:
    low, high = start / 128, min(128, start + steps) / 128
    t_src, t_dst = (torch.tensor(shift_time(raw, shift), dtype=torch.float64) for raw in (high, low))
    grid = substep_grid(t_src, t_dst[None], 1 / 128, shift)
    assert len(grid.times) - 1 == round((high - low) * 128)


@given(st.integers(0, 2**31), st.integers(1, 4), st.sampled_from([1.0, 3.2]), st.sampled_from([1 / 128, 1 / 10, 2.0]))
def test_a_grid_visits_its_stops_in_even_raw_steps(seed: int, stops: int, shift: float, step_size: float) -> None:
    g = random(seed)
    t_src = 0.1 + 0.9 * rand(g, 5)
    t_stops = (t_src * rand(g, stops, 5)).sort(0, descending=True).values
    t_stops[-1, 0] = 0.0
    t_stops[0, 1] = t_src[1]  # a stop may stand where the roll-out starts
    grid = substep_grid(t_src, t_stops, step_size, shift)
    assert torch.equal(grid.times[0], t_src)
    assert torch.equal(grid.times.gather(0, grid.stops), t_stops)
    assert torch.equal(grid.times[-1], t_stops[-1])
    assert (grid.times.diff(dim=0) <= 0).all()
    raw = unshift_time(grid.times, shift)
    raw_points = unshift_time(torch.cat([t_src[None], t_stops]), shift)
    rows = torch.cat([torch.zeros(1, 5, dtype=torch.long), grid.stops])
    for leg in range(stops):
        for b in range(5):
            first, last = int(rows[leg, b]), int(rows[leg + 1, b])
            span = float(raw_points[leg, b] - raw_points[leg + 1, b])
            assert last - first == (max(1, math.ceil(span / step_size - 1e-4)) if span > 0 else 0)
            steps = -raw[first : last + 1, b].diff()
            torch.testing.assert_close(steps, torch.full_like(steps, span / max(1, last - first)), atol=1e-9, rtol=0)


def test_time_is_checked_and_aligned() -> None:
    x = torch.zeros(3, 2, 2)
    assert align(as_time("t", torch.tensor([0.1, 0.2, 0.3]), x), x).shape == (3, 1, 1)
    assert align(as_time("t", 0.5, x), x).ndim == 0
    for bad in (0.0, -0.1, 1.1, math.nan, torch.full((2,), 0.5), torch.full((3, 1), 0.5)):
        with pytest.raises(ValueError, match="t must"):
            as_time("t", bad, x)
    with pytest.raises(ValueError, match="must be a number"):
        as_time("t", torch.tensor([0.5, 0.5]), torch.zeros(2))  # a lone vector has no batch
    assert as_time("t", 0.0, x, zero=True) == 0


def test_bad_grids_and_schedules_are_refused() -> None:
    t = torch.tensor(0.5)
    with pytest.raises(ValueError, match="step_size"):
        substep_grid(t, torch.tensor([0.1]), 0.0)
    with pytest.raises(ValueError, match="shift"):
        substep_grid(t, torch.tensor([0.1]), 0.1, shift=0.0)
    with pytest.raises(ValueError, match="earlier"):
        substep_grid(t, torch.tensor([0.6]), 0.1)
    with pytest.raises(ValueError, match="nfe"):
        segments(0)
    with pytest.raises(ValueError, match="final_step_scale"):
        segments(4, 0.0)


@given(st.floats(0.01, 100))
def test_shifts_are_exact_at_the_ends(m: float) -> None:
    assert (shift_time(1.0, m), unshift_time(1.0, m), shift_time(0.0, m)) == (1.0, 1.0, 0.0)


def test_a_time_that_was_rounded_on_the_way_is_still_its_bound() -> None:
    x = torch.zeros(2, 1, 2, dtype=torch.float64)
    single = torch.tensor(0.7)  # below 0.7 in float64
    assert float(single) < 0.7
    assert as_time("t", 0.7, x, maximum=single) == single
    with pytest.raises(ValueError, match=r"may not exceed t_src, here 0\.7"):
        as_time("t", 0.70001, x, maximum=single)


def test_states_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"noise \(3, 2\)"):
        diffuse(torch.zeros(3, 1, 2), torch.zeros(3, 2), 0.5)
    with pytest.raises(ValueError, match=r"x_t \(3, 2\)"):
        velocity_from_x0(torch.zeros(3, 1, 2), torch.zeros(3, 2), 0.5)


def test_a_tiny_interval_is_one_substep() -> None:
    grid = substep_grid(torch.tensor(0.5), torch.tensor([0.5 - 1e-7]), 1 / 128)
    assert len(grid.times) == 2
