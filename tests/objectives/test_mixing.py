"""Trajectory mixing: the shares are exact, nothing leaves the segment, and the spacings follow their laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import random
from scipy.stats import beta, kstest
from torch import Tensor

from pitools.objectives import mixed_intervals, teacher_ratio


def raw(value: float, batch: int) -> Tensor:
    return torch.full((batch,), value, dtype=torch.float64)


def test_the_teacher_ratio_falls_along_a_line_to_zero() -> None:
    assert [teacher_ratio(step, 1.0, 2000) for step in (0, 500, 2000, 5000)] == [1.0, 0.75, 0.0, 0.0]
    assert teacher_ratio(500, 0.6, 2000) == pytest.approx(0.45)
    assert teacher_ratio(0, 1.0, 0) == 0.0
    for arguments, message in (((0, 1.2, 5), "start"), ((-1, 1.0, 5), "step"), ((0, 1.0, -5), "decay_steps")):
        with pytest.raises(ValueError, match=message):
            teacher_ratio(*arguments)


@given(
    seed=st.integers(0, 2**31),
    states=st.integers(1, 6),
    ratio=st.one_of(st.sampled_from([0.0, 1.0, 1e-6, 1 - 1e-6]), st.floats(0, 1)),
    window_share=st.one_of(st.sampled_from([0.0, 0.99]), st.floats(0, 0.99)),
    floor_share=st.sampled_from([0.0, 0.5, 0.99]),
    end=st.one_of(st.just(0.0), st.floats(0, 0.9)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_shares_are_exact_and_nothing_leaves_the_segment(
    seed: int,
    states: int,
    ratio: float,
    window_share: float,
    floor_share: float,
    end: float,
    dtype: torch.dtype,
) -> None:
    g = random(seed)
    raw_dst = torch.full((32,), end, dtype=dtype)
    raw_src = raw_dst + (1 - raw_dst) * (0.05 + 0.95 * torch.rand(32, generator=g, dtype=dtype))
    window = window_share * float((raw_src - raw_dst).min())
    floor = floor_share * float(raw_src.min())
    drawn = mixed_intervals(raw_src, raw_dst, states, ratio, window, floor, g)
    starts, ends = drawn.starts, drawn.ends
    assert starts.shape == ends.shape == (states, 32)
    assert starts.dtype == ends.dtype == dtype

    assert (starts > 0).all()
    assert (starts <= raw_src).all()
    assert (ends <= starts).all()
    assert (starts[1:] <= ends[:-1]).all()
    assert (ends - window >= raw_dst).all()
    assert (ends >= floor - 1e-7).all()

    room = raw_src - torch.clamp(raw_dst + window, min=floor)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    torch.testing.assert_close((starts - ends).sum(0), ratio * room, rtol=0, atol=tolerance)
    if ratio == 0:
        assert torch.equal(starts, ends)
    if ratio == 1:
        assert torch.equal(starts[0], raw_src)
        assert torch.equal(starts[1:], ends[:-1])
        torch.testing.assert_close(ends[-1], raw_src - room, rtol=0, atol=tolerance)


@pytest.mark.parametrize("window", [0.0, 0.25])
def test_on_policy_states_are_uniform_over_the_room(window: float) -> None:
    drawn = mixed_intervals(raw(0.9, 3000), raw(0.2, 3000), 3, 0.0, window, 0.0, random(0))
    share = (0.9 - drawn.starts) / (0.7 - window)
    assert kstest(share.flatten().numpy(), "uniform").pvalue > 0.01
    assert kstest(share[0].numpy(), beta(1, 3).cdf).pvalue > 0.01  # the first of three sorted uniforms


def test_both_kinds_of_interval_are_spacings_of_uniforms() -> None:
    whole = mixed_intervals(raw(1.0, 3000), raw(0.0, 3000), 3, 1.0, 0.0, 0.0, random(0))
    for length in whole.starts - whole.ends:
        assert kstest(length.numpy(), beta(1, 2).cdf).pvalue > 0.01
    mixed = mixed_intervals(raw(1.0, 3000), raw(0.0, 3000), 3, 0.4, 0.0, 0.0, random(1))
    for length in mixed.starts - mixed.ends:
        assert kstest(length.numpy() / 0.4, beta(1, 2).cdf).pvalue > 0.01
    bounds = [raw(1.0, 3000), *(x for pair in zip(mixed.starts, mixed.ends, strict=True) for x in pair), raw(0.0, 3000)]
    for above, below in zip(bounds[0::2], bounds[1::2], strict=True):
        assert kstest((above - below).numpy() / 0.6, beta(1, 3).cdf).pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_moves_no_boundary_over_an_end(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The largest draws there are, and shares that all but round to the whole room."""
    g, largest = random(0), 1 - torch.finfo(dtype).eps / 2
    raw_src = 0.5 + 0.5 * torch.rand(500, generator=g, dtype=dtype)
    raw_dst = 0.3 * torch.rand(500, generator=g, dtype=dtype)
    for ratio in (torch.finfo(dtype).eps / 4, *(i / 16 for i in range(17))):
        for window in (0.0, 0.01, 0.1, 0.17):
            for low in (raw_dst, torch.zeros_like(raw_dst)):
                for draw in (0.0, largest):
                    monkeypatch.setattr(
                        torch, "rand", lambda shape, draw=draw, **_: torch.full(shape, draw, dtype=dtype)
                    )
                    drawn = mixed_intervals(raw_src, low, 2, ratio, window, 0.0, None)
                    assert (drawn.starts > 0).all()
                    assert (drawn.starts <= raw_src).all()
                    assert (drawn.ends <= drawn.starts).all()
                    assert (drawn.starts[1:] <= drawn.ends[:-1]).all()
                    assert (drawn.ends - window >= low).all()
                    if ratio == 1 and window == 0:
                        assert torch.equal(drawn.ends[-1], low)


def test_with_one_generator_for_each_sample_a_batch_may_be_cut() -> None:
    def parts(*slices: slice) -> Tensor:
        drawn = [
            mixed_intervals(
                raw(1.0, 4)[rows], raw(0.5, 4)[rows], 3, 0.4, 0.1, 0.0, [random(seed) for seed in range(4)[rows]]
            )
            for rows in slices
        ]
        return torch.cat([torch.cat([part.starts, part.ends]) for part in drawn], dim=1)

    assert torch.equal(parts(slice(0, 4)), parts(slice(0, 1), slice(1, 4)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"states": 0}, "states must be at least 1, got 0"),
        ({"ratio": -0.1}, r"ratio must lie in \[0, 1\], got -0.1"),
        ({"ratio": 1.5}, "ratio"),
        ({"window": -0.1}, "window must not be negative, got -0.1"),
        ({"window": 0.5}, "window 0.5 must be shorter than the segment, here 0.5"),
        ({"floor": 1.0}, "floor 1 leaves no room"),
        ({"raw_dst": torch.zeros(3)}, "raw_src and raw_dst"),
        ({"randomness": [random(0)]}, "1 generators do not serve 2 samples"),
    ],
)
def test_bad_arguments_are_refused(changed: dict[str, object], message: str) -> None:
    good = {"raw_src": raw(1.0, 2), "raw_dst": raw(0.5, 2), "states": 2, "ratio": 0.5, "window": 0.1, "floor": 0.0}
    mixed_intervals(**good, randomness=None)
    with pytest.raises(ValueError, match=message):
        mixed_intervals(**{**good, "randomness": None, **changed})
