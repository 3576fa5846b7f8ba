"""One optimiser step of π-ID (paper, Algorithms 2 and 3).

Data-dependent: one segment for each sample, drawn in proportion to its raw length, from data noised up to its t_src.

    τ' ~ U(0, 1),  τ_dst < τ' <= τ_src,    x_src = (1 - t_src) x_0 + t_src ε,    L = scale · L_segment

Data-free: all segments in turn from noise, each starting where the detached roll-out of the one before ended.

    L = scale · Σ_i (τ_src,i - τ_dst,i) L_i
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pitools.draws import Randomness, normal, uniform
from pitools.objectives.imitation import imitation_loss
from pitools.objectives.mixing import check_ratio, teacher_ratio
from pitools.path import diffuse, segments, shift_time
from pitools.policies import Head, Outputs, Segment
from pitools.types import Conditions, Dropped, Schedule, Student, Time, VelocityField


@dataclass(frozen=True)
class PiID:
    """A recipe's [objective] (paper, Tables 8 and 9). All lengths are in raw time.

    data_free: whether segments are chained from noise (Algorithm 3) or start from noised data (Algorithm 2).
    states: teacher queries for each sample and segment.  window: over which the policy's velocity is averaged
    (B.3).  dropout: rate of GM dropout.  teacher_ratio: the teacher's share of the path at step 0, which falls
    along a line to 0 at `decay_steps` (B.2).  loss_scale: what the loss, half a mean square, is multiplied by; the
    published 30 and 3 multiply a whole mean square, and are 60 and 6 here.  step_size: of the roll-outs.  floor:
    below which no state is drawn.
    Raises `ValueError` for a value out of range, and a teacher ratio that has no steps to decay over.
    """

    data_free: bool = False
    states: int = 2
    window: float = 0.0
    dropout: float = 0.0
    teacher_ratio: float = 0.0
    decay_steps: int = 0
    loss_scale: float = 1.0
    step_size: float = 1 / 128
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.states, int) or self.states < 1:
            raise ValueError(f"states must be a whole number of at least 1, got {self.states}")
        if not isinstance(self.decay_steps, int) or self.decay_steps < 0:
            raise ValueError(f"decay_steps must be a whole number of at least 0, got {self.decay_steps}")
        for name in ("window", "dropout", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("loss_scale", "step_size"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        check_ratio("teacher_ratio", self.teacher_ratio)
        if self.teacher_ratio > 0 and self.decay_steps == 0:
            raise ValueError(f"teacher_ratio {self.teacher_ratio} needs decay_steps of at least 1 to fall to 0 over")

    def check(self, schedule: Schedule, head: Head) -> None:
        """`ValueError` for what would fail during training with a student of this schedule and head.

        That is a window not shorter than the shortest segment, a floor not below the last segment's start, and
        dropout for a policy that has no components.
        """
        raw = segments(schedule.nfe, schedule.final_step_scale)
        shortest = min(a - b for a, b in pairwise(raw))
        if not self.window < shortest:
            raise ValueError(f"window {self.window:g} must be shorter than the shortest segment, {shortest:g} (raw)")
        if not self.floor < raw[-2]:
            raise ValueError(f"floor {self.floor:g} must lie below the last segment's start, {raw[-2]:g} (raw)")
        if self.dropout > 0 and not _drops(head, schedule):
            raise ValueError(
                f"dropout must be 0 for a {type(head).__name__}, got {self.dropout}: no components to drop"
            )


@dataclass(frozen=True)
class SegmentLoss:
    """One segment's part of a step.

    loss: 0-d, with a graph; the mean over the batch, weighted and scaled.  each: `[B]`, without one; each sample's
    own, as it is before that.  index: of the segment among those that
    the step yields, from 0.  raw_src, raw_dst: floats, or `[B]` where each sample has its own.  last: whether the
    step is complete.
    """

    loss: Tensor
    each: Tensor
    index: int
    raw_src: float | Tensor
    raw_dst: float | Tensor
    last: bool


def segment_losses(
    objective: PiID,
    teacher: VelocityField,
    student: Student,
    latents: Tensor,
    conditions: Conditions | None,
    step: int,
    randomness: Randomness,
) -> Iterator[SegmentLoss]:
    """The losses of optimiser step `step` (from 0), to be summed; each may go backward before the next is asked for.

    latents: `[B, ...]`, data x_0 (Algorithm 2), or where the objective is data-free the noise x_1 (Algorithm 3).
    The student is asked for a segment's policy only after the segment before has been handed out, so that one
    graph is alive at a time.  randomness: one generator, or one for each sample.
    Raises `ValueError` for what `imitation_loss` refuses.
    """
    schedule = student.schedule
    ratio = teacher_ratio(step, objective.teacher_ratio, objective.decay_steps)

    def imitate(x_src: Tensor, t_src: Time, t_dst: Time) -> tuple[Tensor, Tensor, Tensor]:
        result = imitation_loss(
            teacher,
            student(x_src, t_src, conditions),
            x_src,
            t_src,
            t_dst,
            factorisation=student.factorisation,
            conditions=conditions,
            states=objective.states,
            dropout=objective.dropout,
            teacher_ratio=ratio,
            window=objective.window,
            step_size=objective.step_size,
            shift=schedule.shift,
            floor=objective.floor,
            generator=randomness,
        )
        return objective.loss_scale * result.loss.mean(), result.loss.detach(), result.x_dst

    if not objective.data_free:
        x_0 = latents.to(torch.promote_types(latents.dtype, torch.float32))
        raw_src, raw_dst = draw_segments(schedule, len(x_0), randomness, like=x_0)
        t_src, t_dst = shift_time(raw_src, schedule.shift), shift_time(raw_dst, schedule.shift)
        x_src = diffuse(x_0, normal(x_0.shape, randomness, like=x_0), t_src)
        loss, each, _ = imitate(x_src, t_src, t_dst)
        yield SegmentLoss(loss, each, 0, raw_src, raw_dst, last=True)
        return

    x = latents
    for index, (start, end) in enumerate(pairwise(segments(schedule.nfe, schedule.final_step_scale))):
        loss, each, x = imitate(x, shift_time(start, schedule.shift), shift_time(end, schedule.shift))
        segment = SegmentLoss((start - end) * loss, each, index, start, end, last=index == schedule.nfe - 1)
        yield segment
        del loss, segment  # so that nothing here keeps a graph which the caller has let go of


def draw_segments(schedule: Schedule, batch: int, randomness: Randomness, like: Tensor) -> tuple[Tensor, Tensor]:
    """(raw_src, raw_dst), both `[B]`: one segment for each sample, in proportion to its length (Algorithm 2, 3-5).

    In `like`'s dtype and on its device.
    """
    if schedule.nfe == 1:
        return like.new_ones(batch), like.new_zeros(batch)
    rising = torch.tensor(segments(schedule.nfe, schedule.final_step_scale)[::-1], dtype=like.dtype, device=like.device)
    draws = uniform([batch], randomness, like)
    below = torch.searchsorted(rising[1:], draws)  # the first of the segments' upper ends that is >= τ'
    return rising[below + 1], rising[below]


def _drops(head: Head, schedule: Schedule) -> bool:
    """Whether the head's policies have components, told by its policy for one factor of one channel."""
    sizes, one = head.sizes, torch.zeros(1, 1, 1)
    outputs = Outputs(
        torch.zeros(1, 1, sizes.velocities, 1), one.expand(1, 1, sizes.factor), one[0].expand(1, sizes.sample)
    )
    return isinstance(head.read(outputs, one, 1.0, Segment(schedule.segment, schedule.shift)), Dropped)
