"""The table and the pictures of `pitools rivals`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from toys.experiment import PERCENTAGES
from toys.jobs import DELTAS, LEVELS, METHODS, TRIO, Found
from toys.targets import load_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {
    "sliced_wasserstein": "SW",
    "off_mode": "off mode, %",
    "same_mode": "same mode, %",
    "modes_covered": "modes",
    "spread": "spread",
    "class_accuracy": "right class, %",
    "diversity": "diversity",
    "endpoint_rmse": "RMSE",
}
COLOURS = {"prediction": "#00798c", "dmd": "#edae49", "freeflow": "#d1495b"}
TITLES = {"prediction": "prediction alone", "dmd": "correction alone (DMD)", "freeflow": "both (FreeFlow)"}


@dataclass(frozen=True)
class Row:
    """A line of a table: what is compared, and its runs."""

    title: str
    runs: Sequence[Found]

    def of(self, key: str) -> tuple[float, float]:
        """Mean and standard deviation over the seeds of a metric, or of `steps`, `teacher_calls`, `seconds`."""
        values = [float(run.metrics[key] if key in run.metrics else getattr(run, key)) for run in self.runs]
        return mean(values), stdev(values) if len(values) > 1 else 0.0


def table(rows: Sequence[Row], teacher: Mapping[str, float]) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    keys = [key for key in COLUMNS if key in teacher]
    heads = [*(COLUMNS[key] for key in keys), "steps", "million calls", "s"]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " ---: |" * len(heads)]
    lines.append("| teacher | " + " | ".join(_show(key, teacher[key]) for key in keys) + " | | | |")
    for row in rows:
        cells = [_show(key, *row.of(key)) if len(row.runs) > 1 else _show(key, row.of(key)[0]) for key in keys]
        cells += [f"{row.of('steps')[0]:.0f}", f"{row.of('teacher_calls')[0] / 1e6:.2f}", f"{row.of('seconds')[0]:.0f}"]
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def auxiliary_table(rows: Sequence[Row]) -> str:
    """Markdown: E‖g - v_N‖/E‖v_N - u‖ of the auxiliary networks at each noise level; empty where there are none."""
    lines = ["| r | " + " | ".join(map(str, LEVELS)) + " |", "| --- |" + " ---: |" * len(LEVELS)]
    for row in rows:
        runs = [run.auxiliary_errors for run in row.runs if run.auxiliary_errors]
        if runs:
            lines.append(f"| {row.title} | " + " | ".join(f"{mean(at):.2f}" for at in zip(*runs, strict=True)) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _show(key: str, value: float, std: float | None = None) -> str:
    digits, scale = {"modes_covered": (1, 1), **dict.fromkeys(PERCENTAGES, (1, 100))}.get(key, (3, 1))
    return " ± ".join(f"{scale * number:.{digits}f}" for number in (value, std) if number is not None)


def plot(errors: Path, modes: Path, found: Mapping[str, Sequence[Found]]) -> None:
    """The error along the path against δ, and off-mode against same-mode rates: a panel for each target."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def panels(path: Path, names: Sequence[str], draw: Callable[[Axes, Sequence[Found]], None]) -> None:
        if not names:
            return
        figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            draw(axis, found[name])
            axis.set_title(name, fontsize=10)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        figure.savefig(path, dpi=90)

    panels(errors, list(found), _draw_errors)
    panels(modes, [name for name in found if load_target(name).modes], _draw_modes)


def _draw_errors(axis: Axes, found: Sequence[Found]) -> None:
    for method in TRIO:
        runs = [run.path_errors for run in found if run.job.method == method]
        for run in runs:
            axis.plot(DELTAS, run, color=COLOURS[method], alpha=0.25, linewidth=0.8)
        axis.plot(DELTAS, [mean(at) for at in zip(*runs, strict=True)], color=COLOURS[method], label=TITLES[method])
    axis.set(xlabel="δ", ylabel="relative error to the teacher's path", yscale="log")


def _draw_modes(axis: Axes, found: Sequence[Found]) -> None:
    for index, method in enumerate(METHODS):
        runs = [run.metrics for run in found if run.job.method == method]
        colour = COLOURS.get(method, f"C{index}")
        x, y = ([metrics[key] for metrics in runs] for key in ("same_mode", "off_mode"))
        axis.scatter(x, y, s=24 if method in TRIO else 10, color=colour, label=method)
    axis.set(xlabel="same mode", ylabel="off mode")
