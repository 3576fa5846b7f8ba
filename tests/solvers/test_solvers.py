"""One conformance suite over all solvers, on fields whose solutions are known.

The velocity of a single Gaussian N(μ, v I) is linear, and the path of its ODE from x at t = 1 is

    x_t = (1 - t) μ + sqrt((1 - t)² v + t²) x
"""

import math

import numpy as np
import pytest
import torch
from mixtures import randn, random
from torch import Tensor

from pitools import GaussianMixture, PolynomialPolicy, ShortcutPolicy, integrate, shift_time, unshift_time
from pitools.rollout import visit
from pitools.solvers import SOLVERS, Adaptive, RungeKutta, TwoStep, solver, steps

FIXED = [name for name, method in SOLVERS.items() if isinstance(method, RungeKutta | TwoStep)]
PLANNED = [*FIXED, "auto"]  # whose times are known before they run
ONE_STEP = [name for name, method in SOLVERS.items() if isinstance(method, RungeKutta)]
MEAN, VARIANCE = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.2
GAUSSIAN = GaussianMixture(MEAN, torch.zeros(1), VARIANCE)
MIXTURE = GaussianMixture(randn(random(0), 6, 2), torch.zeros(6), 0.1)


def solution(x: Tensor, t_from: float, t: float) -> Tensor:
    def width(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * VARIANCE + t**2)

    return (1 - t) * MEAN + width(t) / width(t_from) * (x - (1 - t_from) * MEAN)


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize("name", FIXED)
def test_order(name: str, shift: float) -> None:
    # Not the Gaussian: the midpoint rule is of third order on it.
    c = randn(random(1), 8, 3, 1, 2)
    policy, x, t_src, t_dst = PolynomialPolicy(c, 0.9), randn(random(2), 8, 1, 2), 0.9, 0.25
    # d(x/t)/dt = -x̂_0/t², with x̂_0 = Σ c_n (t_src - t)^n
    log, rest = math.log(t_src / t_dst), 1 / t_dst - 1 / t_src
    moments = (rest, t_src * rest - log, t_src**2 * rest - 2 * t_src * log + t_src - t_dst)
    exact = t_dst * (x / t_src + sum(c[:, n] * moment for n, moment in enumerate(moments)))
    span = unshift_time(t_src, shift) - unshift_time(t_dst, shift)
    steps = [span / n for n in ((64, 128, 256) if solver(name).order < 4 else (16, 32, 64))]
    errors = [float((integrate(policy, x, t_src, t_dst, name, h, shift) - exact).square().mean().sqrt()) for h in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(solver(name).order, abs=0.2)


@pytest.mark.parametrize("name", SOLVERS)
def test_follows_the_gaussian(name: str) -> None:
    x = randn(random(1), 64, 2)
    end = integrate(GAUSSIAN, x, 0.9, 0.1, name, 1 / 512)
    tolerance = {"euler": 1e-2, "dopri5": 1e-3, "auto": 2e-4, "adaptive": 1e-3}.get(name, 5e-5)
    torch.testing.assert_close(end, solution(x, 0.9, 0.1), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SOLVERS)
def test_lands_on_the_denoised_state_at_zero(name: str) -> None:
    x = randn(random(1), 64, 2)
    end = integrate(GAUSSIAN, x, 1.0, 0.0, name, 1 / 128)
    assert torch.isfinite(end).all()
    torch.testing.assert_close(end, solution(x, 1.0, 0.0), rtol=0, atol=0.03)
    # The last step asks for no velocity but the one where it starts.
    last = integrate(GAUSSIAN, x, 1e-3, 0.0, name, 1.0)
    tolerance = {"dopri5": 1e-5, "auto": 1e-4, "adaptive": 1e-4}.get(name, 1e-12)  # these two extrapolate
    torch.testing.assert_close(last, GAUSSIAN.denoise(x, 1e-3), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("variance", [0.0, 0.05])
def test_float32_stays_finite_down_to_zero(name: str, variance: float) -> None:
    points = GaussianMixture(MIXTURE.means.float(), torch.zeros(6), variance)
    end = integrate(points, randn(random(2), 50, 2).float(), 1.0, 0.0, name, 1 / 32)
    assert end.dtype == torch.float32
    assert torch.isfinite(end).all()


def test_dopri5_is_as_good_as_its_tolerance() -> None:
    x = randn(random(1), 64, 2)
    errors = [
        float((integrate(GAUSSIAN, x, 0.9, 0.1, Adaptive(tol, tol)) - solution(x, 0.9, 0.1)).abs().max())
        for tol in (1e-4, 1e-7, 1e-10)
    ]
    assert all(error < 100 * tol for error, tol in zip(errors, (1e-4, 1e-7, 1e-10), strict=True))


def test_dopri5_at_tight_tolerance_agrees_with_fine_rk4() -> None:
    x = randn(random(1), 50, 2)
    for t_dst in (0.05, 0.0):
        adaptive = integrate(MIXTURE, x, 1.0, t_dst, Adaptive(rtol=1e-10, atol=1e-12))
        fine = integrate(MIXTURE, x, 1.0, t_dst, "rk4", 1 / 4096)
        # Down to 0 both end in an Euler step, of different lengths.
        torch.testing.assert_close(adaptive, fine, rtol=0, atol=1e-8 if t_dst else 1e-4)


@pytest.mark.parametrize("name", ONE_STEP)
@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_splitting_an_interval_at_a_grid_point_changes_nothing(name: str, shift: float) -> None:
    x = randn(random(1), 20, 2)
    ends = [shift_time(raw, shift) for raw in (1.0, 40 / 128, 0.0)]
    middle = integrate(MIXTURE, x, ends[0], ends[1], name, shift=shift)
    split = integrate(MIXTURE, middle, ends[1], ends[2], name, shift=shift)
    torch.testing.assert_close(split, integrate(MIXTURE, x, ends[0], ends[2], name, shift=shift), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", PLANNED)
def test_each_sample_with_its_own_times_equals_each_alone(name: str) -> None:
    g = random(3)
    x, t_src = randn(g, 6, 2), torch.tensor([1.0, 0.9, 0.5, 0.3, 0.3, 1.0], dtype=torch.float64)
    t_dst = torch.tensor([0.0, 0.2, 0.5, 0.0, 0.29, 0.99], dtype=torch.float64)
    together = integrate(MIXTURE, x, t_src, t_dst, name, 1 / 40, 2.0)
    alone = [integrate(MIXTURE, x[i : i + 1], float(t_src[i]), float(t_dst[i]), name, 1 / 40, 2.0) for i in range(6)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


def test_dopri5_meets_its_tolerance_for_each_sample() -> None:
    x, t_src = randn(random(3), 3, 2), torch.tensor([1.0, 0.5, 0.4], dtype=torch.float64)
    t_dst = torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)
    together = integrate(MIXTURE, x, t_src, t_dst, Adaptive(1e-9, 1e-10))
    fine = integrate(MIXTURE, x, t_src, t_dst, "rk4", 1 / 4096)
    torch.testing.assert_close(together, fine, rtol=0, atol=1e-5)
    assert torch.equal(together[1], x[1])


@pytest.mark.parametrize("name", PLANNED)
def test_gradients_flow_through_a_rollout(name: str) -> None:
    x = randn(random(1), 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: integrate(MIXTURE, x, 0.9, 0.0, name, 0.3), (x,))


def test_tableaus_are_consistent() -> None:
    for method in SOLVERS.values():
        if isinstance(method, RungeKutta):
            assert sum(method.b) == pytest.approx(1)
            assert [len(row) for row in method.a] == list(range(1, len(method.b)))


def test_unknown_methods_name_the_known_ones() -> None:
    with pytest.raises(ValueError, match="euler, midpoint, heun, rk4, ab2, dopri5, auto, adaptive"):
        integrate(MIXTURE, torch.zeros(1, 2), 1.0, 0.0, "leapfrog")


def test_ab2_is_exact_on_a_linear_velocity_whatever_its_steps() -> None:
    times = torch.tensor([1.0, 0.9, 0.6, 0.5, 0.2], dtype=torch.float64)  # steps of 1 : 3 : 1 : 3
    x = torch.zeros(1, 1, dtype=torch.float64)
    *_, end = steps(lambda x, t: t.expand_as(x), x, times, TwoStep())
    # All but the first step, an Euler step, integrate dx/dt = t exactly.
    exact = (0.2**2 - 0.9**2) / 2 + 1.0 * (0.9 - 1.0)
    assert float(end) == pytest.approx(exact, abs=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_the_last_of_several_steps_is_an_euler_step(name: str) -> None:
    x, step = randn(random(1), 16, 2), 0.05
    before = integrate(MIXTURE, x, 0.2, step, name, step)
    torch.testing.assert_close(
        integrate(MIXTURE, x, 0.2, 0.0, name, step), MIXTURE.denoise(before, step), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("t_dst", [1e-5, 1e-7, 1e-10])
@pytest.mark.parametrize("name", PLANNED)
def test_float32_is_accurate_down_to_tiny_times(name: str, t_dst: float) -> None:
    x = torch.randn(16, 1, 2, generator=random(1))
    straight = ShortcutPolicy(torch.randn(16, 1, 2, generator=random(2)), 1.0)  # every method integrates it exactly
    exact = straight.x0 + t_dst * (x - straight.x0)
    torch.testing.assert_close(integrate(straight, x, 1.0, t_dst, name), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_stops_may_repeat_and_end_early(name: str) -> None:
    x, t_src = randn(random(1), 2, 2), torch.tensor([0.9, 0.8], dtype=torch.float64)
    stops = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    seen = visit(MIXTURE, x, t_src, stops, name, 1 / 64)
    assert torch.equal(seen[0, 1], seen[2, 1])
    assert torch.equal(seen[1], seen[2])
    middle = integrate(MIXTURE, x, t_src, stops[0], name, 1 / 64)
    torch.testing.assert_close(seen[0], middle, rtol=0, atol=1e-10)
    if solver(name) != SOLVERS["ab2"]:
        later = integrate(MIXTURE, middle[:1], 0.5, 0.0, name, 1 / 64)
        torch.testing.assert_close(seen[1, :1], later, rtol=0, atol=1e-4 if name == "dopri5" else 1e-10)


@pytest.mark.parametrize("method", [None, 42, "leapfrog"])
def test_what_is_not_a_method_is_refused(method: object) -> None:
    with pytest.raises(ValueError, match="the methods are"):
        integrate(MIXTURE, torch.zeros(1, 2), 1.0, 0.5, method)  # type: ignore[arg-type]
