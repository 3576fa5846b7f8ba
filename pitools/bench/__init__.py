"""`pitools bench`: what fused roll-outs gain, as ratios of two sides of the same run, against the machine's ceilings.

    elementwise  the formula as it is written down, one pass over [B, K, C, H, W] for each substep
    plain        the library's own path without kernels
    fused        what the library takes by itself
    no compiler  what it takes on a CPU where there is no compiler

A part is a function in `PARTS` that lists cases; each case measures one `Row`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pitools.bench.explain import Answer as Answer
from pitools.bench.explain import explain as explain
from pitools.bench.parts import SHAPES as SHAPES
from pitools.bench.parts import TINY as TINY
from pitools.bench.parts import Case, Row, Settings, backward, rollouts, sampling, velocities
from pitools.bench.step import Skipped, training
from pitools.bench.timing import Ceilings, ceilings, machine

PARTS: Mapping[str, Callable[[Settings], list[Case]]] = MappingProxyType(
    {"rollouts": rollouts, "velocity": velocities, "backward": backward, "training": training, "sampling": sampling}
)


@dataclass(frozen=True)
class Report:
    """skipped: the reason for each part that could not be measured here."""

    machine: Mapping[str, str | int]
    ceilings: Ceilings
    rows: Sequence[Row]
    skipped: Mapping[str, str]


def chosen(only: str | None) -> list[str]:
    """The parts that `only` names, with commas between; all by default. `ValueError` for an unknown one."""
    if only is None:
        return list(PARTS)
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PARTS:
            raise ValueError(f"--only {name!r} is no part of the benchmark; the parts are {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def run(parts: Sequence[str], settings: Settings, console: Console) -> Report:
    """Measure the parts of these names, with a bar of the rows that are done."""
    cases = [(part, case) for part in parts for case in PARTS[part](settings)]
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Between rows alone, so that its drawing takes no time from what is measured.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("ceilings", total=len(cases) + 1)
        progress.refresh()
        tiny = settings.shapes is TINY
        most = ceilings(settings.device, tiny)
        for part, case in cases:
            progress.update(task, advance=1, description=f"{part}: {case.label}", refresh=True)
            if part in skipped:
                continue
            try:
                rows.append(case.measure())
            except Skipped as reason:
                skipped[part] = str(reason)
        progress.update(task, advance=1, refresh=True)
        most = most.or_more(ceilings(settings.device, tiny))  # at a calmer moment, maybe
    return Report(machine(settings.device), most, rows, skipped)
