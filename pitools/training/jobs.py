"""What a loop trains: a student by π-ID, a flow map by FreeFlow, or a teacher by flow matching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Generator, Tensor, nn

from pitools.draws import normal, uniform
from pitools.guidance import AnyStrength, Teacher
from pitools.objectives import PiID, SegmentLoss, flow_matching_loss, segment_losses
from pitools.objectives.free_flow import FreeFlow, auxiliary_loss, free_flow_loss
from pitools.path import align, as_time, segments
from pitools.policies import NetworkFlowMap, NetworkStudent, Outputs
from pitools.training.clock import Clock, TimedNetwork, TimedTeacher
from pitools.training.optimiser import Optimiser
from pitools.types import Conditions, Schedule, Time, VelocityField


@dataclass(frozen=True)
class Batch:
    """One process's part of a step: latents x_0 `[B, ...]`, their conditions, and a generator for each sample.

    rows: which of the step's global batch they are.  For a job that reads no data, latents are empty memory of the
    right shape, and there are no conditions.
    """

    latents: Tensor
    conditions: Conditions
    randomness: Sequence[Generator]
    rows: range


@dataclass(frozen=True)
class Part:
    """A share of a step's loss, 0-d and with a graph; `where` says, if it is asked, where that is not finite.

    told: what the log has instead, 0-d, where the loss itself says little.
    """

    loss: Tensor
    where: Callable[[], str]
    told: Tensor | None = None


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

    @property
    def reads_data(self) -> bool:
        """Whether it is given latents and conditions."""
        ...

    @property
    def helper(self) -> Helper | None:
        """What is trained before it in each step, if anything."""
        ...

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """The parts of step `step`, from 0, with `network` in the place of `self.network`."""
        ...


@dataclass(frozen=True)
class Helper:
    """A network that a job's own loss needs, and that is trained beside it, by an optimiser of its own.

    updates: of it, before each of the job's network.
    """

    name: str
    job: Job
    optimiser: Optimiser
    updates: int = 1


@dataclass(frozen=True)
class Distillation:
    """π-ID of a student whose network is a module."""

    student: NetworkStudent
    teacher: Teacher
    objective: PiID
    reads_data: ClassVar[bool] = True  # if only the conditions
    helper: ClassVar[None] = None

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
    reads_data: ClassVar[bool] = True
    helper: ClassVar[None] = None

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """The flow-matching loss."""
        dropped = uniform([len(batch.latents)], batch.randomness, like=batch.latents) < self.label_dropout
        conditions = dict(batch.conditions)
        for name, null in self.null_conditions.items():
            own = conditions[name]
            null = torch.as_tensor(null, dtype=own.dtype, device=own.device)
            conditions[name] = torch.where(align(dropped, own), null, own)
        velocity = Field(network, clock)
        loss = flow_matching_loss(velocity, batch.latents, conditions, batch.randomness, self.shift).mean()
        yield Part(loss, lambda: "flow matching")


@dataclass(frozen=True)
class Auxiliary:
    """A recipe's [flow_maps.NAME.auxiliary]: the network of the noising velocity (FreeFlow, section 4.2 and A.2).

    updates: of it for each of the student's.  lora: the rank of LoRA on the teacher's weights; 0 trains all of them.
    optimiser: its own; the paper's rate is higher than the student's (Table 4).
    """

    updates: int = 1
    lora: int = 0
    optimiser: Optimiser = field(default_factory=Optimiser)

    def __post_init__(self) -> None:
        for name, least in (("updates", 1), ("lora", 0)):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class FlowMapDistillation:
    """FreeFlow's student: its network takes "delta" and "guidance" among its conditions. No data is read.

    auxiliary: the training of the noising velocity's network, None where nothing corrects; `ask_auxiliary` calls that.
    teacher: with the guidance scale that counts where the objective draws no strengths.  classes: of `class_labels`,
    which are drawn evenly.  mean: over the processes.
    """

    network: nn.Module
    auxiliary: AuxiliaryTraining | None
    teacher: Teacher
    objective: FreeFlow
    classes: int
    ask_auxiliary: Call | None
    mean: Callable[[Tensor], Tensor]
    parts: Sequence[str] = ("FreeFlow",)
    reads_data: ClassVar[bool] = False

    @property
    def helper(self) -> Helper | None:
        """The auxiliary network's training."""
        own = self.auxiliary
        return None if own is None else Helper("auxiliary", own, own.section.optimiser, own.section.updates)

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """Prediction and correction (FreeFlow, section 5.1)."""
        noise, conditions = draw_noise(batch, self.classes)
        noising = None if self.ask_auxiliary is None else Field(self.ask_auxiliary, clock)
        teacher, corrector = (TimedTeacher(each, clock) for each in self.teachers)
        found = free_flow_loss(
            self.objective,
            NetworkFlowMap(TimedField(network, clock)),
            noising,
            teacher,
            noise,
            step,
            conditions,
            batch.randomness,
            corrector,
            batch.rows,
            self.mean,
        )
        both = torch.stack([found.predicted, found.corrected])
        yield Part(found.loss, lambda: self.parts[0], told=both.nansum())

    @property
    def teachers(self) -> tuple[VelocityField, VelocityField]:
        """That of the prediction, and that of the correction, whose guidance may act in an interval of its own."""
        until, own = self.objective.guided_until, self.teacher
        other = own
        if until is not None:
            guidance = replace(own.guidance, high=until)
            other = replace(own, guidance=guidance)
        return (own, other) if self.objective.guidance is None else (AnyStrength(own), AnyStrength(other))


@dataclass(frozen=True)
class AuxiliaryTraining:
    """The noising velocity of a student's samples (FreeFlow, Eq. 12); `ask_student` calls the student's network."""

    network: nn.Module
    section: Auxiliary
    objective: FreeFlow
    classes: int
    ask_student: Call
    parts: Sequence[str] = ("noising velocity",)
    reads_data: ClassVar[bool] = False
    helper: ClassVar[None] = None

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        """Flow matching on the student's samples."""
        noise, conditions = draw_noise(batch, self.classes)
        loss = auxiliary_loss(
            self.objective,
            Field(network, clock),
            NetworkFlowMap(TimedField(self.ask_student, clock)),
            noise,
            conditions,
            batch.randomness,
            batch.rows,
        )
        yield Part(loss, lambda: self.parts[0])


def draw_noise(batch: Batch, classes: int) -> tuple[Tensor, Conditions]:
    """Noise of the latents' shape, and classes: all that FreeFlow starts from."""
    noise = normal(batch.latents.shape, batch.randomness, like=batch.latents)
    labels = uniform([len(noise)], batch.randomness, like=noise).mul(classes).long().clamp(max=classes - 1)
    return noise, {"class_labels": labels}


@dataclass(frozen=True)
class TimedField:
    """A network that answers with one tensor, under a clock."""

    network: Call
    clock: Clock

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        with self.clock.in_network():
            return cast(Tensor, self.network(x, t, conditions))


@dataclass(frozen=True)
class Field:
    """A network as a velocity field, under a clock."""

    network: Call
    clock: Clock

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """Its answer, in float32 or better."""
        answer = TimedField(self.network, self.clock)(x_t, as_time("t", t, x_t).expand(len(x_t)), conditions)
        return answer.to(torch.promote_types(answer.dtype, torch.float32))
