"""The toy network and its training."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from mixtures import random

from pitools import Imitation, Schedule, imitation_loss, integrate, sample, unshift_time
from pitools.guidance import Conditioned
from pitools.objectives import pi_id
from pitools.objectives.pi_id import PiID
from pitools.policies import DXHead, GMHead, Head, PolynomialHead, ShortcutHead
from pitools.types import POINTS
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.network import ToyStudent
from toys.plots import student_path
from toys.targets import Target, load_target

HEADS: list[Head] = [GMHead(6), DXHead(4), PolynomialHead(3), ShortcutHead()]
SHORT = Training(4, 32, 1e-3, PiID(data_free=True, states=2, step_size=1 / 8, floor=1 / 8))


def student_for(target_name: str, head: Head, nfe: int = 2, seed: int = 0) -> ToyStudent:
    target = load_target(target_name)
    return ToyStudent(
        head,
        Schedule(nfe=nfe, shift=target.shift),
        target.factorisation,
        target.shape,
        classes=target.classes,
        width=32,
        scale=target.scale,
        generator=random(seed),
    )


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
@pytest.mark.parametrize("name", ["ring8", "digits"])
def test_a_student_answers_trains_and_samples(name: str, head: Head) -> None:
    target = load_target(name)
    student = student_for(name, head)
    losses: list[float] = []
    before = student.outlet.weight.detach().clone()
    ema = distill(student, target, [1, 2], SHORT, seed=0, on_step=lambda step, loss: losses.append(loss)).ema
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert not torch.equal(student.outlet.weight, before)
    ema.copy_to(student)
    noise = torch.randn(20, *target.shape, generator=random(1))
    conditions = target.labels(20, noise.device)
    x = sample(student, noise, 2, conditions)
    assert x.shape == noise.shape
    assert torch.isfinite(x).all()
    with torch.no_grad():
        states, looks = student_path(student, noise, 2, conditions)
    assert len(looks) == 2
    assert torch.equal(states[0], noise)
    torch.testing.assert_close(states[-1], x, rtol=0, atol=1e-5)


def test_training_is_a_function_of_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        student = student_for("ring8", GMHead(4))
        return distill(student, load_target("ring8"), [1, 2], SHORT, seed).ema.averages["outlet.weight"]

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_student_that_copies_its_input_needs_no_weights() -> None:
    student = ToyStudent(ShortcutHead(), Schedule(nfe=1), POINTS, (2,))
    with torch.no_grad():
        student.outlet.weight.zero_()
    x = torch.randn(5, 2, generator=random(0))
    policy = student(x, torch.full((5,), 0.5))
    torch.testing.assert_close(policy.velocity(x[:, None], 0.5), x[:, None] / 0.5)  # x̂ = 0


def test_training_stops_when_asked_and_at_a_loss_that_is_not_finite() -> None:
    target, student = load_target("ring8"), student_for("ring8", GMHead(4))
    seen: list[int] = []
    ema = distill(student, target, [1], SHORT, 0, lambda step, loss: seen.append(step), lambda: len(seen) == 2).ema
    assert seen == [1, 2]
    assert ema.steps == 2
    with torch.no_grad():
        student.outlet.weight[0, 0] = math.nan
    with pytest.raises((RuntimeError, ValueError), match=r"loss|NaN"):
        distill(student, target, [1], SHORT, 0)


def test_evaluation_of_the_teacher_against_itself_and_of_a_bad_student() -> None:
    target = load_target("ring8")
    evaluation = Evaluation.prepare(target, 500, torch.device("cpu"))
    schedule = Schedule(nfe=2)
    teacher = evaluation.teacher(schedule, 2)
    own = evaluation.metrics(teacher, teacher)
    assert (own["same_mode"], own["endpoint_rmse"], own["modes_covered"]) == (1.0, 0.0, 8)
    assert evaluation.teacher(schedule, 4) is teacher  # the same grid of 128 substeps
    assert evaluation.teacher(schedule, 3) is not teacher
    noise = evaluation.metrics(evaluation.noise, teacher)
    assert noise["off_mode"] > 0.5
    assert noise["endpoint_rmse"] > 0.5
    assert noise["energy_distance"] > own["energy_distance"]


def test_the_teacher_walks_the_students_grid() -> None:
    target = load_target("ring8")
    evaluation = Evaluation.prepare(target, 10, torch.device("cpu"))
    field = Conditioned(target, evaluation.conditions)
    expected = integrate(field, evaluation.noise, 1.0, 0.0, shift=4.0)
    torch.testing.assert_close(evaluation.teacher(Schedule(nfe=2, shift=4.0), 2), expected, rtol=0, atol=1e-4)
    assert (evaluation.teacher(Schedule(nfe=2), 2) - expected).abs().max() > 1e-4
    assert evaluation.teacher_steps(Schedule(), 4) == 128
    assert evaluation.teacher_steps(Schedule(), 3) == 129


def test_class_accuracy_is_of_the_nearest_digit() -> None:
    target = load_target("digits")
    evaluation = Evaluation.prepare(target, 40, torch.device("cpu"))
    assert evaluation.metrics(evaluation.data, evaluation.data)["class_accuracy"] == 1.0
    moved = evaluation.data.roll(1, dims=0)  # every image under its neighbour's class
    assert evaluation.metrics(moved, evaluation.data)["class_accuracy"] == 0.0


def test_training_is_algorithm_3(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[torch.Tensor, float, float, Imitation]] = []

    def spy(*args: Any, **kwargs: Any) -> Imitation:
        result = imitation_loss(*args, **kwargs)
        _, _, x_src, t_src, t_dst = args
        calls.append((x_src, t_src, t_dst, result))
        return result

    monkeypatch.setattr(pi_id, "imitation_loss", spy)
    student, losses = student_for("digits", GMHead(4), nfe=3), []
    one_step = replace(SHORT, steps=1)
    distill(student, load_target("digits"), [3], one_step, seed=0, on_step=lambda step, loss: losses.append(loss))
    assert len(calls) == 3
    raw = [(unshift_time(t_src, 4.0), unshift_time(t_dst, 4.0)) for _, t_src, t_dst, _ in calls]
    assert raw == [pytest.approx(pair) for pair in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0))]
    for (_, _, _, before), (x_src, _, _, _) in pairwise(calls):
        assert x_src is before.x_dst  # each segment starts where the one before it ended
    weighted = sum(
        (a - b) * float(result.loss.detach().mean()) for (a, b), (_, _, _, result) in zip(raw, calls, strict=True)
    )
    assert losses[0] == pytest.approx(weighted, rel=1e-5)


def test_training_from_data_reads_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = load_target("ring8"), []
    draw = type(target).sample

    def spy(self: Target, *args: Any) -> torch.Tensor:
        seen.append(draw(self, *args))
        return seen[-1]

    monkeypatch.setattr(Target, "sample", spy)
    free = SHORT.objective
    for objective, steps in ((replace(free, data_free=False), 4), (free, 0)):
        seen.clear()
        student = student_for("ring8", GMHead(4), nfe=2)
        outcome = distill(student, target, [2], replace(SHORT, objective=objective), seed=0)
        assert len(seen) == steps
        # One segment for each data point, all of them for each noise; two states of each.
        assert outcome.teacher_calls == 4 * 32 * 2 * (2 if objective.data_free else 1)
