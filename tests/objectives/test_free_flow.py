"""FreeFlow's step: the schedule of α, the split, the balance of the two gradients, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given as for_all
from hypothesis import strategies as st
from mixtures import randn, random
from torch import Tensor

from pitools import GaussianMixture
from pitools.objectives.flow_map import Prediction, Times, balance, correct, noising_loss, predict
from pitools.objectives.free_flow import FreeFlow, auxiliary_loss, free_flow_loss
from pitools.types import Conditions, Time

PRIOR = GaussianMixture(torch.tensor([[0.5, -0.5]]).double(), torch.zeros(1).double(), 0.3)
OBJECTIVE = FreeFlow(Prediction(steps=0, power=0.5, warmup=0), delay=0, correction_warmup=0)
NOISE = randn(random(0), 32, 2)


@dataclass
class Linear:
    """F = a z + b δ, with its parameters; and as a field, the same at 1 - t."""

    a: Tensor
    b: Tensor

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        self.conditions = conditions
        return self.a * noise + self.b * delta[:, None]

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        return self(x_t, 1 - t, conditions)


@dataclass
class Teacher:
    """PRIOR's velocity; it remembers how many samples it was asked about."""

    asked: int = 0

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        self.asked += len(x_t)
        return PRIOR.velocity(x_t, t)


TEACHER = Teacher()


def linear(a: float = 0.7, b: float = 0.2) -> Linear:
    return Linear(*(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (a, b)))


def test_alpha_follows_its_schedule() -> None:
    published = FreeFlow(alpha=0.6, decay=25_000)
    steps = (0, 9_999, 10_000, 15_000, 20_000, 25_000, 100_000)
    assert [published.alpha_at(step) for step in steps] == pytest.approx([0, 0, 0, 0.3, 0.6, 0.6, 0.3])
    assert FreeFlow(alpha=0.3).alpha_at(10**7) == 0.3
    assert replace(published, delay=0, correction_warmup=0).alpha_at(0) == 0.6


def test_confidence_falls_along_a_line() -> None:
    warmed = FreeFlow(Prediction(warmup=10))
    assert [warmed.confident_at(step) for step in (0, 4, 10, 50)] == pytest.approx([1.0, 0.6, 0.0, 0.0])
    assert OBJECTIVE.confident_at(0) == 0


def test_the_gradient_is_that_of_both_parts_with_their_balance() -> None:
    student, auxiliary = linear(), linear(0.4, 0.1)
    found = free_flow_loss(OBJECTIVE, student, auxiliary, TEACHER, NOISE, 0, None, random(1))
    its = torch.autograd.grad(found.loss, [student.a, student.b])
    # The same draws, in the same order.
    g = random(1)
    predicting, correcting = OBJECTIVE.split(range(32))
    first = predict(student, TEACHER, NOISE[predicting], OBJECTIVE.prediction, randomness=g)
    second = correct(student, auxiliary, TEACHER, NOISE[correcting], OBJECTIVE.r, randomness=g)
    weight = balance(0.3, first.difference, second.difference)
    expected = torch.autograd.grad((first.loss.sum() + weight * second.loss.sum()) / 32, [student.a, student.b])
    torch.testing.assert_close(its, expected)
    assert float(found.predicted) == pytest.approx(float(first.error.square().mean() / 2))
    assert float(found.corrected) == pytest.approx(float(second.error.square().mean() / 2))
    # Half a mean over two elements: the parts' sizes are as 0.3 to 1, before 24 samples meet 8.
    sizes = [value.square().mean(1).sqrt().mean() for value in (first.difference, weight * second.difference)]
    assert float(sizes[1] / sizes[0]) == pytest.approx(0.3, rel=1e-4)


def test_each_network_has_a_loss_of_its_own() -> None:
    student, auxiliary = linear(), linear(0.4, 0.1)
    loss = free_flow_loss(OBJECTIVE, student, auxiliary, TEACHER, NOISE, 0, None, random(1)).loss
    own = auxiliary_loss(OBJECTIVE, auxiliary, student, NOISE, None, random(1))
    assert torch.autograd.grad(loss, auxiliary.a, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(own, student.a, allow_unused=True, retain_graph=True)[0] is None
    _, correcting = OBJECTIVE.split(range(32))
    expected = noising_loss(auxiliary, student, NOISE[correcting], OBJECTIVE.r, randomness=random(1)).mean()
    torch.testing.assert_close(own, expected)
    assert float(torch.autograd.grad(own, auxiliary.a)[0]) != 0


def test_the_auxiliary_network_learns_before_it_corrects() -> None:
    late = replace(OBJECTIVE, delay=10)
    found = free_flow_loss(late, linear(), linear(), TEACHER, NOISE, 5, None, random(1))
    assert bool(found.corrected.isnan())  # not asked
    assert bool(found.loss.isfinite())


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_one_part_alone(share: float) -> None:
    teacher = Teacher()
    alone = replace(OBJECTIVE, share=share)
    found = free_flow_loss(alone, linear(), None if share else linear(), teacher, NOISE, 0, None, random(1))
    assert teacher.asked == 32
    assert bool(found.predicted.isnan()) == (share == 0)
    assert bool(found.corrected.isnan()) == (share == 1)
    if not share:
        with pytest.raises(ValueError, match="auxiliary network"):
            free_flow_loss(alone, linear(), None, TEACHER, NOISE, 0)


@for_all(st.floats(0, 1), st.integers(0, 50), st.integers(1, 40))
def test_a_row_has_its_part_wherever_the_batch_is_cut(share: float, start: int, count: int) -> None:
    objective = replace(OBJECTIVE, share=share)
    predicting, correcting = objective.split(range(start, start + count))
    assert sorted(predicting + correcting) == list(range(count))
    assert abs(len(predicting) - share * count) < 1 + 1e-6
    whole, _ = objective.split(range(start + count))
    assert [start + row for row in predicting] == [row for row in whole if row >= start]


def test_the_loss_does_not_depend_on_how_the_batch_is_cut() -> None:
    """As on two processes: each has half of the rows, and all agree on λ."""
    student, auxiliary = linear(), linear(0.4, 0.1)
    keys = [random(100 + row) for row in range(32)]
    at_once = free_flow_loss(OBJECTIVE, student, auxiliary, TEACHER, NOISE, 0, None, keys)
    whole = torch.stack([at_once.loss, at_once.predicted, at_once.corrected])

    sums: list[Tensor] = []

    def half(rows: range, mean: Callable[[Tensor], Tensor]) -> Tensor:
        mine = [random(100 + row) for row in rows]
        part = slice(rows.start, rows.stop)
        found = free_flow_loss(OBJECTIVE, student, auxiliary, TEACHER, NOISE[part], 0, None, mine, rows=rows, mean=mean)
        return torch.stack([found.loss, found.predicted, found.corrected])

    halves = (range(13), range(13, 32))  # uneven
    for rows in halves:
        half(rows, lambda own: (sums.append(own), own)[1])
    together = torch.stack(sums).mean(0)
    parts = [half(rows, lambda own: together) * len(rows) for rows in halves]
    torch.testing.assert_close(sum(parts) / 32, whole, rtol=1e-12, atol=0)
    apart = [half(rows, lambda own: own) * len(rows) for rows in halves]
    assert not torch.allclose(sum(apart)[0] / 32, whole[0], rtol=1e-6)  # type: ignore[index]


def test_guidance_strengths_are_drawn_and_reach_every_network() -> None:
    student, auxiliary = linear(), linear()
    guided = replace(OBJECTIVE, guidance=(1.0, 2.0))
    labels = torch.arange(32)
    given = {"class_labels": labels}
    _, correcting = guided.split(range(32))
    for loss in (
        lambda: free_flow_loss(guided, student, auxiliary, TEACHER, NOISE, 0, given, random(1)).loss,
        lambda: auxiliary_loss(guided, auxiliary, student, NOISE, given, random(1)),
    ):
        loss()
        strengths = student.conditions["guidance"]  # type: ignore[index]
        assert len(strengths) == 8
        assert 1 <= float(strengths.min()) < float(strengths.max()) <= 2
        assert torch.equal(auxiliary.conditions["guidance"], strengths)  # type: ignore[index]
        assert torch.equal(student.conditions["class_labels"], labels[correcting])  # type: ignore[index]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: FreeFlow(share=1.5), "share"),
        (lambda: FreeFlow(alpha=-1.0), "alpha"),
        (lambda: FreeFlow(delay=-1), "delay"),
        (lambda: FreeFlow(guidance=(2.0, 1.0)), "guidance"),
        (lambda: FreeFlow(guided_until=1.5), "guided_until"),
        (lambda: Prediction(steps=-1), "steps"),
        (lambda: Prediction(solver="rk4"), "solver"),
        (lambda: Prediction(power=-0.5), "power"),
        (lambda: Times(at_zero=2.0), "at_zero"),
        (lambda: Times(std=-1.0), "std"),
    ],
)
def test_values_out_of_range_are_refused(wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()  # type: ignore[operator]
