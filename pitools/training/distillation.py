"""A whole run of `pitools distill`: teacher, students, evaluation, folder.

    OUT/recipe.toml                      the recipe with every default filled in
    OUT/NAME-4nfe/                       log.jsonl, checkpoints, sheets, and student.safetensors (averaged weights)
    OUT/metrics.json, samples.png        how the students compare with the teacher, where the data says how
    OUT/../teachers/HASH/                the teacher where it is trained, shared by all recipes with the same one

Run again, it goes on where it was; what is finished is not done again.
"""

from __future__ import annotations

import os
import time
import tomllib
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from rich.console import Console
from torch import nn

from pitools.guidance import Teacher
from pitools.training.checkpoint import write_json
from pitools.training.comparison import compare, last_loss, show_comparison, table_of
from pitools.training.config import RecipeError, to_toml
from pitools.training.data import Data, Ordered
from pitools.training.engine import Engine
from pitools.training.errors import CheckpointError
from pitools.training.flow_maps import MapMember, map_members, train_map
from pitools.training.interrupt import stopping
from pitools.training.lock import locked
from pitools.training.log import tell
from pitools.training.recipe import Plan, changed_keys
from pitools.training.recipe import plan as planned
from pitools.training.students import Member, members, train_student
from pitools.training.teacher import new_teacher, trained_teacher

SHEET = 20
"""Images in a row of samples.png."""

CLAIMING = ".recipe.toml.new"


def distill(plan: Plan, console: Console) -> None:
    """Train what is missing, compare, and write the folder.

    Raises `RecipeError` before any training where the recipe, the launcher or the folder do not fit; `Stopped`,
    `DivergenceError` and `CheckpointError` as `train` does, and also for the comparison and its files.
    """
    start = time.perf_counter()
    recipe = plan.recipe
    try:
        engine = Engine(recipe.engine)
    except ImportError as error:
        raise RecipeError(
            f'distillation needs the extra "scale" ({error}): run `pip install "pitools[scale]"`'
        ) from error
    check_engine(plan, engine)
    engine.on_main(lambda: check_folder(plan))
    check_data(plan)
    # Before anything is written: sizes that no network can have are told here.
    untrained = new_teacher(plan, engine.sharded)
    engine.check(untrained)
    engine.on_main(lambda: claim(plan))

    with ExitStack() as held, stopping(f"{plan.out.name} stopped outside training"):
        engine.on_main(lambda: held.enter_context(locked(plan.out, lambda: _refuse_second(plan))))
        teacher_network = trained_teacher(plan, untrained, engine, console)
        del untrained  # a second student's teacher may take its place
        teacher = Teacher(partial(engine.call, teacher_network), recipe.teacher.guidance, plan.data.null_conditions)
        for count, member in enumerate(members(plan)):
            if engine.sharded and count and recipe.teacher.training is None:
                # The student before has sharded its teacher's weights, where it shares them: they are read anew.
                teacher_network = trained_teacher(plan, new_teacher(plan, sharded=True), engine, console)
                teacher = replace(teacher, network=partial(engine.call, teacher_network))
            if not _is_there(member, engine, console):
                train_student(plan, member, teacher_network, teacher, engine, console)
        for flow_map in map_members(plan):
            if not _is_there(flow_map, engine, console):
                train_map(plan, flow_map, teacher_network, teacher, engine, console)
        engine.on_main(lambda: _finish(plan, teacher, teacher_network, engine, start, console))


def _finish(
    plan: Plan, teacher: Teacher, teacher_network: nn.Module, engine: Engine, start: float, console: Console
) -> None:
    """Compare the students with the teacher, where the data says how, and write what the folder still lacks."""
    evaluation = plan.data.evaluation(teacher, engine.device)
    if evaluation is None:
        results: dict[str, Any] = {"students": [last_loss(plan, member) for member in all_members(plan)]}
        written = "metrics.json, recipe.toml, weights, sheets"
    else:
        with show_comparison(console) as progress:
            results, rows = compare(plan, evaluation, teacher, teacher_network, engine, progress)
        sheet = plan.out / "samples.png"
        try:
            plan.data.draw_sheet(sheet, [(title, images[:SHEET]) for title, images in rows])
        except OSError as error:
            raise CheckpointError(f"{sheet} could not be written: {error.strerror or error}") from error
        written = "metrics.json, samples.png, recipe.toml, weights"
    # Last, so that a folder with metrics.json is complete.
    results["seconds"] = round(time.perf_counter() - start, 2)
    write_json(plan.out / "metrics.json", results)
    if evaluation is not None:
        console.print(table_of(plan, results))
    tell(console, f"Wrote {plan.out}/ ({written}).")


def _is_there(member: Member | MapMember, engine: Engine, console: Console) -> bool:
    """Whether a student's weights are."""
    path = member.folder / "student.safetensors"
    if path.exists() and engine.main:
        tell(console, f"{member.label} is trained: {path}")
    return path.exists()


def all_members(plan: Plan) -> list[Member | MapMember]:
    """The students and the flow maps that a recipe asks for, in order."""
    return [*members(plan), *map_members(plan)]


def check_engine(plan: Plan, engine: Engine) -> None:
    """`RecipeError` for what the recipe asks of these processes and this device, and cannot have."""
    recipe = plan.recipe
    optimisers = {f"flow_maps.{name}.auxiliary": each.auxiliary.optimiser for name, each in recipe.flow_maps.items()}
    for section, training in (("teacher.training", recipe.teacher.training), ("training", recipe.training)):
        if training is None:
            continue
        optimisers[section] = training.optimiser
        try:
            engine.rows(training.batch, training.accumulation)
        except ValueError as error:
            raise RecipeError(f"[{section}] {error}") from None
    for section, optimiser in optimisers.items():
        if optimiser.name == "adamw8bit":
            try:
                import bitsandbytes  # noqa: F401
            except ImportError as error:
                raise RecipeError(
                    f'[{section}.optimiser] name = "adamw8bit" needs bitsandbytes ({error}): run '
                    '`pip install "pitools[scale]"`'
                ) from None
    for name, flow_map in recipe.flow_maps.items():
        objective, batch = flow_map.objective, recipe.training.batch
        size = batch // (engine.world * recipe.training.accumulation)
        for start in range(0, batch, size):  # those of other processes, too: all must refuse
            predicting, correcting = objective.split(range(start, start + size))
            if 0 < objective.share < 1 and not (predicting and correcting):
                raise RecipeError(
                    f"[flow_maps.{name}.objective] share {objective.share:g} and [training] disagree: of the "
                    f"{size} samples in a forward pass none may {'correct' if predicting else 'predict'}; raise "
                    "batch, or lower accumulation"
                )
        if recipe.engine.compile and objective.prediction.steps == 0:
            raise RecipeError(
                f"[engine] compile = true and [flow_maps.{name}.objective.prediction] steps = 0 are not supported "
                "together: torch.compile takes no forward-mode derivative; choose one"
            )
    if engine.sharded and recipe.engine.compile:
        raise RecipeError('[engine] compile = true and parallel = "fsdp2" are not supported together; choose one')


def check_data(plan: Plan) -> None:
    """`RecipeError` for data that the objectives or the backbone cannot be trained on."""
    check_teacher_data(plan)
    recipe, data = plan.recipe, plan.data
    bound = [name for name, section in recipe.students.items() if not section.objective.data_free]
    if bound and not getattr(data, "has_latents", True):
        raise RecipeError(
            f"[data] has no images, and [students.{bound[0]}.objective] starts from them; set its data_free to true, "
            "or encode images, too"
        )
    if recipe.students:
        _check_order(data, recipe.training.batch)


def check_teacher_data(plan: Plan) -> None:
    """`RecipeError` for data of another backbone, or that the teacher cannot be trained on."""
    recipe, data = plan.recipe, plan.data
    backbone = recipe.backbone["name"]
    if (made_for := getattr(data, "backbone", None)) not in (None, backbone):
        raise RecipeError(f'[data] was encoded for the backbone "{made_for}", and [backbone] is "{backbone}"')
    if recipe.teacher.training is None:
        return
    if not getattr(data, "has_latents", True):
        raise RecipeError("[data] has no images, and [teacher.training] needs them; name weights under [backbone]")
    _check_order(data, recipe.teacher.training.batch)


def _check_order(data: Data, batch: int) -> None:
    if isinstance(data, Ordered):
        try:
            data.indices(0, 0, batch, [0])
        except ValueError as error:
            raise RecipeError(f"[data] and [training]: {error}") from error


def check_folder(plan: Plan) -> None:
    """`RecipeError` for a folder that holds something other than a run of this recipe."""
    path = plan.out / "recipe.toml"
    if path.exists():
        try:
            old = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is damaged ({error}); name another folder with --set run.out=...") from None
        # A key that is newer than the folder has its default there.
        with suppress(RecipeError):
            old = tomllib.loads(_claimed(planned(old, plan.out.name)))
        if names := changed_keys(old, tomllib.loads(_claimed(plan))):
            raise RecipeError(
                f"{plan.out} holds a run of another recipe, which differs in {', '.join(names[:4])}; "
                "name another folder with --set run.out=..."
            )
        return
    # A folder that was killed while being claimed is empty but for what `claim` left.
    if plan.out.exists() and (not plan.out.is_dir() or any(entry.name != CLAIMING for entry in plan.out.iterdir())):
        raise RecipeError(f"{plan.out} exists and is not the folder of a run; name another with --set run.out=...")


def claim(plan: Plan) -> None:
    """Make the run's folder and note its recipe, unless that is done.

    `RecipeError` for a place where no folder can be, `CheckpointError` for a disk that refuses.
    """
    path, temporary = plan.out / "recipe.toml", plan.out / CLAIMING
    if path.exists():
        return
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(_claimed(plan))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise RecipeError(
            f"{plan.out} cannot be written ({error.strerror}); name another folder with --set run.out=..."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error.strerror or error}") from error


def _claimed(plan: Plan) -> str:
    """The recipe without what a run may be moved to: its folder, and the processes and devices that it runs on."""
    table = plan.table
    kept = {key: value for key, value in table.items() if key != "engine"}
    kept["run"] = {key: value for key, value in table["run"].items() if key != "out"}
    kept["engine"] = {"precision": table["engine"]["precision"]}
    kept["training"] = {key: value for key, value in table["training"].items() if key != "ema_device"}
    return to_toml(kept)


def _refuse_second(plan: Plan) -> None:
    raise RecipeError(f"{plan.out} is being written by another run; wait for it, or use --set run.out=...")
