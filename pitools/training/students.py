"""The policy students of a recipe, `[students.NAME]`: one for each of its NFEs, and their training.

OUT/NAME-4nfe/    log.jsonl, checkpoints, sheets, and student.safetensors (averaged weights)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from pitools.guidance import Teacher
from pitools.policies import NetworkStudent
from pitools.sampling import sample
from pitools.training.checkpoint import write_tensors
from pitools.training.engine import Engine
from pitools.training.jobs import Call, Distillation
from pitools.training.loop import train
from pitools.training.random import keyed_generator
from pitools.training.recipe import Plan, StudentSection
from pitools.training.sheets import Sheet
from pitools.types import Conditions


@dataclass(frozen=True)
class Member:
    """One student of a run: its section, its NFE and its folder."""

    name: str
    section: StudentSection
    nfe: int
    folder: Path

    @property
    def label(self) -> str:
        return f"{self.name}-{self.nfe}nfe"


def members(plan: Plan) -> list[Member]:
    """The students that a recipe asks for, in order."""
    return [
        Member(name, section, nfe, plan.out / f"{name}-{nfe}nfe")
        for name, section in plan.recipe.students.items()
        for nfe in section.nfe
    ]


def build_student(plan: Plan, member: Member, teacher_network: nn.Module) -> NetworkStudent:
    """A student as it starts: a copy of the teacher, with a head."""
    head = member.section.head
    generator = keyed_generator(plan.recipe.run.seed, f"head {member.label}")
    network = plan.backbone.student(teacher_network, head, generator, plan.recipe.teacher.guidance.embedded)
    return NetworkStudent(network, head, member.section.schedule(member.nfe), plan.backbone.factorisation)


def train_student(
    plan: Plan, member: Member, teacher_network: nn.Module, teacher: Teacher, engine: Engine, console: Console
) -> None:
    """Train a student and write its weights."""
    student, recipe = build_student(plan, member, teacher_network), plan.recipe

    def sampler(network: Call, noise: Tensor, conditions: Conditions) -> Tensor:
        return sample(replace(student, network=network), noise, conditions=conditions)

    title = f"student, {member.nfe} NFE"
    weights = train(
        Distillation(student, teacher, member.section.objective),
        recipe.training,
        plan.data,
        engine,
        seed=recipe.run.seed,
        folder=member.folder,
        name=member.label,
        console=console,
        draw_sheet=Sheet(plan, sampler, title, teacher, engine, student.schedule.shift).draw,
    )
    metadata = {"policy": member.section.policy, "schedule": json.dumps(vars(member.section.schedule(member.nfe)))}
    engine.on_main(lambda: write_tensors(member.folder / "student.safetensors", weights, metadata))
