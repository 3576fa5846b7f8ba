"""A whole run of `pitools distill`: teacher, students, evaluation, folder.

    OUT/recipe.toml                      the recipe with every default filled in
    OUT/NAME-4nfe/                       log.jsonl, checkpoints, sheets, and student.safetensors (averaged weights)
    OUT/metrics.json, samples.png        how the students compare with the teacher, where the data says how
    OUT/../teachers/HASH/                the teacher where it is trained, shared by all recipes with the same one

Run again, it goes on where it was; what is finished is not done again.
"""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from pitools.guidance import Teacher, frozen
from pitools.policies import NetworkStudent, Outputs
from pitools.sampling import sample
from pitools.training.checkpoint import check_keys, placed, read_tensors, write_json, write_tensors
from pitools.training.config import RecipeError, to_toml
from pitools.training.data import Evaluation, OnChunk, Ordered, Searching
from pitools.training.engine import Engine
from pitools.training.errors import CheckpointError, DivergenceError
from pitools.training.flow_maps import MapMember, build_auxiliary, build_map, map_members, map_student, train_map
from pitools.training.interrupt import stopping
from pitools.training.jobs import Call, Distillation, FlowMatching
from pitools.training.lock import locked
from pitools.training.loop import EMA_DTYPES, train
from pitools.training.memory import (
    Memory,
    StoredBytes,
    network_passes,
    plain_bytes,
    policy_bytes,
    state_bytes,
    weight_bytes,
)
from pitools.training.random import keyed_generator
from pitools.training.recipe import Plan, StudentSection, changed_keys
from pitools.training.sheets import Sheet
from pitools.types import Conditions, Student

SHEET = 20
"""Images in a row of samples.png."""

CLAIMING = ".recipe.toml.new"


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


def all_members(plan: Plan) -> list[Member | MapMember]:
    """The students and the flow maps that a recipe asks for, in order."""
    return [*members(plan), *map_members(plan)]


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
    untrained = _new_teacher(plan, engine.sharded)
    engine.check(untrained)
    engine.on_main(lambda: claim(plan))

    with ExitStack() as held, stopping(f"{plan.out.name} stopped outside training"):
        engine.on_main(lambda: held.enter_context(locked(plan.out, lambda: _refuse_second(plan))))
        teacher_network = _teacher(plan, untrained, engine, console)
        del untrained  # a second student's teacher may take its place
        teacher = Teacher(partial(engine.call, teacher_network), recipe.teacher.guidance, plan.data.null_conditions)
        for count, member in enumerate(members(plan)):
            if engine.sharded and count and recipe.teacher.training is None:
                # The student before has sharded its teacher's weights, where it shares them: they are read anew.
                teacher_network = _teacher(plan, _new_teacher(plan, sharded=True), engine, console)
                teacher = replace(teacher, network=partial(engine.call, teacher_network))
            if not _is_there(member, engine, console):
                _student(plan, member, teacher_network, teacher, engine, console)
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
        results: dict[str, Any] = {"students": [_row(plan, member) for member in all_members(plan)]}
        written = "metrics.json, recipe.toml, weights, sheets"
    else:
        with show_comparison(console) as progress:
            results, rows = _compare(plan, evaluation, teacher, teacher_network, engine, progress)
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
        console.print(_table(plan, results))
    _tell(console, f"Wrote {plan.out}/ ({written}).")


def describe(plan: Plan) -> str:
    """The whole recipe as TOML, and as comments what it will train and about how much memory that takes.

    Where the backbone can say its sizes without its weights, none are loaded.
    """
    outline = getattr(plan.backbone, "outline", None)
    try:
        teacher = frozen(_new_teacher(plan) if outline is None else cast(nn.Module, outline()))
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
    states = averages = 0
    for each, optimiser in both:
        trained = [value for value in each.parameters() if value.requires_grad]
        states += sum(state_bytes(optimiser, value) + plain_bytes("", value) for value in trained)
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
    return Memory(weights, states + averages, passes.most, 0, weights + states + averages + passes.most)


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


def _repeated(value: object, count: int) -> object:
    """One sample's condition for so many."""
    return value.expand(count, *value.shape[1:]) if isinstance(value, Tensor) else value


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def check_engine(plan: Plan, engine: Engine) -> None:
    """`RecipeError` for what the recipe asks of these processes and this device, and cannot have."""
    recipe = plan.recipe
    try:
        for section, training in (("teacher.training", recipe.teacher.training), ("training", recipe.training)):
            if training is None:
                continue
            where = section
            engine.rows(training.batch, training.accumulation)
            if training.optimiser.name == "adamw8bit":
                import bitsandbytes  # noqa: F401
    except ValueError as error:
        raise RecipeError(f"[{where}] {error}") from None
    except ImportError as error:
        raise RecipeError(
            f'[{where}.optimiser] name = "adamw8bit" needs bitsandbytes ({error}): run `pip install "pitools[scale]"`'
        ) from None
    for name, flow_map in recipe.flow_maps.items():
        for rows in engine.rows(recipe.training.batch, recipe.training.accumulation):
            predicting, correcting = flow_map.objective.split(rows)
            if 0 < flow_map.objective.share < 1 and not (predicting and correcting):
                raise RecipeError(
                    f"[flow_maps.{name}.objective] share {flow_map.objective.share:g} and [training] disagree: of "
                    f"{len(rows)} samples in a forward pass none would {'correct' if predicting else 'predict'}; raise "
                    "batch, or lower accumulation"
                )
    if engine.sharded and recipe.engine.compile:
        raise RecipeError('[engine] compile = true and parallel = "fsdp2" are not supported together; choose one')


def check_data(plan: Plan) -> None:
    """`RecipeError` for data that the objectives or the backbone cannot be trained on."""
    recipe, data = plan.recipe, plan.data
    backbone = recipe.backbone["name"]
    if (made_for := getattr(data, "backbone", None)) not in (None, backbone):
        raise RecipeError(f'[data] was encoded for the backbone "{made_for}", and [backbone] is "{backbone}"')
    bound = [name for name, section in recipe.students.items() if not section.objective.data_free]
    if bound and not getattr(data, "has_latents", True):
        raise RecipeError(
            f"[data] has no images, and [students.{bound[0]}.objective] starts from them; set its data_free to true, "
            "or encode images, too"
        )
    if isinstance(data, Ordered):
        for training in (recipe.training if recipe.students else None, recipe.teacher.training):
            if training is not None:
                try:
                    data.indices(0, 0, training.batch, [0])
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


def _new_teacher(plan: Plan, sharded: bool = False) -> nn.Module:
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


def _teacher(plan: Plan, network: nn.Module, engine: Engine, console: Console) -> nn.Module:
    """The teacher's network, frozen: as it comes, or from the cache, or trained into it."""
    section = plan.recipe.teacher
    if section.training is None:
        return engine.place(frozen(network))
    folder = plan.out.parent / "teachers" / plan.teacher_hash
    path = folder / "teacher.safetensors"
    waiting = partial(_tell, console, f"Waiting for another run, which trains the teacher in {folder}")
    with ExitStack() as held:
        engine.on_main(lambda: held.enter_context(locked(folder, waiting)))
        if path.exists():
            if engine.main:
                _tell(console, f"The teacher is {path}")
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
            network = _new_teacher(plan)
    _load(network, path)
    return frozen(network).to(engine.device)


def build_student(plan: Plan, member: Member, teacher_network: nn.Module) -> NetworkStudent:
    """A student as it starts: a copy of the teacher, with a head."""
    head = member.section.head
    generator = keyed_generator(plan.recipe.run.seed, f"head {member.label}")
    network = plan.backbone.student(teacher_network, head, generator, plan.recipe.teacher.guidance.embedded)
    return NetworkStudent(network, head, member.section.schedule(member.nfe), plan.backbone.factorisation)


def _student(
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


def _is_there(member: Member | MapMember, engine: Engine, console: Console) -> bool:
    """Whether a student's weights are."""
    path = member.folder / "student.safetensors"
    if path.exists() and engine.main:
        _tell(console, f"{member.label} is trained: {path}")
    return path.exists()


@contextmanager
def show_comparison(console: Console) -> Iterator[Callable[[str], OnChunk]]:
    """Within it, shows for each title how many samples are drawn: as a bar, or a line for each chunk."""
    if not console.is_terminal:

        def lines(title: str) -> OnChunk:
            return lambda done, total: _tell(console, f"Comparing: {title}, {done}/{total} samples")

        yield lines
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def bars(title: str) -> OnChunk:
            task = progress.add_task(f"Comparing: {title}", total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bars


@dataclass(frozen=True)
class Contender:
    """A student that is compared. row: what is known of it.  student: made with its network as it is called."""

    row: Mapping[str, Any]
    title: str
    network: nn.Module
    folder: Path
    student: Callable[[Call], Student]


def _contenders(plan: Plan, teacher_network: nn.Module) -> Iterator[Contender]:
    """Every student, a flow map once for each strength of guidance; not trained yet."""
    for member in members(plan):
        row, title = {"policy": member.name, "nfe": member.nfe}, f"{member.name}, {member.nfe} NFE"
        student = build_student(plan, member, teacher_network)
        network = cast(nn.Module, student.network)
        yield Contender(row, title, network, member.folder, partial(_with_network, student))
    for flow_map in map_members(plan):
        network = build_map(plan, flow_map, teacher_network)
        for strength in flow_map.strengths(plan):
            row, title = {"policy": flow_map.name, "nfe": flow_map.nfe}, f"{flow_map.name}, {flow_map.nfe} NFE"
            if strength is not None:
                row, title = {**row, "guidance": strength}, f"{title}, γ = {strength:g}"
            student_of = partial(map_student, plan, flow_map, strength=strength)
            yield Contender(row, title, network, flow_map.folder, student_of)


def _with_network(student: NetworkStudent, network: Call) -> NetworkStudent:
    return replace(student, network=network)


def _compare(
    plan: Plan,
    evaluation: Evaluation,
    teacher: Teacher,
    teacher_network: nn.Module,
    engine: Engine,
    progress: Callable[[str], OnChunk],
) -> tuple[dict[str, Any], list[tuple[str, Tensor]]]:
    """The contents of metrics.json, and the samples behind them. `DivergenceError` for samples without metrics."""
    steps = plan.recipe.teacher.reference_steps
    title = f"teacher, {steps} steps"
    reference = evaluation.reference(1 / steps, 1.0, progress(title))
    samples = [(title, reference)]
    results: dict[str, Any] = {"teacher": _metrics(evaluation, title, reference, reference)}
    strengths = {each for flow_map in map_members(plan) for each in flow_map.strengths(plan) if each is not None}
    if others := sorted(strengths - {teacher.guidance.scale}):
        results["teacher_with_guidance"] = []
        for strength in others:
            title = f"teacher, {steps} steps, γ = {strength:g}"
            guided = replace(teacher, guidance=replace(teacher.guidance, scale=strength))
            own = cast(Evaluation, plan.data.evaluation(guided, engine.device))
            images = own.reference(1 / steps, 1.0, progress(title))
            metrics = _metrics(evaluation, title, images, reference)
            results["teacher_with_guidance"].append({"guidance": strength, **metrics})
            samples.append((title, images))
    rows: list[dict[str, Any]] = []
    searched: list[dict[str, Any]] = []
    for contender in _contenders(plan, teacher_network):
        _load(contender.network, contender.folder / "student.safetensors")
        network = contender.network.eval().to(engine.device)
        try:
            student = contender.student(partial(engine.call, network))
            images = evaluation.student(student, contender.row["nfe"], progress(contender.title))
        except ValueError as error:  # a policy's, about what its network answered
            raise DivergenceError(
                f"{contender.title} cannot be sampled: {error}; train it with a lower learning rate"
            ) from error
        metrics = _metrics(evaluation, contender.title, images, reference)
        rows.append({**contender.row, "steps": plan.recipe.training.steps, **metrics})
        samples.append((contender.title, images))
        # For the teacher, at its own strength of guidance.
        own = contender.row.get("guidance", teacher.guidance.scale) == teacher.guidance.scale
        if isinstance(evaluation, Searching) and evaluation.best_of and own:
            title = f"teacher, best of {evaluation.best_of} by {contender.row['policy']}, {contender.row['nfe']} NFE"
            images = evaluation.search(student, contender.row["nfe"], 1 / steps, progress(title))
            found = {"policy": contender.row["policy"], "nfe": contender.row["nfe"], "best_of": evaluation.best_of}
            searched.append({**found, **_metrics(evaluation, title, images, reference)})
            samples.append((title, images))
    if searched:
        results["teacher_searched"] = searched
    return {**results, "students": rows}, samples


def _row(plan: Plan, member: Member | MapMember) -> dict[str, Any]:
    """What is known of a student that nothing compares with its teacher: its last logged loss."""
    lines = (member.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    loss = json.loads(lines[-1])["loss"]
    return {"policy": member.name, "nfe": member.nfe, "steps": plan.recipe.training.steps, "loss": loss}


def _metrics(evaluation: Evaluation, title: str, samples: Tensor, reference: Tensor) -> dict[str, float]:
    if not bool(samples.isfinite().all()):
        raise DivergenceError(
            f"{title}: {int((~samples.isfinite()).sum())} values of the samples are not finite; "
            "train it with a lower learning rate"
        )
    return dict(evaluation.metrics(samples, reference))


def _load(network: nn.Module, path: Path) -> None:
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


HEADINGS = {
    "class_accuracy": "right class",
    "frechet_data": "FD data",
    "frechet_teacher": "FD teacher",
    "diversity_ratio": "diversity",
    "endpoint_rmse": "RMSE",
    "score": "score",
}


def _tell(console: Console, message: str) -> None:
    # A path may look like markup, and is easier to copy from one line.
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _table(plan: Plan, results: Mapping[str, Any]) -> Table:
    table = Table(title=f"{plan.out.name}, {results['seconds']} s")
    table.add_column("student")
    table.add_column("NFE", justify="right")
    teacher: Mapping[str, float] = results["teacher"]
    for key in teacher:
        table.add_column(HEADINGS.get(key, key), justify="right")
    shown = [{"policy": "teacher", "nfe": plan.recipe.teacher.reference_steps, **teacher}]
    shown += [{**shown[0], **row} for row in results.get("teacher_with_guidance", [])]
    for row in results.get("teacher_searched", []):
        shown.append({**row, "policy": f"best of {row['best_of']} by {row['policy']}", "nfe": shown[0]["nfe"]})
    for row in [*shown, *results["students"]]:
        name = str(row["policy"]) + (f", γ = {row['guidance']:g}" if "guidance" in row else "")
        table.add_row(name, str(row["nfe"]), *(_show(key, row[key]) for key in teacher))
    return table


def _show(key: str, value: float) -> str:
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4f}"
