"""FreeFlow's identities: at exact flow maps and exact noising velocities its losses vanish, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from mixtures import rand, randn, random
from scipy.stats import kstest
from torch import Tensor

from pitools import GaussianMixture
from pitools.objectives.flow_map import (
    Prediction,
    Times,
    balance,
    correct,
    noised,
    noising_loss,
    predict,
)
from pitools.types import Conditions, Time

TEACHER = GaussianMixture(randn(random(0), 4, 2), randn(random(1), 4), 0.05 + 0.2 * rand(random(2), 4))
Z = randn(random(3), 64, 2)
DELTA = torch.cat([torch.zeros(1), torch.linspace(0.05, 0.98, 63)]).double()


class Exact:
    """The flow map of TEACHER by Runge-Kutta steps, even between 1 and 1 - δ, and differentiable in δ."""

    def __init__(self, steps: int = 200) -> None:
        self.steps = steps

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        x, h = noise, delta[:, None] / self.steps
        total = torch.zeros_like(noise)  # of the velocities, so that F at δ = 0 is no 0/0
        for i in range(self.steps):
            t, middle, end = (1 - delta * (i + part) / self.steps for part in (0.0, 0.5, 1.0))
            a = field(x, t)
            b = field(x - h / 2 * a, middle)
            c = field(x - h / 2 * b, middle)
            d = field(x - h * c, end)
            mean = (a + 2 * b + 2 * c + d) / 6
            x, total = x - h * mean, total + mean
        return total / self.steps


def field(x: Tensor, t: Tensor) -> Tensor:
    """TEACHER's velocity, by the formula."""
    s, r = (1 - t)[:, None, None], t[:, None, None]
    spread = s**2 * TEACHER.variance[:, None] + r**2
    logits = TEACHER.log_weights - (
        (x[:, None] - s * TEACHER.means).square().sum(2) / (2 * spread[..., 0]) + spread[..., 0].log()
    )
    x_0 = TEACHER.means + s * TEACHER.variance[:, None] / spread * (x[:, None] - s * TEACHER.means)
    noise = r / spread * (x[:, None] - s * TEACHER.means)
    return (torch.softmax(logits, 1)[..., None] * (noise - x_0)).sum(1)


@dataclass
class Bent:
    """A flow map and a term that no field has, with a parameter."""

    amount: Tensor
    exact: Exact

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        return self.exact(noise, delta) + self.amount * (3 * delta[:, None]).sin() * noise.flip(1)


def bent(amount: float, steps: int = 200) -> Bent:
    return Bent(torch.tensor(amount, dtype=torch.float64, requires_grad=True), Exact(steps))


def test_the_field_of_this_file_is_the_teacher_s() -> None:
    t = 0.05 + 0.95 * rand(random(4), 64)
    torch.testing.assert_close(field(Z, t), TEACHER.velocity(Z, t), rtol=1e-9, atol=1e-9)


def test_at_the_exact_flow_map_the_continuous_loss_and_its_gradient_vanish() -> None:
    exact, other = bent(0.0), bent(0.1)
    found, off = (predict(f, TEACHER, Z, Prediction(steps=0, power=0.0), delta=DELTA) for f in (exact, other))
    assert float(found.loss.max()) < 1e-12
    (gradient,) = torch.autograd.grad(found.loss.mean(), exact.amount)
    assert abs(float(gradient)) < 1e-7
    assert float(off.loss[1:].min()) > 1e-7
    assert abs(float(torch.autograd.grad(off.loss.mean(), other.amount)[0])) > 1e-3


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_the_discrete_loss_vanishes_as_steps_grow(solver: str, order: int) -> None:
    delta = 0.9 * DELTA
    sizes = []
    for steps in (64, 128):
        prediction = Prediction(steps=steps, solver=solver, power=0.0)  # type: ignore[arg-type]
        sizes.append(float(predict(Exact(), TEACHER, Z, prediction, delta=delta).error.square().mean().sqrt()))
    assert sizes[1] < 0.6 * sizes[0] if order == 1 else sizes[1] < 0.35 * sizes[0]
    assert sizes[1] < 0.2


def test_the_forward_mode_derivative_is_that_of_differences() -> None:
    f, small = bent(0.3), 1e-5
    found = predict(f, TEACHER, Z, Prediction(steps=0, power=0.0), delta=0.5 + 0 * DELTA)
    half = torch.full((64,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        x = Z - 0.5 * f(Z, half)
        ends = [Z - d[:, None] * f(Z, d) for d in (half - small, half + small)]
        expected = (ends[0] - ends[1]) / (2 * small) - TEACHER.velocity(x, half)
    torch.testing.assert_close(found.difference, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_difference_times_that_of_the_mean_velocity() -> None:
    f, prediction = bent(0.3), Prediction(steps=0, power=1.0)
    found = predict(f, TEACHER, Z, prediction, delta=DELTA)
    plain = predict(f, TEACHER, Z, replace(prediction, power=0.0), delta=DELTA)
    weights = 1 / (plain.difference.square().mean(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(found.difference, weights * plain.difference, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.error, plain.difference.square().mean(1).sqrt(), rtol=1e-9, atol=1e-12)
    slope = (3 * DELTA[:, None]).sin() * Z.flip(1)
    (gradient,) = torch.autograd.grad(found.loss.sum(), f.amount)
    torch.testing.assert_close(gradient, (found.difference * slope).sum() / 2, rtol=1e-9, atol=1e-9)


def test_euler_s_end_point_is_where_the_discrete_loss_is_zero() -> None:
    """On one Gaussian each Euler step is linear: the map through the points of Euler's method has no loss."""
    prior, steps = GaussianMixture(torch.tensor([[0.5, -1.0]]).double(), torch.zeros(1).double(), 0.3), 8
    x, points = Z, [Z]
    for i in range(steps):
        x = x - prior.velocity(x, 1 - i / steps) / steps
        points.append(x)

    def euler(noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        index = (delta * steps).round().long()
        reached = torch.stack(points)[index, torch.arange(64)]
        return torch.where(index[:, None] > 0, (noise - reached) / delta[:, None], 0.0)

    for i in range(steps):
        delta = torch.full((64,), (i + 0.4) / steps, dtype=torch.float64)
        found = predict(euler, prior, Z, Prediction(steps=steps, solver="euler", power=0.0), delta=delta)
        assert float(found.loss.max()) < 1e-25
        other = predict(euler, prior, Z, Prediction(steps=steps, solver="heun", power=0.0), delta=delta)
        assert float(other.loss.max()) > 1e-6 or i == steps - 1


@dataclass
class Shifted:
    """The one-step student of a Gaussian: f(z, 1) = a z + b, whose samples are N(b, a²)."""

    scale: float
    shift: float

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        return noise - (self.scale * noise + self.shift)

    @property
    def noising(self) -> GaussianMixture:
        """The prior whose marginal velocity is that of its noised samples."""
        return GaussianMixture(torch.full((1, 2), self.shift).double(), torch.zeros(1).double(), self.scale**2)


def test_the_correction_vanishes_at_every_point_where_distributions_agree_and_nowhere_else() -> None:
    prior = GaussianMixture(torch.full((1, 2), 0.4).double(), torch.zeros(1).double(), 0.25)
    law = Times(0.8, 1.6)
    for sign in (0.5, -0.5):  # also where each noise goes elsewhere
        same = Shifted(sign, 0.4)
        assert float(correct(same, same.noising, prior, Z, law, randomness=random(5)).error.max()) < 1e-12
    for other in (Shifted(0.6, 0.4), Shifted(0.5, 0.3)):
        assert float(correct(other, other.noising, prior, Z, law, randomness=random(5)).error.min()) > 1e-6


def test_the_auxiliary_loss_is_least_at_the_noising_velocity() -> None:
    student, law = Shifted(0.5, 0.4), Times(0.0, 1.0)
    noise = randn(random(6), 40_000, 2)

    class Off:
        def __init__(self, drift: float) -> None:
            self.drift = drift

        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            return student.noising.velocity(x_t, t) + self.drift

    least, above, below = (
        float(noising_loss(Off(d), student, noise, law, randomness=random(7)).mean()) for d in (0.0, 0.1, -0.1)
    )
    assert above > least + 0.004
    assert below > least + 0.004


def test_noise_up_to_a_level_gives_the_marginal_of_that_level() -> None:
    x_0, n = torch.tensor(0.7).double(), randn(random(8), 20_000, 1)
    t, t_c = torch.full((20_000,), 0.3).double(), torch.full((20_000,), 0.6).double()
    x_t = (1 - t[:, None]) * x_0 + t[:, None] * n
    up = noised(x_t, t, t_c, randn(random(9), 20_000, 1))
    assert kstest(((up - 0.4 * x_0) / 0.6).flatten().numpy(), "norm").pvalue > 0.01
    assert torch.equal(noised(x_t, t_c, t, n), x_t)


def test_the_warm_up_asks_about_noisier_states_and_leaves_the_others_alone() -> None:
    """At t_c = 0.6, of jumps that start at t = 1, 0.75, 0.5 and 0.25."""
    prior = GaussianMixture(torch.tensor([[0.5, -0.5]]).double(), torch.zeros(1).double(), 0.3)
    noise, delta = randn(random(20), 4, 2), torch.tensor([0.0, 0.25, 0.5, 0.75]).double()
    asked: list[Tensor] = []

    class Teacher:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            assert isinstance(t, Tensor)
            asked.append(t)
            return prior.velocity(x_t, t)

    def flow_map(z: Tensor, d: Tensor, conditions: Conditions | None = None) -> Tensor:
        return z.sin() + d[:, None]

    by_heun, by_euler = (Prediction(steps=4, solver=solver, power=0.0, warmup=0) for solver in ("heun", "euler"))
    found = predict(flow_map, Teacher(), noise, by_heun, confident=0.6, randomness=random(21), delta=delta)
    plain = predict(flow_map, prior, noise, by_euler, delta=delta)
    torch.testing.assert_close(found.difference[:2], plain.difference[:2])
    assert [times.tolist() for times in asked] == [[1.0, 0.75, 0.6, 0.6]]
    x, end = (noise - d[:, None] * flow_map(noise, d) for d in (delta, delta + 0.25))
    up = noised(x, 1 - delta, torch.full((4,), 0.6).double(), randn(random(21), 4, 2))
    expected = (x - end) / 0.25 - prior.velocity(up, torch.full((4,), 0.6).double())
    torch.testing.assert_close(found.difference[2:], expected[2:])


def test_times_are_logistic_normal_and_now_and_then_0() -> None:
    drawn = Times(0.8, 1.6, 0.25).draw(20_000, random(10), like=torch.zeros(1).double())
    assert abs(float((drawn == 0).double().mean()) - 0.25) < 0.01
    inside = drawn[drawn > 0]
    assert kstest((torch.logit(inside) / 1.6 - 0.5).numpy(), "norm").pvalue > 0.01
    assert float(drawn.max()) < 1


def test_the_balance_is_the_formula() -> None:
    predicted, corrected = randn(random(11), 30, 2), 0.1 * randn(random(12), 10, 2)
    sizes = [value.square().mean(1).sqrt().mean() for value in (predicted, corrected)]
    torch.testing.assert_close(balance(0.3, predicted, corrected), 0.3 * sizes[0] / (sizes[1] + 1e-6))
    assert math.isfinite(float(balance(0.3, predicted, 0 * corrected)))
