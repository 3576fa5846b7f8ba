"""How students compare with their teacher: metrics.json, and the samples behind it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from pitools.guidance import Teacher
from pitools.policies import NetworkStudent
from pitools.training.data import Evaluation, OnChunk, Searching
from pitools.training.engine import Engine
from pitools.training.errors import DivergenceError
from pitools.training.flow_maps import MapMember, build_map, map_members, map_student
from pitools.training.jobs import Call
from pitools.training.log import tell
from pitools.training.recipe import Plan
from pitools.training.students import Member, build_student, members
from pitools.training.teacher import load_trained
from pitools.types import Student

QUIET_SECONDS = 10
"""Between two lines about the same samples."""


@contextmanager
def show_comparison(console: Console, doing: str = "Comparing") -> Iterator[Callable[[str], OnChunk]]:
    """Within it, shows for each title how many samples are done: as a bar, or now and then a line.

    doing: what is done to them; "" where titles say so.
    """
    before = f"{doing}: " if doing else ""
    if not console.is_terminal:

        def lines(title: str) -> OnChunk:
            told = -math.inf

            def line(done: int, total: int) -> None:
                nonlocal told
                if done == total or time.monotonic() - told >= QUIET_SECONDS:
                    tell(console, f"{before}{title}, {done}/{total} samples")
                    told = time.monotonic()

            return line

        yield lines
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def bars(title: str) -> OnChunk:
            task = progress.add_task(f"{before}{title}", total=None)
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


def contenders(plan: Plan, teacher_network: nn.Module) -> Iterator[Contender]:
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


def other_strengths(plan: Plan, teacher: Teacher) -> list[tuple[float, Teacher]]:
    """The strengths of guidance, other than the teacher's own, of flow maps that are compared; the teacher at each."""
    strengths = {each for flow_map in map_members(plan) for each in flow_map.strengths(plan) if each is not None}
    others = sorted(strengths - {teacher.guidance.scale})
    return [(each, replace(teacher, guidance=replace(teacher.guidance, scale=each))) for each in others]


def _with_network(student: NetworkStudent, network: Call) -> NetworkStudent:
    return replace(student, network=network)


def compare(
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
    for strength, guided in other_strengths(plan, teacher):
        title = f"teacher, {steps} steps, γ = {strength:g}"
        own = cast(Evaluation, plan.data.evaluation(guided, engine.device))
        images = own.reference(1 / steps, 1.0, progress(title))
        metrics = _metrics(evaluation, title, images, reference)
        results.setdefault("teacher_with_guidance", []).append({"guidance": strength, **metrics})
        samples.append((title, images))
    rows: list[dict[str, Any]] = []
    searched: list[dict[str, Any]] = []
    for contender in contenders(plan, teacher_network):
        load_trained(contender.network, contender.folder / "student.safetensors")
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
            metrics = _metrics(evaluation, title, images, reference)
            # Its noises are others than the reference's: distances to the same end points mean nothing.
            searched.append({**found, **{key: metrics[key] for key in metrics if key not in PAIRED}})
            samples.append((title, images))
    if searched:
        results["teacher_searched"] = searched
    return {**results, "students": rows}, samples


def last_loss(plan: Plan, member: Member | MapMember) -> dict[str, Any]:
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


PAIRED = ("frechet_teacher", "endpoint_rmse")
"""Metrics of samples that share their noises with the teacher's."""

HEADINGS = {
    "class_accuracy": "right class",
    "frechet_data": "FD data",
    "frechet_teacher": "FD teacher",
    "diversity_ratio": "diversity",
    "endpoint_rmse": "RMSE",
    "score": "score",
}


def table_of(plan: Plan, results: Mapping[str, Any]) -> Table:
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
        table.add_row(name, str(row["nfe"]), *(_show(key, row[key]) if key in row else "-" for key in teacher))
    return table


def _show(key: str, value: float) -> str:
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4f}"
