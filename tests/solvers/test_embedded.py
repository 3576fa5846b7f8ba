"""Steps chosen per factor: errors near the tolerance asked for, and fewer evaluations than a fixed grid needs."""

import math

import pytest
import torch
from mixtures import randn, random
from torch import Tensor

from pitools import GaussianMixture
from pitools.path import align, substep_grid
from pitools.solvers import SOLVERS, Clock, Exponential, RungeKutta, TwoStep, solve_exponential, steps
from pitools.solvers.embedded import FactorField, Ruler, apart, solve_per_factor
from pitools.solvers.tableaus import PerFactor

MEAN, VARIANCE = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.04
MIXTURE = GaussianMixture(randn(random(0), 6, 2), torch.zeros(6), 0.1)
FIXED = {name: method for name, method in SOLVERS.items() if isinstance(method, RungeKutta | TwoStep)}


def time(*t: float) -> Tensor:
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def alike(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
    """The field of `MIXTURE` for every factor."""
    return MIXTURE.velocity(x, t)


def student(spread: float, std: float, t_src: float, factors: int = 64) -> tuple[FactorField, Tensor]:
    """Mixtures of 8 in 16 channels, one for each factor, and states on their path."""
    g, K, C = random(5), 8, 16
    means = randn(g, factors, 1, C) + spread * randn(g, factors, K, C)
    weights = randn(g, factors, K)
    x = (1 - t_src) * GaussianMixture(means, weights, std**2).sample(generator=g) + t_src * randn(g, factors, C)

    def f(x_t: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return GaussianMixture(means[index], weights[index], std**2).velocity(x_t, t, x[index], t_src)

    return f, x


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


def fine(f: FactorField, x: Tensor, t_src: float, t_dst: float, std: float) -> Tensor:
    everyone, grid = torch.arange(len(x)), Exponential(320, step=1e-9)
    return solve_exponential(lambda x, t: f(x, t, everyone), x, time(t_src), time(t_dst), grid, std)


@pytest.mark.parametrize("order", [2, 4, 6])
@pytest.mark.parametrize("t_dst", [0.3, 0.01, 0.0])
def test_one_gaussian_has_a_known_path(order: int, t_dst: float) -> None:
    gaussian = GaussianMixture(MEAN, torch.zeros(1), VARIANCE)
    x = randn(random(1), 64, 2)

    def width(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * VARIANCE + t**2)

    exact = (1 - t_dst) * MEAN + width(t_dst) / width(0.9) * (x - 0.1 * MEAN)
    for tol in (1e-3, 1e-5 if order > 2 else 1e-4):
        end = solve_per_factor(
            lambda x, t, index: gaussian.velocity(x, t), x, time(0.9), time(t_dst), PerFactor(tol, order)
        )
        assert float((end.x_end - exact).square().mean(1).sqrt().max()) < 3 * tol


@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0])
def test_v_is_w_through_a_tanh(scale: float) -> None:
    t_src = time(1.0, 0.7, 0.1, 1e-3)
    clock = Clock.of(t_src, scale)
    ruler = Ruler.of(clock)
    t = torch.linspace(0, 1, 21, dtype=torch.float64).unsqueeze(1) * t_src
    v, w = ruler.v(t), clock.w(t)
    torch.testing.assert_close(v, 2 * ((w - clock.w(t_src) / 2) / 2).tanh())
    torch.testing.assert_close(apart(v, v[3]), 2 * ((w - w[3]) / 2).tanh())
    torch.testing.assert_close(apart(v, apart(v, v[3])), v[3].expand_as(v))
    torch.testing.assert_close(ruler.t(v), t, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [2, 4, 6])
@pytest.mark.parametrize("t_dst", [0.5, 0.1, 0.0])
def test_what_is_linear_in_v_is_met_exactly(order: int, t_dst: float) -> None:
    # From the first step on, which its correction makes linear.
    ruler = Ruler.of(Clock.of(time(0.8), 0.2))

    def f(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return (x - ruler.v(t).unsqueeze(1)) / t.unsqueeze(1)

    x, method = torch.tensor([[0.3]], dtype=torch.float64), PerFactor(order=order)
    found = solve_per_factor(f, x, time(0.8), time(t_dst), method, 0.2)
    if t_dst == 0:
        exact = ruler.v(time(0.0))
    else:  # by the trapezium rule in 1/τ
        tau = 1 / torch.linspace(1 / 0.8, 1 / t_dst, 20001, dtype=torch.float64)
        exact = t_dst / 0.8 * 0.3 + (1 - t_dst / 0.8) * torch.trapezoid(ruler.v(tau), dx=1 / 20000)
    assert float(found.x_end) == pytest.approx(float(exact), abs=1e-7)


@pytest.mark.parametrize(("spread", "std"), [(0.3, 0.3), (0.7, 0.05)])
@pytest.mark.parametrize(("t_src", "t_dst"), [(1.0, 0.0), (1.0, 0.762), (0.762, 0.0)])
def test_the_error_is_near_the_tolerance(spread: float, std: float, t_src: float, t_dst: float) -> None:
    f, x = student(spread, std, t_src)
    exact, costs = fine(f, x, t_src, t_dst, std), []
    for tol in (1e-2, 1e-3, 1e-4, 1e-5):
        found = solve_per_factor(f, x, time(t_src), time(t_dst), PerFactor(tol), std)
        errors = (found.x_end - exact).square().mean(1).sqrt()
        # Over all factors, and for all but the few that pass close between two components.
        assert error(found.x_end, exact) < 1.5 * tol
        assert float(errors.quantile(0.95)) < 3 * tol
        costs.append(float(found.evaluations.double().mean()))
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("spread", "std", "t_src", "t_dst", "at_most"),
    [(0.3, 0.3, 1.0, 0.0, 1 / 2), (0.5, 0.1, 0.762, 0.0, 1 / 3), (0.7, 0.05, 1.0, 0.762, 1.0)],
)
def test_one_thousandth_costs_less_than_on_any_uniform_grid(
    spread: float, std: float, t_src: float, t_dst: float, at_most: float
) -> None:
    f, x = student(spread, std, t_src, 32)
    exact, everyone = fine(f, x, t_src, t_dst, std), torch.arange(len(x))
    found = solve_per_factor(f, x, time(t_src), time(t_dst), PerFactor(1e-3), std)
    assert error(found.x_end, exact) < 1e-3
    cost = float(found.evaluations.double().mean())

    for name, method in FIXED.items():
        a_step = len(method.b) if isinstance(method, RungeKutta) else 1
        # A step that lands on t = 0 is Euler's, and costs 1.
        affordable = math.floor((cost / at_most - (0 if t_dst else 1)) / a_step) + (0 if t_dst else 1)
        for count in range(affordable, 0, -3):
            grid = substep_grid(time(t_src), time(t_dst).unsqueeze(0), (t_src - t_dst) / count, 1.0)
            *_, end = steps(lambda x, t: f(x, t, everyone), x, grid.times, method)
            assert error(end, exact) > 1e-3, (name, count)


def test_only_those_under_way_are_asked_for() -> None:
    x, counts = randn(random(1), 6, 2), torch.zeros(6, dtype=torch.long)
    t_src, t_dst = time(1.0, 0.9, 0.5, 0.5, 0.3, 1e-3), time(0.0, 0.9, 0.1, 0.5, 0.29, 0.0)

    def counting(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        assert len(x) == len(t) == len(index)
        assert bool(((t <= t_src[index]) & (t > t_dst[index])).all())
        counts[index] += 1
        return alike(x, t, index)

    found = solve_per_factor(counting, x, t_src, t_dst, PerFactor())
    assert torch.equal(found.evaluations, counts)
    assert counts[1] == counts[3] == 0
    assert torch.equal(found.x_end[[1, 3]], x[[1, 3]])
    assert counts[4] < counts[0]


def test_neighbours_do_not_matter() -> None:
    x, t_src, t_dst = randn(random(2), 5, 2), time(1.0, 0.9, 0.5, 0.4, 1.0), time(0.0, 0.9, 0.1, 0.0, 0.5)
    together = solve_per_factor(alike, x, t_src, t_dst, PerFactor())
    for i in range(0, 5, 2):
        alone = solve_per_factor(alike, x[i : i + 1], t_src[i], t_dst[i], PerFactor())
        torch.testing.assert_close(alone.x_end, together.x_end[i : i + 1], rtol=0, atol=1e-12)
        assert torch.equal(alone.evaluations, together.evaluations[i : i + 1])


def test_float32_stays_float32_and_gives_the_same() -> None:
    x, ends = randn(random(3), 40, 2).float(), (torch.tensor(1.0), torch.tensor(0.0))
    points = GaussianMixture(MIXTURE.means.float(), torch.zeros(6), 0.1)
    found = solve_per_factor(lambda x, t, index: points.velocity(x, t), x, *ends, PerFactor(1e-4))
    assert found.x_end.dtype == torch.float32
    wide = GaussianMixture(points.means.double(), torch.zeros(6), points.variance.double())
    exact = solve_per_factor(lambda x, t, index: wide.velocity(x, t), x.double(), *ends, PerFactor(1e-6))
    torch.testing.assert_close(found.x_end.double(), exact.x_end, rtol=0, atol=1e-3)


def test_no_factor_is_no_work() -> None:
    assert solve_per_factor(alike, torch.zeros(0, 2), time(1.0), time(0.0), PerFactor()).x_end.shape == (0, 2)


def test_gradients_flow() -> None:
    x, t_src, t_dst = randn(random(4), 3, 2).requires_grad_(), time(1.0, 0.8, 0.5), time(0.0, 0.3, 0.5)

    # The steps depend on x too, but not smoothly, and are no part of the gradient: so it is as exact as the path.
    def end(x: Tensor) -> Tensor:
        return solve_per_factor(alike, x, t_src, t_dst, PerFactor(1e-5)).x_end

    (slope,) = torch.autograd.grad((end(x) * torch.arange(1, 7).reshape(3, 2)).sum(), x)
    for i in range(3):
        nudge = torch.zeros(3, 2, dtype=torch.float64)
        nudge[i, 0] = 1e-3
        rise = (end(x + nudge) - end(x - nudge)).detach() * torch.arange(1, 7).reshape(3, 2)
        assert float(slope[i, 0]) == pytest.approx(float(rise.sum()) / 2e-3, rel=1e-2, abs=1e-3)


def test_errors() -> None:
    x = randn(random(1), 3, 2)
    for arguments, match in (({"tol": 0.0}, "tol"), ({"order": 1}, "order"), ({"max_evaluations": 1}, "at least 2")):
        with pytest.raises(ValueError, match=match):
            PerFactor(**arguments)
    with pytest.raises(ValueError, match=r"factor 0 needs more than max_evaluations = 5 .* raise either"):
        solve_per_factor(alike, x, time(1.0), time(0.0), PerFactor(max_evaluations=5))

    def broken(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return torch.where(align((index == 1) & (t < 0.5), x), math.nan, alike(x, t, index))

    with pytest.raises(ValueError, match="factor 1 is not finite"):
        solve_per_factor(broken, x, time(1.0), time(0.0), PerFactor())
