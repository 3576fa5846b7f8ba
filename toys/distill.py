"""Data-free π-ID for the toys (paper, Algorithm 3): roll the student's own policies from noise, segment by
segment, and match the exact teacher along the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pitools.objectives import imitation_loss
from pitools.path import segments, shift_time
from pitools.training import EMA, DivergenceError, keyed_generator
from toys.network import ToyStudent
from toys.targets import Target


@dataclass(frozen=True)
class Training:
    """Hyperparameters of one student.

    steps: optimiser steps.  batch: noises a step.  learning_rate: Adam's, warmed up over 50 steps and brought
    to 0 along a cosine.  states: teacher queries for each sample and segment.  step_size: raw length of a
    substep of the training roll-outs.  floor: raw time below which no state is drawn.  dropout: rate of GM
    dropout.  ema_gamma: Karras's γ.  clip: the largest gradient norm.
    """

    steps: int
    batch: int
    learning_rate: float
    states: int
    step_size: float
    floor: float
    dropout: float = 0.0
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
) -> EMA:
    """Train `student` in place for schedules of `nfes` steps, in turn; returns the moving average of its weights.

    on_step: told the step (from 1) and its loss.  stopped: asked before each step whether to end early.
    Raises `DivergenceError` at the first loss or gradient that is not finite, before it reaches the weights.
    """
    device = next(student.parameters()).device
    ema = EMA(student, training.ema_gamma)
    optimiser = torch.optim.Adam(student.parameters(), lr=training.learning_rate, betas=(0.9, 0.99))
    for step in range(training.steps):
        if stopped():
            break
        for group in optimiser.param_groups:
            group["lr"] = training.learning_rate * _ramp(step, training.steps)
        nfe = nfes[step % len(nfes)]
        generator = keyed_generator(seed, f"train {nfe}", step, device)
        loss = _step_losses(student, target, nfe, training, generator)
        norm = nn.utils.clip_grad_norm_(student.parameters(), training.clip)
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise DivergenceError(
                f"step {step + 1} ({nfe} NFE): loss {loss}, gradient norm {float(norm)}; a lower learning rate may help"
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        ema.update(student)
        on_step(step + 1, loss)
    return ema


def _step_losses(
    student: ToyStudent, target: Target, nfe: int, training: Training, generator: torch.Generator
) -> float:
    """The loss of all `nfe` segments, each sent backward as soon as it is known."""
    schedule, device = student.schedule, generator.device
    x = torch.randn(training.batch, *target.shape, generator=generator, device=device)
    conditions = _random_labels(target, training.batch, generator)
    total = 0.0
    for raw_src, raw_dst in pairwise(segments(nfe, schedule.final_step_scale)):
        t_src, t_dst = shift_time(raw_src, schedule.shift), shift_time(raw_dst, schedule.shift)
        result = imitation_loss(
            target,
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


def _random_labels(target: Target, count: int, generator: torch.Generator) -> dict[str, Tensor] | None:
    if not target.classes:
        return None
    return {"class_labels": torch.randint(target.classes, (count,), generator=generator, device=generator.device)}


def _ramp(step: int, steps: int, warmup: int = 50) -> float:
    """The learning rate's share of its peak: a linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
