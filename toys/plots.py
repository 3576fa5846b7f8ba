"""The two pictures of a run: where samples land, and how they get there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pitools.guidance import Conditioned
from pitools.objectives.rivals import jump
from pitools.rollout import trajectory
from pitools.sampling import Look, sample
from pitools.types import Conditions, Schedule
from toys.evaluation import Evaluation
from toys.network import ToyFlowMap, ToyStudent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DATA, TEACHER, STUDENT, LOOK = "#b8bec9", "#3d4452", "#d1495b", "#00798c"
SHOWN_POINTS = 4000
PATHS = 20
SHEET_COLUMNS = 20
FRAMES = 9
JUMPS = 32

Student = tuple[str, int, ToyStudent | ToyFlowMap]
"""(name, NFE, network)."""


def plot_samples(path: Path, evaluation: Evaluation, students: Sequence[Student]) -> None:
    """Data, the teacher's samples, and each student's from the same noises."""
    rows = [("data", evaluation.data)]
    schedule = Schedule(shift=evaluation.target.shift)
    rows.append(("exact teacher, 128 steps", evaluation.teacher(schedule, students[0][1])))
    rows += [(_title(name, nfe), evaluation.student(network, nfe)) for name, nfe, network in students]
    if len(evaluation.target.shape) > 1:
        sheet(path, [(title, images[:SHEET_COLUMNS]) for title, images in rows])
        return
    limit = _limit(evaluation)
    figure, axes = _panels(len(rows))
    for axis, (title, points) in zip(axes, rows, strict=True):
        shown = points[:SHOWN_POINTS].cpu()
        colour = {"data": DATA}.get(title, TEACHER if "teacher" in title else STUDENT)
        axis.scatter(shown[:, 0], shown[:, 1], s=2, alpha=0.35, linewidths=0, color=colour, rasterized=True)
        _frame(axis, title, limit)
    _save(figure, path)


@torch.no_grad()
def plot_trajectories(path: Path, evaluation: Evaluation, students: Sequence[Student]) -> None:
    """Each student's path beside the teacher's from the same noises; dots are network evaluations.

    A policy's path is its substeps, a flow map's where it jumps to for each time.
    """
    count = PATHS if len(evaluation.target.shape) == 1 else 2
    noise = evaluation.noise[:count]
    conditions = {key: value[:count] for key, value in (evaluation.conditions or {}).items()} or None
    teacher = trajectory(Conditioned(evaluation.target, conditions), noise, 1.0, 0.0).states
    paths = [(_title(name, nfe), *student_path(network, noise, nfe, conditions)) for name, nfe, network in students]
    if count != PATHS:
        frames = [("exact teacher", teacher)] + [(title, states) for title, states, _ in paths]
        _film(path, frames)
        return
    limit, background = _limit(evaluation), evaluation.data[:SHOWN_POINTS].cpu()
    figure, axes = _panels(len(paths))
    for axis, (title, states, looks) in zip(axes, paths, strict=True):
        axis.scatter(background[:, 0], background[:, 1], s=1, color=DATA, alpha=0.4, linewidths=0, rasterized=True)
        for index in range(count):
            truth, line, dots = (z[:, index].cpu() for z in (teacher, states, looks))
            axis.plot(truth[:, 0], truth[:, 1], color=TEACHER, linewidth=4, alpha=0.3, label="exact teacher")
            axis.plot(
                line[:, 0],
                line[:, 1],
                color=STUDENT,
                linewidth=0.8,
                marker=".",
                markersize=2.5,
                label="student's path",
            )
            axis.scatter(
                dots[:, 0],
                dots[:, 1],
                s=16,
                color=LOOK,
                edgecolors="white",
                linewidths=0.6,
                zorder=3,
                label="network evaluation",
            )
        _frame(axis, title, limit)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:3], labels[:3], loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def student_path(
    student: ToyStudent | ToyFlowMap, noise: Tensor, nfe: int, conditions: Conditions | None
) -> tuple[Tensor, Tensor]:
    """All states `[S + 1, B, *shape]` of a student's roll-out, and those `[nfe, B, *shape]` that it looked at."""
    if isinstance(student, ToyFlowMap):
        one = noise.new_ones(len(noise))
        ends = torch.linspace(1, 0, JUMPS + 1, device=noise.device)
        return torch.stack([jump(student, noise, one, s * one, conditions) for s in ends]), noise.unsqueeze(0)
    looks: list[Look] = []
    sample(student, noise, nfe, conditions, callback=looks.append)
    pack, unpack, shift = student.factorisation.pack, student.factorisation.unpack, student.schedule.shift
    states = [noise]
    for look in looks:
        packed = trajectory(look.policy, pack(look.x), look.t_src, look.t_dst, shift=shift).states
        states += [unpack(state, noise.shape) for state in packed[1:]]
    return torch.stack(states), torch.stack([look.x for look in looks])


def _title(policy: str, nfe: int) -> str:
    return f"{policy}, {nfe} NFE"


def _limit(evaluation: Evaluation) -> float:
    return 1.15 * max(float(evaluation.data.abs().max()), 2.0)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, 5)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.5 * columns, 3.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(rows, columns, index + 1) for index in range(count)]
    return figure, axes


def _frame(axis: Axes, title: str, limit: float) -> None:
    axis.set_title(title, fontsize=11)
    axis.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])


def sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Rows of images `[N, 1, H, W]` in [-1, 1], one row for each title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = len(rows[0][1])
    figure = Figure(figsize=(0.62 * columns + 2.2, 0.68 * len(rows) + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, images) in zip(axes, rows, strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image[0].cpu().numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    _save(figure, path)


def _film(path: Path, runs: Sequence[tuple[str, Tensor]]) -> None:
    """Frames of roll-outs `[S + 1, B, 1, H, W]`, evenly spaced from noise to data: a row a run and sample."""
    rows = []
    for index in range(runs[0][1].shape[1]):
        for title, states in runs:
            picks = torch.linspace(0, len(states) - 1, FRAMES).round().long()
            rows.append((title, states[picks, index]))
    sheet(path, rows)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=110, bbox_inches="tight")
