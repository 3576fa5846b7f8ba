"""Roll-outs against an independently written Euler loop, and their invariants."""

from itertools import pairwise

import pytest
import torch
from mixtures import rand, randn, random

from pitools import GaussianMixture, GMPolicy, integrate, mean_velocity, trajectory
from pitools.rollout import visit
from pitools.solvers import PerFactor

PRIOR = GaussianMixture(2 * randn(random(0), 9, 2), torch.zeros(9), 0.05 + rand(random(1), 9))


def test_integrate_is_the_plain_euler_loop() -> None:
    x = start = randn(random(2), 30, 2)
    times = torch.linspace(0.8, 0.2, 78, dtype=torch.float64)  # ceil(0.6 * 128) = 77 substeps
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * PRIOR.velocity(x, t)
    torch.testing.assert_close(integrate(PRIOR, start, 0.8, 0.2), x, rtol=0, atol=1e-12)


def test_trajectory_and_visit_walk_the_same_path() -> None:
    x = randn(random(2), 30, 2)
    path = trajectory(PRIOR, x, 1.0, 0.0)
    assert path.states.shape == (129, 30, 2)
    assert torch.equal(path.states[0], x)
    torch.testing.assert_close(path.states[-1], integrate(PRIOR, x, 1.0, 0.0), rtol=0, atol=0)
    stops = path.times[[32, 64, 128]]
    torch.testing.assert_close(visit(PRIOR, x, 1.0, stops), path.states[[32, 64, 128]], rtol=0, atol=1e-11)


def test_visits_are_the_states_of_separate_rollouts() -> None:
    g = random(4)
    x, t_src = randn(g, 5, 2), 0.5 + 0.5 * rand(g, 5)
    stops = (t_src * rand(g, 3, 5)).sort(0, descending=True).values
    first = integrate(PRIOR, x, t_src, stops[0])
    second = integrate(PRIOR, first, stops[0], stops[1])
    seen = visit(PRIOR, x, t_src, stops)
    torch.testing.assert_close(seen[0], first, rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1], second, rtol=0, atol=1e-12)


def test_mean_velocity_tends_to_the_velocity_and_spans_the_window() -> None:
    x = randn(random(2), 30, 2)
    gaps = [
        float((mean_velocity(PRIOR, x, 0.6, 0.6 - w, step_size=w) - PRIOR.velocity(x, 0.6)).abs().max())
        for w in (1e-2, 1e-4)
    ]
    assert gaps[0] < 1e-12  # one Euler substep: the velocity itself
    assert gaps[1] < 1e-9
    wide = mean_velocity(PRIOR, x, 0.6, 0.4)
    torch.testing.assert_close(x - 0.2 * wide, integrate(PRIOR, x, 0.6, 0.4), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="empty"):
        mean_velocity(PRIOR, x, 0.5, 0.5)


def test_an_exact_policy_ends_where_the_teachers_ode_ends() -> None:
    g = random(7)
    for variance in (0.05, 0.05 + 0.3 * rand(g, 9), 0.0):
        prior = GaussianMixture(2 * randn(g, 9, 2), randn(g, 9), variance)
        t_src = 0.3 + 0.7 * rand(g, 400)
        x_src = (1 - t_src[:, None]) * prior.sample((400,), generator=g) + t_src[:, None] * randn(g, 400, 2)
        seen = prior.condition(x_src, t_src)
        own = seen.variance.unsqueeze(1)
        policy = GMPolicy(GaussianMixture(seen.means[:, None], seen.log_weights[:, None], own), x_src[:, None], t_src)
        mine = integrate(policy, x_src[:, None], t_src, 0.0)[:, 0]
        teacher = integrate(prior, x_src, t_src, 0.0)
        # A near-tie between far modes: a change of 1e-10 in the start moves the teacher's own end by 1e6 times that.
        moved = integrate(prior, x_src + 1e-10 * randn(g, 400, 2).sign(), t_src, 0.0)
        tie = (moved - teacher).abs().amax(-1) > 1e-4
        assert tie.double().mean() < 0.02
        assert (mine - teacher)[~tie].abs().max() < 1e-8


def test_half_precision_states_are_integrated_in_float32() -> None:
    end = integrate(GaussianMixture(torch.randn(3, 2), torch.zeros(3), 0.1), torch.randn(4, 2).bfloat16(), 1.0, 0.0)
    assert end.dtype == torch.float32


def test_bad_intervals_are_refused() -> None:
    x = torch.zeros(4, 2)
    for t_src, t_dst in ((0.5, 0.6), (0.0, 0.0), (1.2, 0.0), (0.5, -0.1), (torch.full((3,), 0.5), 0.0)):
        with pytest.raises(ValueError, match=r"t_src|t_dst"):
            integrate(PRIOR, x, t_src, t_dst)
    with pytest.raises(ValueError, match="a step size"):
        trajectory(PRIOR, x, 1.0, 0.0, "dopri5")
    with pytest.raises(ValueError, match=r"\[B, \.\.\.\]"):
        integrate(PRIOR, torch.zeros(2), 1.0, 0.0)


def test_adaptive_steps_per_factor_and_per_sample() -> None:
    g = random(8)
    means, log_weights = 0.5 * randn(g, 3, 4, 6, 2), randn(g, 3, 4, 6)
    x_src, t_src = randn(g, 3, 4, 2), torch.tensor([1.0, 0.7, 0.4], dtype=torch.float64)
    policy = GMPolicy(GaussianMixture(means, log_weights, 0.02 + 0.1 * rand(g, 3, 1, 1)), x_src, t_src)
    t_dst = torch.tensor([0.0, 0.3, 0.4], dtype=torch.float64)
    fine = integrate(policy, x_src, t_src, t_dst, "rk4", 1 / 4096)
    for field in (policy, PRIOR):
        reference = fine if field is policy else integrate(PRIOR, x_src, t_src, t_dst, "rk4", 1 / 4096)
        end = integrate(field, x_src, t_src, t_dst, "adaptive")
        assert float((end - reference).square().mean().sqrt()) < 2e-3
        tight = integrate(field, x_src, t_src, t_dst, PerFactor(tol=1e-6))
        assert float((tight - reference).square().mean().sqrt()) < 1e-4
    assert torch.equal(integrate(policy, x_src, t_src, t_dst, "adaptive")[2], x_src[2])
