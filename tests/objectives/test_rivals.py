"""The rivals' identities: at the exact flow map of a Gaussian they vanish, exactly or as their steps grow."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from mixtures import rand, randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy
from pitools.objectives.rivals import (
    TwoTimes,
    cloning_loss,
    consistency_loss,
    jump,
    mean_flow_loss,
    progressive_loss,
    regression_loss,
    teacher_path,
)
from pitools.types import POINTS, Conditions

MEAN, VARIANCE = torch.tensor([0.6, -0.2]).double(), 0.2
TEACHER = GaussianMixture(MEAN[None], torch.zeros(1).double(), VARIANCE)
X = randn(random(0), 200, 2)
T = 0.2 + 0.8 * rand(random(1), 200)
S = T * rand(random(2), 200)


@dataclass
class Exact:
    """x_s = (1 - s) m + σ(s)/σ(t) (x_t - (1 - t) m), σ² = (1 - t)² v + t²; and a share of x that is wrong."""

    wrong: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        spread = [((1 - time) ** 2 * VARIANCE + time**2).sqrt() for time in (s, t)]
        x_s = (1 - s)[:, None] * MEAN + (spread[0] / spread[1])[:, None] * (x_t - (1 - t)[:, None] * MEAN)
        gap = torch.where(t > s, t - s, 1.0)[:, None]
        mean = torch.where((t > s)[:, None], (x_t - x_s) / gap, TEACHER.velocity(x_t, t) if bool((t == s).all()) else 0)
        return mean + self.wrong * x_t.flip(1) * (1 + s)[:, None]


def flow_map(wrong: float = 0.0) -> Exact:
    return Exact(torch.tensor(wrong, dtype=torch.float64, requires_grad=True))


def slope(loss: Tensor, student: Exact) -> float:
    return float(torch.autograd.grad(loss.mean(), student.wrong)[0])


def test_the_map_of_this_file_is_the_teacher_s() -> None:
    times = torch.linspace(1, 0.1, 2000).double()[:, None].expand(-1, 200)
    states, slopes = teacher_path(TEACHER, X, times)
    assert states.shape == (2000, 200, 2)
    assert slopes.shape == (1999, 200, 2)
    torch.testing.assert_close(jump(flow_map(), X, times[0], times[-1]), states[-1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_mean_flow(wrong: float) -> None:
    student = flow_map(wrong)
    loss = mean_flow_loss(student, TEACHER, X, T, S)
    assert loss.shape == (200,)
    assert (float(loss.detach().max()) < 1e-20) == (wrong == 0)
    assert (abs(slope(loss, student)) < 1e-9) == (wrong == 0)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_progressive(wrong: float) -> None:
    student = flow_map(wrong)
    loss = progressive_loss(student, flow_map(), X, T, S)
    assert (float(loss.detach().max()) < 1e-20) == (wrong == 0)
    assert (abs(slope(loss, student)) < 1e-9) == (wrong == 0)


def test_progressive_s_first_stage_is_two_euler_steps() -> None:
    def euler(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return TEACHER.velocity(x_t, t)

    times = torch.stack([T, (T + S) / 2, S])
    states, _ = teacher_path(TEACHER, X, times)

    def two(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return (X - states[-1]) / (T - S)[:, None]

    assert float(progressive_loss(two, euler, X, T, S).max()) < 1e-20


def test_consistency_vanishes_as_steps_shrink_and_a_step_to_0_is_the_target() -> None:
    sizes = [
        float(consistency_loss(flow_map(), flow_map(), TEACHER, X, T, T * (1 - h)).detach().mean()) for h in (0.1, 0.05)
    ]
    assert sizes[1] < sizes[0] / 10  # the error of one Euler step, squared, is of fourth order
    assert float(consistency_loss(flow_map(0.1), flow_map(), TEACHER, X, T, T * 0.99).detach().min()) > 1e-6
    last = consistency_loss(flow_map(), lambda x_t, *_: 0 * x_t, TEACHER, X, T, torch.zeros_like(T))
    expected = (jump(flow_map(), X, T, 0 * T) - (X - T[:, None] * TEACHER.velocity(X, T))).square().mean(1) / 2
    torch.testing.assert_close(last, expected)


def test_regression_vanishes_as_the_teacher_s_steps_grow() -> None:
    sizes = [float(regression_loss(flow_map(), TEACHER, X, steps).detach().mean()) for steps in (64, 128)]
    assert sizes[1] < sizes[0] / 3
    assert float(regression_loss(flow_map(0.1), TEACHER, X, 128).detach().mean()) > 10 * sizes[1]


def test_cloning_vanishes_for_the_teacher_s_own_policy() -> None:
    def policy(shift: float) -> GMPolicy:
        prior = GaussianMixture((MEAN + shift).expand(200, 1, 1, 2), torch.zeros(200, 1, 1).double(), VARIANCE)
        return GMPolicy(prior, X[:, None], 1.0)

    times = torch.linspace(1, 0, 9).double()[:, None].expand(-1, 200)
    path = teacher_path(TEACHER, X, times)
    assert float(cloning_loss(policy(0.0), *path, times, POINTS).max()) < 1e-20
    assert float(cloning_loss(policy(0.3), *path, times, POINTS).min()) > 1e-4


def test_nothing_but_the_student_has_a_graph() -> None:
    before = flow_map(0.05)
    for loss in (
        consistency_loss(flow_map(), before, TEACHER, X, T, T / 2),
        progressive_loss(flow_map(), before, X, T, S),
    ):
        assert torch.autograd.grad(loss.mean(), before.wrong, allow_unused=True)[0] is None


def protocols(given: Exact) -> TwoTimes:
    return given
