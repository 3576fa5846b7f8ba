"""Data-free π-ID for the toys (paper, Algorithm 3): roll the student's own policies from noise, segment by
segment, and match the exact teacher along the way. Cloning is the same along the teacher's own path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pitools.objectives import imitation_loss
from pitools.objectives.rivals import cloning_loss, teacher_path
from pitools.path import segments, shift_time
from pitools.training import keyed_generator
from pitools.types import Conditions
from toys.network import ToyStudent
from toys.targets import Target
from toys.training import Counted, Learner, Outcome


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one student.

    steps: optimiser steps.  batch: noises a step.  learning_rate: Adam's, warmed up over 50 steps and brought
    to 0 along a cosine.  states: teacher queries for each sample and segment.  step_size: raw length of a
    substep of the training roll-outs.  floor: raw time below which no state is drawn.  dropout: rate of GM
    dropout.  clone: whether policies are matched along the teacher's path, in steps of that size, and not along their
    own.  ema_gamma: Karras's γ.  clip: the largest gradient norm.
    """

    steps: int
    batch: int
    learning_rate: float
    states: int
    step_size: float
    floor: float
    dropout: float = 0.0
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
        loss = _step_losses(student, teacher, nfe, training, keyed_generator(seed, f"train {nfe}", step, device))
        learner.update(step, loss, f"{nfe} NFE")
        on_step(step + 1, loss)
    return Outcome(learner.ema, teacher.calls)


def _step_losses(
    student: ToyStudent, teacher: Counted, nfe: int, training: Training, generator: torch.Generator
) -> float:
    """The loss of all `nfe` segments, each sent backward as soon as it is known."""
    schedule, device, target = student.schedule, generator.device, teacher.target
    x = torch.randn(training.batch, *target.shape, generator=generator, device=device)
    conditions = target.draw_labels(training.batch, generator)
    total = 0.0
    for raw_src, raw_dst in pairwise(segments(nfe, schedule.final_step_scale)):
        t_src, t_dst = shift_time(raw_src, schedule.shift), shift_time(raw_dst, schedule.shift)
        if training.clone:
            loss, x = _clone(student, teacher, x, raw_src, raw_dst, conditions, training.step_size)
            loss.backward()
            total += float(loss.detach())
            continue
        result = imitation_loss(
            teacher,
            student(x, t_src, conditions),
            x,
            t_src,
            t_dst,
            factorisation=student.factorisation,
            conditions=conditions,
            states=training.states,
            dropout=training.dropout,
            step_size=training.step_size,
            shift=schedule.shift,
            floor=training.floor,
            generator=generator,
        )
        loss = (raw_src - raw_dst) * result.loss.mean()
        loss.backward()
        total += float(loss.detach())
        x = result.x_dst
    return total


def _clone(
    student: ToyStudent,
    teacher: Counted,
    x: Tensor,
    raw_src: float,
    raw_dst: float,
    conditions: Conditions | None,
    step_size: float,
) -> tuple[Tensor, Tensor]:
    """The loss of one segment along the teacher's path from x, and where that ends."""
    raw = torch.linspace(raw_src, raw_dst, 1 + math.ceil((raw_src - raw_dst) / step_size - 1e-4), device=x.device)
    times = shift_time(raw, student.schedule.shift).unsqueeze(1).expand(-1, len(x))
    states, slopes = teacher_path(teacher, x, times, conditions)
    loss = cloning_loss(student(x, times[0], conditions), states, slopes, times, student.factorisation)
    return (raw_src - raw_dst) * loss.mean(), states[-1]
