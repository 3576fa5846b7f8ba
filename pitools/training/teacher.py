"""A recipe's teacher: its network as it starts, and frozen, with the weights that it comes with or was trained to.

OUT/../teachers/HASH/    where it is trained, shared by all recipes with the same one
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from pitools.guidance import frozen
from pitools.training.checkpoint import check_keys, placed, read_tensors, write_tensors
from pitools.training.config import RecipeError
from pitools.training.engine import Engine
from pitools.training.errors import CheckpointError
from pitools.training.jobs import FlowMatching
from pitools.training.lock import locked
from pitools.training.log import tell
from pitools.training.loop import train
from pitools.training.random import keyed_generator
from pitools.training.recipe import Plan


def new_teacher(plan: Plan, sharded: bool = False) -> nn.Module:
    """The teacher's network as it starts. `RecipeError` for sizes that it cannot have.

    sharded: whether students are; then weights may be left unread until one that shares them is.
    """
    make = plan.backbone.teacher
    if sharded:
        make = getattr(plan.backbone, "sharded_teacher", make)
    try:
        return make(keyed_generator(plan.recipe.teacher.seed, "teacher weights"))
    except ValueError as error:
        raise RecipeError(f"[backbone] {error}") from error


def trained_teacher(plan: Plan, network: nn.Module, engine: Engine, console: Console) -> nn.Module:
    """The teacher's network, frozen: as it comes, or from the cache, or trained into it."""
    section = plan.recipe.teacher
    if section.training is None:
        return engine.place(frozen(network))
    path = teacher_weights(plan)
    folder = path.parent
    waiting = partial(tell, console, f"Waiting for another run, which trains the teacher in {folder}")
    with ExitStack() as held:
        engine.on_main(lambda: held.enter_context(locked(folder, waiting)))
        if path.exists():
            if engine.main:
                tell(console, f"The teacher is {path}")
        else:
            job = FlowMatching(network, plan.data.null_conditions, section.label_dropout, section.shift)
            weights = train(
                job,
                section.training,
                plan.data,
                engine,
                seed=section.seed,
                folder=folder,
                name="teacher",
                console=console,
            )
            engine.on_main(lambda: write_tensors(path, weights))
            network = new_teacher(plan)
    load_trained(network, path)
    return frozen(network).to(engine.device)


def teacher_weights(plan: Plan) -> Path:
    """The file of a teacher that is trained, whether it is there or not."""
    return plan.out.parent / "teachers" / plan.teacher_hash / "teacher.safetensors"


def load_trained(network: nn.Module, path: Path) -> None:
    """Trained weights into a network whose other parameters are in place, and which is not frozen yet.

    `RecipeError` for a file that does not fit, `CheckpointError` for one that is not as it was written.
    """
    try:
        weights = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete it, and it is written again from the last checkpoint") from None
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    try:
        check_keys(str(path), trained, weights)
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(placed(weights[name], value, name))
    except CheckpointError as error:
        raise RecipeError(f"{path} is of another recipe ({error}); delete it") from None
