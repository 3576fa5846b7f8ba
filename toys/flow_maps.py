"""Training of the toys' flow maps: FreeFlow, its two halves, and the rivals of `pitools.objectives.rivals`.

All train the same network on as many noises or data points a step, and count how often the teacher was asked, once for
each sample.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from pitools.mixture import GaussianMixture
from pitools.objectives.flow_map import Times
from pitools.objectives.free_flow import FreeFlow, auxiliary_loss, free_flow_loss
from pitools.objectives.rivals import (
    TwoTimes,
    consistency_loss,
    mean_flow_loss,
    progressive_loss,
    regression_loss,
)
from pitools.path import diffuse
from pitools.rollout import velocity as velocity_at
from pitools.training import keyed_generator
from pitools.types import Conditions, Time
from toys.network import AtOnce, FromNoise, ToyFlowMap, one_step
from toys.targets import Target
from toys.training import Counted, Learner, Outcome

LEAST_TIME = 1e-2
"""Of MeanFlow's: F = (x_t - x̂)/t."""


@dataclass(frozen=True)
class FlowMapTraining:
    """Hyperparameters of one flow map.

    steps: optimiser steps.  batch: noises, or data points, a step.  learning_rate: Adam's, warmed up over 50 steps and
    brought to 0 along a cosine.  teacher_steps: to the end points that regression fits, and of the grid that
    consistency and progressive distillation start from.  free_flow: the objective of FreeFlow, of its prediction and
    of its correction alone.  auxiliary_rate: Adam's, of the auxiliary network, constant.  auxiliary_updates: of that
    network for each of the student's; with 0 there is none, and v_N is that of the student's present samples (`Now`).
    ema_gamma: Karras's γ.  clip: the largest gradient norm.
    Raises `ValueError` for teacher steps that cannot be halved down to one jump.
    """

    steps: int
    batch: int
    learning_rate: float
    free_flow: FreeFlow
    teacher_steps: int = 32
    auxiliary_rate: float = 1e-3
    auxiliary_updates: int = 1
    ema_gamma: float = 7.0
    clip: float = 10.0

    def __post_init__(self) -> None:
        if self.teacher_steps < 2 or self.teacher_steps.bit_count() != 1:
            raise ValueError(f"teacher_steps must be a power of two of at least 2, got {self.teacher_steps}")


@dataclass(frozen=True, eq=False)
class Now:
    """v_N without an auxiliary network, where a latent has few elements: that of `count` samples of the student, each
    blurred by `width`.

    The teacher's formula for a mixture, with the student's own samples in place of the data.
    """

    network: TwoTimes
    generator: torch.Generator
    count: int = 4096
    width: float = 0.02

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The velocity of noising at latents x_t, t. Raises `ValueError` for conditions."""
        if conditions:
            raise ValueError("auxiliary_updates = 0 knows no conditions; use at least 1")
        shape = self.count, *x_t.shape[1:]
        ends = one_step(self.network, torch.randn(shape, generator=self.generator, device=x_t.device))
        samples = GaussianMixture(ends.flatten(1), ends.new_zeros(self.count), self.width**2)
        return velocity_at(samples, x_t.flatten(1), t).reshape(x_t.shape)


@torch.no_grad()
def auxiliary_errors(
    auxiliary: TwoTimes, network: TwoTimes, target: Target, levels: Sequence[float], generator: torch.Generator
) -> list[float]:
    """E‖g - v_N‖/E‖v_N - u‖ at each noise level r: an auxiliary network's error over what it is to show.

    v_N is that of 16,384 samples of the student. Above 1, the network's own error is most of what corrects.
    """
    truth, errors = Now(network, generator, count=2**14), []
    noise, n = (torch.randn(1000, *target.shape, generator=generator, device=generator.device) for _ in range(2))
    ends = one_step(network, noise)
    for r in levels:
        level = noise.new_full((len(noise),), r)
        x_r = diffuse(ends, n, level)
        v = truth.velocity(x_r, level)
        wrong, shown = (v - field.velocity(x_r, level) for field in (AtOnce(auxiliary), target))
        errors.append(float(wrong.flatten(1).norm(dim=1).mean() / shown.flatten(1).norm(dim=1).mean()))
    return errors


@dataclass
class Lesson:
    """What a method sees in one step; `before` is the network that is not trained."""

    network: ToyFlowMap
    before: TwoTimes
    teacher: Counted
    training: FlowMapTraining
    generator: torch.Generator
    conditions: Conditions | None

    @property
    def _like(self) -> Tensor:
        return torch.empty(0, device=self.generator.device)

    def noise(self) -> Tensor:
        shape = self.training.batch, *self.teacher.target.shape
        return torch.randn(*shape, generator=self.generator, device=self.generator.device)

    def noised(self, t: Tensor) -> Tensor:
        """Data points of the target, noised up to t `[B]`."""
        x_0 = self.teacher.target.sample(len(t), self.generator, self.conditions)
        return diffuse(x_0, self.noise(), t)

    def place(self, count: int) -> tuple[Tensor, Tensor]:
        """(t, s), `[B]`: the ends of one of `count` even intervals."""
        device = self.generator.device
        index = torch.randint(count, (self.training.batch,), generator=self.generator, device=device)
        return (index + 1) / count, index / count


def _regression(lesson: Lesson) -> Tensor:
    steps = lesson.training.teacher_steps
    return regression_loss(lesson.network, lesson.teacher, lesson.noise(), steps, lesson.conditions)


def _mean_flow(lesson: Lesson) -> Tensor:
    """MeanFlow's own law of times: two logistic normals, one of four pairs equal."""
    count = lesson.training.batch
    both = torch.stack([Times(-0.4, 1.0).draw(count, lesson.generator, lesson._like) for _ in range(2)])
    t, s = both.amax(0).clamp(min=LEAST_TIME), both.amin(0)
    equal = torch.rand(count, generator=lesson.generator, device=t.device) < 0.25
    s = torch.where(equal, t, torch.minimum(s, t))
    return mean_flow_loss(lesson.network, lesson.teacher, lesson.noised(t), t, s, lesson.conditions)


def _consistency(lesson: Lesson) -> Tensor:
    t, t_next = lesson.place(lesson.training.teacher_steps)
    x_t = lesson.noised(t)
    return consistency_loss(lesson.network, _at_zero(lesson.before), lesson.teacher, x_t, t, t_next, lesson.conditions)


def _progressive(lesson: Lesson, intervals: int) -> Tensor:
    t, s = lesson.place(intervals)
    return progressive_loss(lesson.network, lesson.before, lesson.noised(t), t, s, lesson.conditions)


def _at_zero(flow_map: TwoTimes) -> TwoTimes:
    """The flow map, which at t = 0 has nowhere to go, and no x̂ to divide by t."""

    def ask(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return flow_map(x_t, torch.where(t > 0, t, 1.0), s, conditions)

    return ask


RIVALS: Mapping[str, Callable[[Lesson], Tensor]] = MappingProxyType(
    {"regression": _regression, "meanflow": _mean_flow, "consistency": _consistency}
)
SHARES: Mapping[str, float | None] = MappingProxyType({"freeflow": None, "prediction": 1.0, "dmd": 0.0})
"""The share of a batch that predicts; None is the objective's own."""

METHODS = (*SHARES, *RIVALS, "progressive")


def train(
    method: str,
    network: ToyFlowMap,
    target: Target,
    training: FlowMapTraining,
    seed: int,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train `network` in place by one of `METHODS`.

    on_step: told the step (from 1) and its loss.  stopped: asked before each step whether to end early.
    Raises `ValueError` for an unknown method, and `DivergenceError` at the first loss or gradient that is not finite,
    before it reaches the weights.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(METHODS)}")
    device = next(network.parameters()).device
    teacher = Counted(target)
    learner = Learner(network, training.steps, training.learning_rate, training.ema_gamma, training.clip)
    auxiliary = copy.deepcopy(network)
    auxiliary_optimiser = torch.optim.Adam(auxiliary.parameters(), lr=training.auxiliary_rate, betas=(0.9, 0.99))
    stages, last_stage = training.teacher_steps.bit_length() - 1, 0
    before: TwoTimes = teacher
    share = SHARES.get(method)
    objective = training.free_flow if share is None else replace(training.free_flow, share=share)
    for step in range(training.steps):
        if stopped():
            break
        generator = keyed_generator(seed, f"train {method}", step, device)
        conditions = target.draw_labels(training.batch, generator)
        stage = min(step * stages // training.steps, stages - 1)
        if (method == "consistency" and step == 0) or (method == "progressive" and stage > last_stage):
            before = copy.deepcopy(network).requires_grad_(False)
        last_stage = stage
        lesson = Lesson(network, before, teacher, training, generator, conditions)
        if method in SHARES:
            flow_map = FromNoise(network)
            field = AtOnce(auxiliary) if training.auxiliary_updates else Now(network, generator)
            for _ in range(training.auxiliary_updates if objective.share < 1 else 0):
                auxiliary_loss(objective, field, flow_map, lesson.noise(), conditions, generator).backward()
                auxiliary_optimiser.step()
                auxiliary_optimiser.zero_grad(set_to_none=True)
            noise = lesson.noise()
            loss = free_flow_loss(objective, flow_map, field, teacher, noise, step, conditions, generator).loss
        elif method == "progressive":
            loss = _progressive(lesson, training.teacher_steps >> (stage + 1)).mean()
        else:
            loss = RIVALS[method](lesson).mean()
        value = float(loss.detach())
        loss.backward()
        learner.update(step, value, method)
        if method == "consistency":
            _average(before, network)
        on_step(step + 1, value)
    correcting = method in SHARES and objective.share < 1 and training.auxiliary_updates > 0
    return Outcome(learner.ema, teacher.calls, auxiliary if correcting else None)


@torch.no_grad()
def _average(before: TwoTimes, network: ToyFlowMap, rate: float = 0.95) -> None:
    """The target network of consistency distillation follows the student's weights."""
    assert isinstance(before, ToyFlowMap)
    for mine, its in zip(before.parameters(), network.parameters(), strict=True):
        mine.lerp_(its, 1 - rate)
