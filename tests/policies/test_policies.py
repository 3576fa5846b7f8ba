"""What each policy says, beyond what all have in common."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import rand, randn, random

from pitools import (
    DXPolicy,
    GaussianMixture,
    GMPolicy,
    PolynomialPolicy,
    ShortcutPolicy,
    integrate,
    shift_time,
    unshift_time,
)
from pitools.policies import DXHead, Outputs, PolynomialHead, Segment

B, L, C = 3, 4, 2


@given(st.integers(0, 2**31), st.integers(1, 6), st.sampled_from([1.0, 3.2]))
def test_dx_holds_its_grid_and_is_linear_in_raw_time_between(seed: int, points: int, shift: float) -> None:
    g = random(seed)
    t_src, t_dst = 0.6 + 0.4 * rand(g, B), 0.05 + 0.4 * rand(g, B)
    grid, x = randn(g, B, points, L, C), randn(g, B, L, C)
    policy = DXPolicy(grid, t_src, t_dst, shift)

    def denoised(share: torch.Tensor) -> torch.Tensor:
        """x̂_0 at a share of the raw segment: 0 at t_dst, 1 at t_src."""
        raw = unshift_time(t_dst, shift) + share * (unshift_time(t_src, shift) - unshift_time(t_dst, shift))
        t = torch.minimum(shift_time(raw, shift), t_src)
        return x - t[:, None, None] * policy.velocity(x, t)

    for n in range(points):
        share = torch.tensor(n / max(points - 1, 1), dtype=torch.float64)
        torch.testing.assert_close(denoised(share), grid[:, n], rtol=0, atol=1e-10)
    if points > 1:
        weight = rand(g, 1)
        between = torch.lerp(grid[:, 0], grid[:, 1], weight.expand_as(grid[:, 0]))
        torch.testing.assert_close(denoised(weight / (points - 1)), between, rtol=0, atol=1e-10)


def test_dx_keeps_the_nearest_value_below_its_grid() -> None:
    grid, x = randn(random(0), B, 5, L, C), randn(random(1), B, L, C)
    policy = DXPolicy(grid, 0.9, 0.4)
    torch.testing.assert_close(x - 0.1 * policy.velocity(x, 0.1), grid[:, 0])


def test_dx_of_an_empty_segment_is_its_last_state() -> None:
    grid, x = randn(random(0), B, 5, L, C), randn(random(1), B, L, C)
    x_0 = x - 0.4 * DXPolicy(grid, 0.4, 0.4).velocity(x, 0.4)
    assert torch.isfinite(x_0).all()


def test_dx_head_spans_the_trained_segment_in_raw_time() -> None:
    outputs = Outputs(randn(random(0), B, L, 5, C), torch.zeros(B, L, 0), torch.zeros(B, 0))
    t_src = torch.tensor([1.0, 0.8, 0.2], dtype=torch.float64)
    policy = DXHead(5).read(outputs, randn(random(1), B, L, C), t_src, Segment(length=2 / 7, shift=3.2))
    raw = unshift_time(t_src, 3.2) - unshift_time(policy.t_dst, 3.2)
    expected = torch.minimum(torch.tensor(2 / 7, dtype=torch.float64), unshift_time(t_src, 3.2))
    torch.testing.assert_close(raw, expected)


def test_one_grid_point_and_order_zero_are_the_shortcut() -> None:
    g = random(0)
    u, x_src, x, t_src = randn(g, B, 1, L, C), randn(g, B, L, C), randn(g, B, L, C), 0.2 + 0.8 * rand(g, B)
    shortcut = ShortcutPolicy.from_velocity(u[:, 0], x_src, t_src)
    dx = DXPolicy.from_velocity(u, x_src, t_src, 0.0)
    polynomial = PolynomialPolicy.from_velocity(u, x_src, t_src)
    for share in (1.0, 0.4, 0.01):
        expected = shortcut.velocity(x, share * t_src)
        assert torch.equal(dx.velocity(x, share * t_src), expected)
        assert torch.equal(polynomial.velocity(x, share * t_src), expected)
    torch.testing.assert_close(shortcut.velocity(x_src, t_src), u[:, 0])


@given(st.integers(0, 2**31), st.integers(1, 5), st.sampled_from([1.0, 3.2]))
def test_polynomial_is_its_sum_of_powers(seed: int, count: int, shift: float) -> None:
    g = random(seed)
    c, x, t_src = randn(g, B, count, L, C), randn(g, B, L, C), 0.2 + 0.8 * rand(g, B)
    t = t_src * (0.05 + 0.95 * rand(g, B))
    elapsed = (unshift_time(t_src, shift) - unshift_time(t, shift))[:, None, None]
    x_0 = sum(c[:, n] * elapsed**n for n in range(count))
    u = PolynomialPolicy(c, t_src, shift).velocity(x, t)
    torch.testing.assert_close(u, (x - x_0) / t[:, None, None], rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**31), st.integers(1, 6))
def test_gm_in_velocity_space_is_the_gm_over_x0(seed: int, components: int) -> None:
    g = random(seed)
    u_means, logits, log_std = randn(g, B, L, components, C), randn(g, B, L, components), randn(g, B)
    x_src, t_src = randn(g, B, L, C), 0.1 + 0.9 * rand(g, B)
    policy = GMPolicy.from_velocity(u_means, logits, log_std, x_src, t_src)
    # At its source a policy's velocity is the mean of the velocity mixture.
    mean = (logits.softmax(-1)[..., None] * u_means).sum(-2)
    torch.testing.assert_close(policy.velocity(x_src, t_src), mean, rtol=1e-9, atol=1e-9)
    # Eq. 21: the density of x_0 is that of u, with dx_0 = t_src^C du.
    u, t = randn(g, B, L, C), t_src[:, None, None]
    in_u = GaussianMixture(u_means, logits, (2 * log_std).exp()[:, None, None])
    jacobian = C * t_src.log()[:, None]
    torch.testing.assert_close(
        policy.mixture.log_prob(x_src - t * u), in_u.log_prob(u) - jacobian, rtol=1e-8, atol=1e-8
    )


def test_gm_is_valid_to_zero_and_answers_to_the_state() -> None:
    g = random(0)
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double().expand(B, L, 2, 2)
    policy = GMPolicy(GaussianMixture(means, torch.zeros(B, L, 2), 0.01), torch.zeros(B, L, 2).double(), 1.0)
    left, right = torch.tensor([-0.5, 0.0]).double().expand(B, L, 2), torch.tensor([0.5, 0.0]).double().expand(B, L, 2)
    for x, centre in ((left, -1.0), (right, 1.0)):
        x_0 = x - 0.3 * policy.velocity(x, 0.3)
        assert float((x_0[..., 0] - centre).abs().max()) < 0.1
    assert torch.isfinite(policy.velocity(randn(g, B, L, 2), 1e-6)).all()


def test_gm_temperature_and_dropout_are_the_mixtures() -> None:
    g = random(0)
    policy = GMPolicy.from_velocity(randn(g, B, L, 6, C), randn(g, B, L, 6), randn(g, B), randn(g, B, L, C), 0.7)
    tempered = policy.tempered(0.3)
    torch.testing.assert_close(tempered.mixture.variance, 0.3 * policy.mixture.variance)
    torch.testing.assert_close(tempered.mixture.log_weights, (policy.mixture.log_weights / 0.3).log_softmax(-1))
    kept = policy.dropped(0.5, generator=random(1)).mixture.log_weights > -math.inf
    assert (kept == kept[:, :1]).all()
    assert not kept.all()


def test_shapes_that_do_not_match_are_refused() -> None:
    x = torch.zeros(B, L, C)
    with pytest.raises(ValueError, match="means must be"):
        GMPolicy(GaussianMixture(torch.zeros(B, L + 1, 2, C), torch.zeros(B, L + 1, 2), 0.1), x, 1.0)
    with pytest.raises(ValueError, match="u_means must"):
        GMPolicy.from_velocity(torch.zeros(B, 2, L, C), torch.zeros(B, 2, L), 0.0, x, 1.0)
    with pytest.raises(ValueError, match="log_std"):
        GMPolicy.from_velocity(torch.zeros(B, L, 2, C), torch.zeros(B, L, 2), torch.zeros(L), x, 1.0)
    with pytest.raises(ValueError, match="x0_grid must"):
        DXPolicy(torch.zeros(B, L, C), 1.0, 0.0)
    with pytest.raises(ValueError, match="t_dst"):
        DXPolicy(torch.zeros(B, 2, L, C), 0.5, 0.6)
    with pytest.raises(ValueError, match="u_grid must"):
        DXPolicy.from_velocity(torch.zeros(B, 2, L + 1, C), x, 1.0, 0.0)
    with pytest.raises(ValueError, match="coefficients must"):
        PolynomialPolicy(torch.zeros(B, L, C), 1.0)
    with pytest.raises(ValueError, match="u must"):
        ShortcutPolicy.from_velocity(torch.zeros(B, L + 1, C), x, 1.0)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_heads_hand_on_the_shift(shift: float) -> None:
    g = random(0)
    outputs = Outputs(randn(g, B, L, 5, C), torch.zeros(B, L, 0), torch.zeros(B, 0))
    x_src, x = randn(g, B, L, C), randn(g, B, L, C)
    segment = Segment(length=0.5, shift=shift)
    u = outputs.velocities.transpose(1, 2)
    t_dst = shift_time(unshift_time(0.8, shift) - 0.5, shift)
    dx = DXPolicy.from_velocity(u, x_src, 0.8, t_dst, shift)
    polynomial = PolynomialPolicy.from_velocity(u, x_src, 0.8, shift)
    for head, policy in ((DXHead(5), dx), (PolynomialHead(5), polynomial)):
        mine = head.read(outputs, x_src, 0.8, segment)
        torch.testing.assert_close(mine.velocity(x, 0.6), policy.velocity(x, 0.6), rtol=1e-12, atol=1e-12)


def test_policies_take_states_of_another_precision_at_their_source() -> None:
    g = random(0)
    x = randn(g, B, L, C)
    single = GMPolicy.from_velocity(
        *(z.float() for z in (randn(g, B, L, 6, C), randn(g, B, L, 6), randn(g, B), x)), 0.7
    )
    assert torch.isfinite(integrate(single, x, 0.7, 0.0)).all()
    double = GMPolicy.from_velocity(randn(g, B, L, 6, C), randn(g, B, L, 6), randn(g, B), x, 0.3)
    assert torch.isfinite(integrate(double, x.float(), 0.3, 0.0)).all()
    mixed = GMPolicy.from_velocity(randn(g, B, L, 6, C).float(), randn(g, B, L, 6), 0.0, x.float(), 0.9)
    assert mixed.velocity(x, 0.9).dtype == torch.float64


@pytest.mark.parametrize("shift", [0.0, -1.0, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift: float) -> None:
    grid = torch.zeros(B, 2, L, C)
    for build in (lambda: DXPolicy(grid, 1.0, 0.0, shift), lambda: PolynomialPolicy(grid, 1.0, shift)):
        with pytest.raises(ValueError, match="shift"):
            build()
