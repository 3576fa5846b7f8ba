"""π-ID for the toys (paper, Algorithms 2 and 3): roll the student's own policies, segment by segment, and match the
exact teacher along the way. Cloning is the same along the teacher's own path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

from pitools.objectives.pi_id import PiID, segment_losses
from pitools.objectives.rivals import cloning_loss, teacher_path
from pitools.path import segments, shift_time
from pitools.training import keyed_generator
from pitools.types import Conditions, Factorisation, Policy, Schedule, Time
from toys.network import ToyStudent
from toys.targets import Target
from toys.training import Counted, Learner, Outcome


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one student.

    steps: optimiser steps.  batch: noises, or data points, a step.  learning_rate: Adam's, warmed up over 50 steps and
    brought to 0 along a cosine.  objective: of π-ID.  clone: whether policies are matched along the teacher's path, in
    the objective's substeps from noise, and not along their own.  ema_gamma: Karras's γ.  clip: the largest gradient
    norm.
    """

    steps: int
    batch: int
    learning_rate: float
    objective: PiID = field(default_factory=lambda: PiID(data_free=True))
    clone: bool = False
    ema_gamma: float = 7.0
    clip: float = 10.0


def distill(
    student: ToyStudent,
    target: Target,
    nfes: Sequence[int],
    training: Training,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train `student` in place for schedules of `nfes` steps, in turn.

    on_step: told the step (from 1) and its loss.  stopped: asked before each step whether to end early.
    Raises `DivergenceError` at the first loss or gradient that is not finite, before it reaches the weights.
    """
    device = next(student.parameters()).device
    teacher = Counted(target)
    learner = Learner(student, training.steps, training.learning_rate, training.ema_gamma, training.clip)
    for step in range(training.steps):
        if stopped():
            break
        nfe = nfes[step % len(nfes)]
        loss = _step_losses(student, teacher, nfe, training, step, keyed_generator(seed, f"train {nfe}", step, device))
        learner.update(step, loss, f"{nfe} NFE")
        on_step(step + 1, loss)
    return Outcome(learner.ema, teacher.calls)


@dataclass(frozen=True, eq=False)
class Scheduled:
    """A student in another schedule than its own."""

    student: ToyStudent
    schedule: Schedule

    @property
    def factorisation(self) -> Factorisation:
        return self.student.factorisation

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        """The student's policy."""
        policy: Policy = self.student(x_src, t_src, conditions)
        return policy


def _step_losses(
    student: ToyStudent, teacher: Counted, nfe: int, training: Training, step: int, generator: torch.Generator
) -> float:
    """The loss of all segments of a step, each sent backward as soon as it is known."""
    schedule, target, objective = replace(student.schedule, nfe=nfe), teacher.target, training.objective
    if training.clone or objective.data_free:
        x = torch.randn(training.batch, *target.shape, generator=generator, device=generator.device)
        conditions = target.draw_labels(training.batch, generator)
    else:
        conditions = target.draw_labels(training.batch, generator)
        x = target.sample(training.batch, generator, conditions)
    if training.clone:
        losses = _cloned(student, teacher, schedule, x, conditions, objective.step_size)
    else:
        asked = Scheduled(student, schedule)
        each = segment_losses(objective, teacher, asked, x, conditions, step, generator)
        losses = (segment.loss for segment in each)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += float(loss.detach())
    return total


def _cloned(
    student: ToyStudent,
    teacher: Counted,
    schedule: Schedule,
    x: Tensor,
    conditions: Conditions | None,
    step_size: float,
) -> Iterator[Tensor]:
    """The loss of each segment along the teacher's path from noise x."""
    for raw_src, raw_dst in pairwise(segments(schedule.nfe, schedule.final_step_scale)):
        count = 1 + math.ceil((raw_src - raw_dst) / step_size - 1e-4)
        raw = torch.linspace(raw_src, raw_dst, count, device=x.device)
        times = shift_time(raw, schedule.shift).unsqueeze(1).expand(-1, len(x))
        states, slopes = teacher_path(teacher, x, times, conditions)
        loss = cloning_loss(student(x, times[0], conditions), states, slopes, times, student.factorisation)
        yield (raw_src - raw_dst) * loss.mean()
        x = states[-1]
