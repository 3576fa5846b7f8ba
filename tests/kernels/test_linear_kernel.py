"""Policies that answer to the time only: one weighted sum against the plain roll-out."""

from __future__ import annotations

import pytest
import torch
from mixtures import rand, randn, random
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pitools import DXPolicy, PolynomialPolicy, integrate, kernels
from pitools.kernels import linear
from pitools.kernels.programme import COMBINE, KEEP, STATE, Programme, rows_of
from pitools.path import substep_grid
from pitools.policies import ShortcutPolicy
from pitools.rollout import visit
from pitools.solvers import SOLVERS

BATCH, FACTORS, CHANNELS = 3, 4, 2
KINDS = ["dx", "dx1", "polynomial", "shortcut"]
METHODS = ["euler", "midpoint", "heun", "rk4"]


def policy_of(kind: str, points: Tensor, t_src: Tensor, shift: float) -> linear.Linear:
    """points: `[B, N, L, C]`."""
    if kind.startswith("dx"):
        return DXPolicy(points[:, :1] if kind == "dx1" else points, t_src, 0.4 * t_src, shift)
    return PolynomialPolicy(points, t_src, shift) if kind == "polynomial" else ShortcutPolicy(points[:, 0], t_src)


def rolled(policy: linear.Linear, x: Tensor, t_src: Tensor, stops: Tensor, method: str, shift: float = 2.0) -> Tensor:
    grid = substep_grid(t_src, stops, 1 / 16, shift)
    return linear.run(policy, x, rows_of(SOLVERS[method], grid.times, grid.stops))


def problem(own: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameters, x, t_src and stops: at the start, on the way, and at t = 0."""
    g = random(seed)
    t_src = 0.5 + 0.5 * rand(g, BATCH) if own else torch.tensor(0.9, dtype=torch.float64)
    shares = torch.tensor([1.0, 0.6, 0.6, 0.2, 0.0], dtype=torch.float64)
    stops = shares.unsqueeze(-1) * t_src if own else shares * t_src
    if own:
        stops[2:, 0] = stops[1, 0]  # one sample is done early
    return randn(g, BATCH, 3, FACTORS, CHANNELS), randn(g, BATCH, FACTORS, CHANNELS), t_src, stops


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_roll_out_equals_the_plain_one(kind: str, method: str, own: bool) -> None:
    points, x, t_src, stops = problem(own)
    policy = policy_of(kind, points, t_src, 2.0)
    with kernels.plain():
        expected = visit(policy, x, t_src, stops, method, 1 / 16, 2.0)
    found = rolled(policy, x, t_src, stops, method)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    single = [value.float() for value in (x, t_src, stops)]
    found = rolled(policy_of(kind, points.float(), single[1], 2.0), *single, method)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_times_of_a_policy_may_be_a_sample_s_own_where_those_of_the_roll_out_are_shared(kind: str) -> None:
    points, x, t_src, _ = problem(True)
    start, stops = t_src.min(), torch.tensor([0.3, 0.1], dtype=torch.float64)
    policy = policy_of(kind, points, t_src, 1.0)
    with kernels.plain():
        expected = visit(policy, x, start, stops, "heun", 1 / 16)
    found = rolled(policy, x, start, stops, "heun", 1.0)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_basis_is_the_denoised_state(kind: str) -> None:
    points, _, t_src, _ = problem(True)
    policy = policy_of(kind, points, t_src, 2.0)
    times = t_src * torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64).unsqueeze(-1)
    weights = policy.basis(times)
    for t, phi in zip(times, weights, strict=True):
        x_0 = torch.einsum("bn,bnlc->blc", phi, points[:, : phi.shape[-1]])
        velocity = policy.velocity(torch.zeros_like(x_0), t)
        torch.testing.assert_close(-t.reshape(-1, 1, 1) * velocity, x_0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own", [False, True])
def test_gradients_of_both_orders(kind: str, own: bool) -> None:
    points, x, t_src, stops = problem(own)
    stops = stops[[1, 4]]

    def ends(points: Tensor, x: Tensor) -> Tensor:
        return rolled(policy_of(kind, points, t_src, 2.0), x, t_src, stops, "heun").square()

    inputs = (points[:, :, :1].clone().requires_grad_(), x[:, :1].clone().requires_grad_())
    assert gradcheck(ends, inputs)
    assert gradgradcheck(ends, inputs)


def test_rows_that_combine_and_look_back() -> None:
    points, x, t_src, _ = problem(False)
    policy, g, rows = DXPolicy(points, t_src, 0.2), random(1), 9
    times = t_src * torch.linspace(1, 0.1, rows, dtype=torch.float64).unsqueeze(-1)
    commits = torch.tensor([STATE, KEEP, COMBINE] * 3, dtype=torch.int32)
    move, commit = rand(g, rows, 5, 1), rand(g, rows, 5, 1)
    stops = torch.tensor([[0], [4], [9]], dtype=torch.int32)
    found = linear.run(policy, x, Programme(times, commits, move, commit, stops))

    state, base, seen, expected = x, x, [torch.zeros_like(x)] * 4, [x]
    for r in range(rows):
        t = times[r, 0]
        seen = [state - t * policy.velocity(state, t), *seen[:3]]
        if commits[r] == COMBINE:
            base = commit[r, 0] * base + sum(b * d for b, d in zip(commit[r, 1:], seen, strict=True))
        elif commits[r] == STATE:
            base = state
        state = move[r, 0] * base + sum(b * d for b, d in zip(move[r, 1:], seen, strict=True))
        expected.append(state)
    torch.testing.assert_close(found, torch.stack([expected[0], expected[4], expected[9]]), rtol=1e-12, atol=1e-12)


def test_nothing_is_rounded_inside_autocast() -> None:
    points, x, t_src, stops = (value.float() for value in problem(False))
    policy = policy_of("dx", points, t_src, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rolled(policy, x, t_src, stops, "euler")
    assert torch.equal(inside, rolled(policy, x, t_src, stops, "euler"))


def test_each_sample_may_end_its_grid_elsewhere() -> None:
    policy = DXPolicy(torch.randn(2, 4, 3, 2, dtype=torch.float64), 0.9, torch.tensor([0.1, 0.2]), 2.0)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    for method in ("heun", "auto"):
        mine = integrate(policy, x, 0.7, 0.05, method)
        with kernels.plain():
            torch.testing.assert_close(mine, integrate(policy, x, 0.7, 0.05, method), rtol=1e-10, atol=1e-10)
