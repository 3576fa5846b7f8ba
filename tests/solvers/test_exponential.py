"""The exponential multistep method: its order, its rows, and what it is for."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from mixtures import rand, randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, integrate, segments, shift_time
from pitools.solvers import Clock, Exponential, exponential_grid, exponential_rows, solve_exponential
from pitools.solvers.fixed import Field

MEAN, VARIANCE = torch.tensor([[0.7, -0.4]], dtype=torch.float64), 0.04
GAUSSIAN = GaussianMixture(MEAN, torch.zeros(1), VARIANCE)
MIXTURE = GaussianMixture(randn(random(0), 6, 2), torch.zeros(6), 0.1)
AUTO = Exponential()


def time(*t: float) -> Tensor:
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def solution(x: Tensor, t_from: float, t: float) -> Tensor:
    def width(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * VARIANCE + t**2)

    return (1 - t) * MEAN + width(t) / width(t_from) * (x - (1 - t_from) * MEAN)


def asked(field: Field, times: list[Tensor]) -> Field:
    def f(x: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return field(x, t)

    return f


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().mean().sqrt())


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order(order: int) -> None:
    x, counts = randn(random(1), 64, 2), (128, 256, 512)
    methods = [Exponential(n, order, step=1e-9) for n in counts]
    ends = [solve_exponential(GAUSSIAN.velocity, x, time(0.9), time(0.0), method, 0.5) for method in methods]
    slope = -np.polyfit(np.log(counts), np.log([error(end, solution(x, 0.9, 0.0)) for end in ends]), 1)[0]
    assert slope == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize(("order", "t_dst"), [(1, 0.1), (3, 0.1), (3, 0.0)])
def test_a_polynomial_in_w_is_met_exactly(order: int, t_dst: float) -> None:
    # Of a degree that the history reaches only after the first steps: those see the degree that they can.
    clock = Clock.of(time(0.8), 0.2)
    times = exponential_grid(clock, time(0.8), time(t_dst), AUTO)
    rows = exponential_rows(clock, times, order)
    assert torch.allclose(rows.move[:, 0], times[1:] / times[:-1])
    # D = 1 keeps the state 1, whatever the times.
    torch.testing.assert_close(rows.move.sum(1), torch.ones_like(rows.times))
    torch.testing.assert_close(rows.commit.sum(1), torch.ones_like(rows.times))
    # to ∫ w^p/τ² dτ, by the trapezium rule in 1/τ
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    w = clock.w(rows.times)
    for r in range(order - 1, len(rows.times)):
        t, to = rows.times[r], times[r + 1]
        if to == 0:
            continue
        power = order - 1
        exact = (1 - to / t) * torch.trapezoid(clock.w(1 / ((1 - u) / t + u / to)) ** power, u)
        seen = [w[r - j] ** power for j in range(order)]
        found = sum(number * value for number, value in zip(rows.move[r, 1:], seen, strict=False))
        assert float(found) == pytest.approx(float(exact), abs=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.3, 30.0])
def test_the_grid_is_even_in_w_and_meets_its_ends(scale: float) -> None:
    t_src, t_dst = time(1.0, 0.6, 0.5, 0.7, 1e-3), time(0.0, 0.1, 0.5, 0.69, 0.0)
    clock = Clock.of(t_src, scale)
    times = exponential_grid(clock, t_src, t_dst, AUTO)
    assert len(times) <= 17
    assert torch.equal(times[0], t_src)
    assert torch.equal(times[-1], t_dst)
    assert bool((times.diff(dim=0) <= 0).all())
    assert torch.equal(times[:, 2], torch.full_like(times[:, 2], 0.5))
    for spacing in clock.w(times).diff(dim=0).T:
        steps = spacing[spacing != 0]
        torch.testing.assert_close(steps, steps[:1].expand_as(steps))
    assert (times.diff(dim=0) != 0).sum(0).tolist()[2:4] == [0, 3]  # a short interval takes few


def test_fields_are_asked_inside_the_interval_only() -> None:
    x, times = randn(random(1), 4, 2), list[Tensor]()
    t_src, t_dst = time(1.0, 0.9, 0.5, 1e-3), time(0.0, 0.2, 0.5, 0.0)
    end = solve_exponential(asked(MIXTURE.velocity, times), x, t_src, t_dst, AUTO)
    assert torch.isfinite(end).all()
    assert torch.equal(end[2], x[2])
    assert len(times) <= AUTO.evaluations
    assert all(bool(((t > 0) & (t <= t_src)).all()) for t in times)


def test_no_step_at_all() -> None:
    x = randn(random(1), 4, 2)
    assert torch.equal(solve_exponential(MIXTURE.velocity, x, time(0.5), time(0.5), AUTO), x)


def test_each_sample_with_its_own_times_equals_each_alone() -> None:
    x, scale = randn(random(3), 6, 2), time(0.1, 0.2, 0.3, 0.05, 0.0, 0.1)
    t_src, t_dst = time(1.0, 0.9, 0.5, 0.3, 0.3, 1.0), time(0.0, 0.2, 0.5, 0.0, 0.29, 0.99)
    together = solve_exponential(MIXTURE.velocity, x, t_src, t_dst, AUTO, scale)
    alone = [
        solve_exponential(MIXTURE.velocity, x[i : i + 1], t_src[i], t_dst[i], AUTO, float(scale[i])) for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("t_dst", [1e-2, 1e-5, 1e-10])
def test_tiny_times(t_dst: float) -> None:
    x = randn(random(1), 16, 2)
    end = solve_exponential(GAUSSIAN.velocity, x, time(1.0), time(t_dst), AUTO, 0.2)
    torch.testing.assert_close(end, solution(x, 1.0, t_dst), rtol=0, atol=1e-2)
    short = solve_exponential(GAUSSIAN.velocity, x, time(t_dst), time(0.0), AUTO, 0.2)
    torch.testing.assert_close(short, solution(x, t_dst, 0.0), rtol=0, atol=0.1 * t_dst)


@pytest.mark.parametrize("variance", [0.0, 0.05])
def test_float32(variance: float) -> None:
    mixture = GaussianMixture(MIXTURE.means.float(), torch.zeros(6), variance)
    x, scale = torch.randn(50, 2, generator=random(2)), math.sqrt(variance)
    end = solve_exponential(mixture.velocity, x, torch.tensor(1.0), torch.tensor(0.0), AUTO, scale)
    assert end.dtype == torch.float32
    wide = GaussianMixture(MIXTURE.means.float().double(), torch.zeros(6), variance)
    exact = solve_exponential(wide.velocity, x.double(), time(1.0), time(0.0), AUTO, scale)
    torch.testing.assert_close(end.double(), exact, rtol=0, atol=1e-4)


def test_gradients_flow() -> None:
    x, few = randn(random(1), 3, 2).requires_grad_(), Exponential(4)
    t_src, t_dst = time(0.9, 0.8, 0.7), time(0.0, 0.3, 0.7)
    assert torch.autograd.gradcheck(lambda x: solve_exponential(MIXTURE.velocity, x, t_src, t_dst, few), (x,))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"evaluations": 0}, "evaluations"),
        ({"order": 4}, "order"),
        ({"step": 0.0}, "step"),
        ({"step": math.nan}, "step"),
    ],
)
def test_errors(arguments: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Exponential(**arguments)  # type: ignore[arg-type]


# The ends of the intervals that a student of 1, 2 or 4 evaluations sees, at shift 3.2.
INTERVALS = [
    (shift_time(a, 3.2), shift_time(b, 3.2))
    for ends in (segments(1), segments(2), segments(4, 0.5))
    for a, b in pairwise(ends)
]


def student(spread: float, std: float, t_src: float, factors: int = 512) -> tuple[GMPolicy, Tensor]:
    """A policy as seen from states on its path, and those states `[1, L, C]`."""
    g, K, C = random(5), 8, 16
    means = randn(g, factors, 1, C) + spread * randn(g, factors, K, C)
    mixture = GaussianMixture(means, randn(g, factors, K), std**2)
    x = (1 - t_src) * mixture.sample(generator=g) + t_src * randn(g, factors, C)
    mixture = GaussianMixture(means.unsqueeze(0), mixture.log_weights.unsqueeze(0), std**2)
    return GMPolicy(mixture, x.unsqueeze(0), t_src), x.unsqueeze(0)


@pytest.mark.parametrize(("t_src", "t_dst"), INTERVALS)
@pytest.mark.parametrize(("spread", "std"), [(0.3, 0.2), (0.5, 0.1)])
def test_sixteen_evaluations_are_as_good_as_128_euler_substeps(
    spread: float, std: float, t_src: float, t_dst: float
) -> None:
    policy, x = student(spread, std, t_src)
    end = solve_exponential(policy.velocity, x, time(t_src), time(t_dst), AUTO, std)
    euler = integrate(policy, x, t_src, t_dst, "euler", (t_src - t_dst) / 128)
    fine = solve_exponential(policy.velocity, x, time(t_src), time(t_dst), Exponential(160, step=1e-9), std)
    assert error(end, fine) < error(euler, fine)


def test_the_samples_of_a_batch_may_stand_still_at_any_time() -> None:
    g = random(4)
    x, t_src = randn(g, 20, 2), 0.1 + 0.9 * rand(g, 20)
    t_dst = torch.where(rand(g, 20) < 0.5, t_src, t_src * rand(g, 20))
    end = solve_exponential(MIXTURE.velocity, x, t_src, t_dst, AUTO)
    still = t_src == t_dst
    assert torch.equal(end[still], x[still])
    fine = solve_exponential(MIXTURE.velocity, x, t_src, t_dst, Exponential(200, step=1e-3))
    torch.testing.assert_close(end, fine, rtol=0, atol=2e-2)
