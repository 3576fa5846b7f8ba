"""The flow maps of a recipe, `[flow_maps.NAME]`: their networks, their training, and how they sample.

OUT/NAME-1nfe/    log.jsonl, checkpoints of both networks, sheets, and student.safetensors (averaged weights)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from torch import Tensor, nn

from pitools.guidance import Teacher
from pitools.policies import FlowMapStudent, NetworkFlowMap
from pitools.sampling import sample
from pitools.training.checkpoint import write_tensors
from pitools.training.engine import Engine
from pitools.training.jobs import AuxiliaryTraining, FlowMapDistillation
from pitools.training.loop import train
from pitools.training.random import keyed_generator
from pitools.training.recipe import FlowMapSection, Mappable, Plan
from pitools.training.sheets import Sheet

GUIDANCE = "guidance"


@dataclass(frozen=True)
class MapMember:
    """One flow map of a run: its section and its folder."""

    name: str
    section: FlowMapSection
    folder: Path
    nfe: int = 1

    @property
    def label(self) -> str:
        return f"{self.name}-{self.nfe}nfe"

    def strengths(self, plan: Plan) -> Sequence[float | None]:
        """Of guidance, at which it is compared: the teacher's first; None alone where there is no choice."""
        own = plan.recipe.teacher.guidance.scale
        if self.section.objective.guidance is None:
            return (None,)
        return (own, *(each for each in self.section.strengths if each != own))


def map_members(plan: Plan) -> list[MapMember]:
    """The flow maps that a recipe asks for, in order."""
    return [MapMember(name, section, plan.out / f"{name}-1nfe") for name, section in plan.recipe.flow_maps.items()]


def build_map(plan: Plan, member: MapMember, teacher_network: nn.Module) -> nn.Module:
    """A flow map's network as it starts: a copy of the teacher that takes δ, and γ if it is to be chosen."""
    return _network(plan, member, teacher_network, ("delta", *_strength(member)), "flow map")


def build_auxiliary(plan: Plan, member: MapMember, teacher_network: nn.Module) -> nn.Module | None:
    """The network of its noising velocity as it starts; None where nothing corrects."""
    if member.section.objective.share == 1:
        return None
    return _network(plan, member, teacher_network, _strength(member), "auxiliary", member.section.auxiliary.lora)


def _strength(member: MapMember) -> tuple[str, ...]:
    return () if member.section.objective.guidance is None else (GUIDANCE,)


def _network(
    plan: Plan, member: MapMember, teacher_network: nn.Module, scalars: tuple[str, ...], what: str, lora: int = 0
) -> nn.Module:
    generator = keyed_generator(plan.recipe.run.seed, f"{what} {member.label}")
    return cast(Mappable, plan.backbone).flow_map(teacher_network, scalars, generator, lora)


def map_student(
    plan: Plan, member: MapMember, network: Callable[..., Any], strength: float | None = None
) -> FlowMapStudent:
    """A flow map as a student, whose guidance has the teacher's scale unless told, where it can be chosen."""
    own = plan.recipe.teacher.guidance.scale if strength is None else strength
    guidance = None if member.section.objective.guidance is None else own
    return FlowMapStudent(NetworkFlowMap(network), plan.backbone.factorisation, guidance)


def train_map(
    plan: Plan, member: MapMember, teacher_network: nn.Module, teacher: Teacher, engine: Engine, console: Console
) -> None:
    """Train a flow map and write its weights. Raises as `train` does."""
    recipe, section = plan.recipe, member.section
    classes: int = cast(Any, plan.data).classes  # `plan` refuses data without
    network = build_map(plan, member, teacher_network)
    other = build_auxiliary(plan, member, teacher_network)
    auxiliary = None
    if other is not None:
        ask = partial(engine.call, network)
        auxiliary = AuxiliaryTraining(other, section.auxiliary, section.objective, classes, ask)
    job = FlowMapDistillation(
        network,
        auxiliary,
        teacher,
        section.objective,
        classes,
        None if other is None else partial(engine.call, other),
        engine.mean,
    )

    def sampler(call: Callable[..., Any], noise: Tensor, conditions: Any) -> Tensor:
        return sample(map_student(plan, member, call), noise, conditions=conditions)

    weights = train(
        job,
        recipe.training,
        plan.data,
        engine,
        seed=recipe.run.seed,
        folder=member.folder,
        name=member.label,
        console=console,
        draw_sheet=Sheet(plan, sampler, "student, 1 NFE", teacher, engine, classes=classes).draw,
    )
    metadata = {"flow_map": json.dumps({"guidance": section.objective.guidance})}
    engine.on_main(lambda: write_tensors(member.folder / "student.safetensors", weights, metadata))
