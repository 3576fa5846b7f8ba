"""A dry run: what a recipe will train, and about how much memory that takes. Nothing is loaded or written."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pitools.guidance import frozen
from pitools.policies import NetworkStudent, Outputs
from pitools.training.config import RecipeError, to_toml
from pitools.training.flow_maps import MapMember, build_auxiliary, build_map, map_members
from pitools.training.loop import EMA_DTYPES
from pitools.training.memory import (
    Memory,
    StoredBytes,
    network_passes,
    plain_bytes,
    policy_bytes,
    state_bytes,
    weight_bytes,
)
from pitools.training.recipe import Plan
from pitools.training.students import Member, build_student, members
from pitools.training.teacher import new_teacher
from pitools.types import Conditions


def describe(plan: Plan) -> str:
    """The whole recipe as TOML, and as comments what it will train and about how much memory that takes.

    Where the backbone can say its sizes without its weights, none are loaded.
    """
    outline = getattr(plan.backbone, "outline", None)
    try:
        teacher = frozen(new_teacher(plan) if outline is None else cast(nn.Module, outline()))
    except ValueError as error:
        raise RecipeError(f"[backbone] {error}") from error
    stored = getattr(plan.backbone, "stored_bytes", plain_bytes)
    lines = [to_toml(plan.table).rstrip(), "", f"# folder: {plan.out}"]
    frozen_count = sum(value.numel() for value in teacher.parameters())
    lines.append(f"# teacher: {frozen_count:,} frozen parameters, {_mib(weight_bytes([teacher], stored))}")
    for member in members(plan):
        student = build_student(plan, member, teacher)
        network = cast(nn.Module, student.network)
        trained = sum(value.numel() for value in network.parameters() if value.requires_grad)
        idle = sum(value.numel() for value in network.parameters()) - trained
        memory = estimate(plan, member, student, teacher, stored)
        lines.append(
            f"# {member.label}: {trained:,} trained and {idle:,} frozen parameters; on one process about "
            f"{_mib(memory.total)} at once: all weights {_mib(memory.weights)}, gradients, optimiser and EMA "
            f"{_mib(memory.training)}, passes of the networks {_mib(memory.network)}, the policy and its loss "
            f"{_mib(memory.policy)}"
        )
    for flow_map in map_members(plan):
        network = build_map(plan, flow_map, teacher)
        auxiliary = build_auxiliary(plan, flow_map, teacher)
        trained = sum(value.numel() for value in network.parameters())
        beside = sum(v.numel() for v in auxiliary.parameters() if v.requires_grad) if auxiliary is not None else 0
        memory = estimate_map(plan, flow_map, network, auxiliary, teacher, stored)
        lines.append(
            f"# {flow_map.label}: {trained:,} trained parameters and {beside:,} of the auxiliary network; on one "
            f"process about {_mib(memory.total)} at once: all weights {_mib(memory.weights)}, gradients, optimisers "
            f"and EMA {_mib(memory.training)}, passes of the networks {_mib(memory.network)}"
        )
    return "\n".join(lines)


def estimate(
    plan: Plan, member: Member, student: NetworkStudent, teacher: nn.Module, stored: StoredBytes = plain_bytes
) -> Memory:
    """What training `student` takes at the recipe's batch, on one process, of the memory of the network's device.

    Both networks end on the meta device.
    """
    training, engine, network = plan.recipe.training, plan.recipe.engine, cast(nn.Module, student.network)
    objective, at_once = member.section.objective, training.batch // training.accumulation
    trained = [value for value in network.parameters() if value.requires_grad]
    weights = weight_bytes([teacher, network], stored)
    gradients = sum(plain_bytes("", value) for value in trained)
    states = sum(state_bytes(training.optimiser, value) for value in trained)
    averages = sum(value.numel() * (EMA_DTYPES[training.ema_dtype] or value.dtype).itemsize for value in trained)
    if training.ema_device == "cpu" and engine.device != "cpu":
        averages = 0

    example = getattr(plan.backbone, "example", None)
    conditions = plan.data.batch([0])[1] if example is None else cast(Conditions, example(teacher))
    conditions = {name: _repeated(value, at_once) for name, value in conditions.items()}
    latents = torch.zeros(1, *plan.data.shape).expand(at_once, *plan.data.shape)
    accumulated = training.accumulation > 1 or (objective.data_free and member.nfe > 1)
    passes, outputs = network_passes(
        network,
        teacher,
        latents,
        conditions,
        autocast=engine.precision == "bf16",
        recomputed=engine.gradient_checkpointing,
        accumulated=accumulated,
    )
    most, asked = policy_bytes(student, Outputs(*outputs), latents, objective)
    while_passing = max(passes.most, passes.graph + most, passes.graph + asked + passes.teacher)
    total = weights + states + averages + (gradients + while_passing if accumulated else max(gradients, while_passing))
    return Memory(weights, gradients + states + averages, passes.most, most, total)


def estimate_map(
    plan: Plan,
    member: MapMember,
    network: nn.Module,
    auxiliary: nn.Module | None,
    teacher: nn.Module,
    stored: StoredBytes = plain_bytes,
) -> Memory:
    """As `estimate`, of a flow map and the auxiliary network that is trained beside it."""
    training, engine = plan.recipe.training, plan.recipe.engine
    both = [(network, training.optimiser)]
    if auxiliary is not None:
        both.append((auxiliary, member.section.auxiliary.optimiser))
    weights = weight_bytes([teacher, *(each for each, _ in both)], stored)
    states = gradients = averages = 0
    for each, optimiser in both:
        trained = [value for value in each.parameters() if value.requires_grad]
        states += sum(state_bytes(optimiser, value) for value in trained)
        gradients = max(gradients, sum(plain_bytes("", value) for value in trained))  # they take turns
    if training.ema_device == "own" or engine.device == "cpu":
        dtype = EMA_DTYPES[training.ema_dtype]
        averages = sum(value.numel() * (dtype or value.dtype).itemsize for value in network.parameters())
    at_once = training.batch // training.accumulation
    one = torch.zeros(at_once)
    conditions = {"class_labels": one.long(), "delta": one, "guidance": one}
    latents = torch.zeros(1, *plan.data.shape).expand(at_once, *plan.data.shape)
    passes, _ = network_passes(
        network,
        teacher,
        latents,
        conditions,
        autocast=engine.precision == "bf16",
        recomputed=engine.gradient_checkpointing,
        accumulated=True,
    )
    training_bytes = gradients + states + averages
    return Memory(weights, training_bytes, passes.most, 0, weights + training_bytes + passes.most)


def _repeated(value: object, count: int) -> object:
    """One sample's condition for so many."""
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
