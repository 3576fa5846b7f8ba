"""What a loop trains: a student by π-ID, or a teacher by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Generator, Tensor, nn

from pitools.draws import normal, uniform
from pitools.guidance import Teacher
from pitools.objectives import PiID, SegmentLoss, flow_matching_loss, segment_losses
from pitools.path import align, segments
from pitools.policies import NetworkStudent, Outputs
from pitools.training.clock import Clock, TimedNetwork, TimedTeacher
from pitools.types import Conditions, Schedule, Time


@dataclass(frozen=True)
class Batch:
    """One process's part of a step: latents x_0 `[B, ...]`, their conditions, and a generator for each sample."""

    latents: Tensor
    conditions: Conditions
    randomness: Sequence[Generator]


@dataclass(frozen=True)
class Part:
    """A share of a step's loss, 0-d and with a graph; `where` says, if it is asked, where that is not finite."""

    loss: Tensor
    where: Callable[[], str]


Call = Callable[..., Any]
"""A network as the engine calls it: (x, t, conditions) -> its answer."""


class Job(Protocol):
    """What is trained, and by which loss."""

    @property
    def network(self) -> nn.Module:
        """Whose parameters are trained."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """What the parts of a step's loss are called; each goes backward before the next is asked for."""
        ...

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """The parts of step `step`, from 0, with `network` in the place of `self.network`."""
        ...


@dataclass(frozen=True)
class Distillation:
    """π-ID of a student whose network is a module; the teacher's network is called through `ask`."""

    student: NetworkStudent
    teacher: Teacher
    objective: PiID

    @property
    def network(self) -> nn.Module:
        """The student's."""
        return cast(nn.Module, self.student.network)

    @property
    def parts(self) -> Sequence[str]:
        """One for all the segments that the batch was given, or data-free one for each segment."""
        nfe = self.student.schedule.nfe
        if nfe == 1 or self.objective.data_free:
            return [f"segment {index + 1} of {nfe}" for index in range(nfe)]
        return [f"segments drawn from {nfe}"]

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """The segments' losses (Algorithms 2 and 3)."""
        student = replace(self.student, network=TimedNetwork(cast(Callable[..., Outputs], network), clock))
        latents = batch.latents
        if self.objective.data_free:
            latents = normal(latents.shape, batch.randomness, like=latents)
        for segment in segment_losses(
            self.objective,
            TimedTeacher(self.teacher, clock),
            student,
            latents,
            batch.conditions,
            step,
            batch.randomness,
        ):
            yield Part(segment.loss, partial(_segments, segment, self.parts[segment.index], student.schedule))


def _segments(part: SegmentLoss, name: str, schedule: Schedule) -> str:
    """`name`, or where each sample has its own segment, those of the samples whose loss is not finite."""
    bad = ~part.each.isfinite()
    if not isinstance(part.raw_src, Tensor) or not bool(bad.any()):
        return name
    starts = torch.tensor(segments(schedule.nfe, schedule.final_step_scale)[:-1])
    found = {int((starts - start).abs().argmin()) + 1 for start in part.raw_src[bad].tolist()}
    return f"segment {' and '.join(map(str, sorted(found)))} of {schedule.nfe}"


@dataclass(frozen=True)
class FlowMatching:
    """A teacher's own training (paper, Eq. 2), its conditions replaced by the null ones at a rate `label_dropout`."""

    network: nn.Module
    null_conditions: Conditions
    label_dropout: float = 0.1
    shift: float = 1.0
    parts: Sequence[str] = ("flow matching",)

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """The flow-matching loss."""
        dropped = uniform([len(batch.latents)], batch.randomness, like=batch.latents) < self.label_dropout
        conditions = dict(batch.conditions)
        for name, null in self.null_conditions.items():
            own = conditions[name]
            null = torch.as_tensor(null, dtype=own.dtype, device=own.device)
            conditions[name] = torch.where(align(dropped, own), null, own)
        field = _Field(network, clock)
        loss = flow_matching_loss(field, batch.latents, conditions, batch.randomness, self.shift).mean()
        yield Part(loss, lambda: "flow matching")


@dataclass(frozen=True)
class _Field:
    network: Call
    clock: Clock

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        with self.clock.in_network():
            return cast(Tensor, self.network(x_t, t, conditions)).float()
