"""The roll-out in PyTorch's own operations: against the plain one, and its derivatives of both orders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixtures import rand, randn, random
from programmes import Run, executed, gradients, random_run
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pitools import GaussianMixture, GMPolicy, kernels
from pitools.kernels import eager, gm
from pitools.kernels.programme import rows_of
from pitools.path import substep_grid
from pitools.rollout import visit
from pitools.solvers import SOLVERS

RUNS: list[tuple[tuple[int, ...], tuple[str, ...]]] = [  # B, L, K, C, R
    ((3, 5, 4, 3, 12), ()),
    ((3, 2, 5, 2, 9), ("own times", "own variances")),
    ((6, 1, 1, 1, 7), ("own times", "history")),
    ((2, 3, 8, 4, 8), ("combine", "own variances")),
    ((2, 4, 6, 2, 10), ("dropped", "moves")),
    ((2, 4, 6, 2, 10), ("points", "far off")),
    ((2, 4, 6, 3, 10), ("points", "own variances", "close")),
    ((2, 4, 6, 3, 10), ("dropped", "own variances", "far off", "own times")),
    # few components beside the channels: steps in the span of the means
    ((3, 5, 3, 6, 12), ()),
    ((3, 2, 5, 7, 20), ("dropped", "own times")),
    ((2, 4, 6, 9, 40), ("points", "close", "own times")),
    ((2, 4, 1, 3, 9), ("far off",)),
]


def run_of(case: int, batch: int = 0) -> Run:
    (own_batch, *sizes), flags = RUNS[case]
    return random_run(case, batch or own_batch, *sizes, *flags)


def close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@pytest.mark.parametrize("case", range(len(RUNS)))
def test_a_programme_is_executed(case: int) -> None:
    run = run_of(case)
    expected = executed(run)
    assert close(eager.rollout(run.arguments), expected, 1e-9)
    assert close(eager.reference(run.arguments), expected, 1e-9)


@pytest.mark.parametrize("case", range(len(RUNS)))
def test_the_order_of_chunks_does_not_matter(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(case, batch=300)
    whole = eager.rollout(run.arguments)
    monkeypatch.setattr(eager, "CHUNK", 1)
    assert close(eager.rollout(run.arguments), whole, 1e-12)


@pytest.mark.parametrize("case", range(len(RUNS)))
def test_autocast_rounds_nothing(case: int) -> None:
    given = run_of(case).to(torch.float32).arguments
    with torch.autocast("cpu", torch.bfloat16):
        inside = eager.rollout(given)
    assert torch.equal(inside, eager.rollout(given))


@pytest.mark.parametrize("case", range(len(RUNS)))
def test_gradients_are_those_of_the_formulas(case: int) -> None:
    run = run_of(case)
    out_bar = randn(random(99), 3, *run.x.shape)
    leaves = [value.clone().requires_grad_() for value in run.arguments[:5]]
    out = eager.Rollout.apply(*leaves, *run.arguments[5:])
    found = torch.autograd.grad(out, leaves, out_bar)
    for bar, expected in zip(found, gradients(run, out_bar), strict=True):
        assert (bar - expected).norm() <= 1e-8 * (1e-3 + expected.norm())


@pytest.mark.parametrize("case", [1, 2, 3])
def test_second_derivatives(case: int) -> None:
    run = random_run(case, 2, 1, 2, 2, 3, *RUNS[case][1])

    def rolled(*leaves: Tensor) -> Tensor:
        return eager.Rollout.apply(*leaves, *run.arguments[5:])

    leaves = tuple(value.clone().requires_grad_() for value in run.arguments[:5])
    assert gradcheck(rolled, leaves)
    assert gradgradcheck(rolled, leaves)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    run = run_of(0)
    x = run.x.clone().requires_grad_()
    out = eager.Rollout.apply(*run.arguments[:4], x, *run.arguments[5:])
    (bar,) = torch.autograd.grad(out.sum(), x)
    assert close(bar, gradients(run, torch.ones_like(out))[-1], 1e-9)


def rolled(policy: GMPolicy, x: Tensor, t_src: Tensor, stops: Tensor, method: str) -> Tensor:
    """As `visit`, step 1/32."""
    grid = substep_grid(t_src, stops, 1 / 32)
    factors = gm.factors_of(policy, eager.Rollout.apply, x)
    return factors.run(x, rows_of(SOLVERS[method], grid.times, grid.stops))


@pytest.mark.parametrize("own_times", [False, True])
@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("variance", ["shared", "each", "own", "zero"])
@pytest.mark.parametrize("channels", [4, 16])
def test_a_policy_s_roll_out_equals_the_plain_one(channels: int, variance: str, method: str, own_times: bool) -> None:
    g, (batch, factors, components) = random(3), (4, 9, 8)
    t_src = 0.6 + 0.4 * rand(g, batch) if own_times else torch.tensor(1.0, dtype=torch.float64)
    means = 0.5 * randn(g, batch, factors, components, channels)
    weights = randn(g, batch, factors, components)
    weights[:, :, 1] = -torch.inf
    spread = {
        "shared": torch.tensor(0.01, dtype=torch.float64),
        "each": 0.01 * (0.5 + rand(g, batch, factors, 1)),
        "own": 0.01 * (0.5 + rand(g, batch, factors, components)),
        "zero": torch.tensor(0.0, dtype=torch.float64),
    }[variance]
    x = randn(g, batch, factors, channels)
    shares = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    stops = shares.unsqueeze(-1) * t_src if own_times else shares * t_src
    # the numbers that both precisions see
    means, weights, spread, x, t_src, stops = (z.float() for z in (means, weights, spread, x, t_src, stops))
    double = [z.double() for z in (means, weights, spread, x, t_src, stops)]
    policy = GMPolicy(GaussianMixture(*double[:3]), double[3], double[4])
    with kernels.plain():
        expected = visit(policy, double[3], double[4], double[5], method, 1 / 32)
    assert close(rolled(policy, double[3], double[4], double[5], method), expected, 1e-12)
    single = GMPolicy(GaussianMixture(means, weights, spread), x, t_src)
    assert close(rolled(single, x, t_src, stops, method), expected, 1e-5)


@pytest.mark.parametrize("channels", [2, 12])
def test_a_posterior_far_off_keeps_its_digits(channels: int) -> None:
    """Means a thousand widths from the origin: logits about a fixed centre would lose three digits."""
    run = random_run(5, 2, 8, 6, channels, 24, "close")
    run = replace(run, means=run.means + 30, x_src=run.x_src + 30, x=run.x + 30)
    short: Run = run.to(torch.float32)
    assert close(eager.rollout(short.arguments).double() - 30, executed(short.to(torch.float64)) - 30, 1e-3)


def test_a_choice_within_a_far_cluster_keeps_its_digits() -> None:
    """The centre follows a state into one of two clusters, a hundred widths apart; with one centre all along, the
    error is ten times as large."""
    run = random_run(5, 2, 8, 6, 16, 64, "close", "points")
    side = torch.tensor([[-1.0], [1.0]], dtype=torch.float64).repeat(3, 1)
    run = replace(run, means=run.means + 3 * side, x_src=run.x_src + 3, x=run.x + 3)
    short: Run = run.to(torch.float32)
    assert close(eager.rollout(short.arguments).double() - 3, executed(short.to(torch.float64)) - 3, 2e-5)
