"""What an evaluation came to, and how it is told: a table on the console, JSON, a picture, and a page."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from pitools.evaluation.measure import Column

if TYPE_CHECKING:
    from PIL.Image import Image

TEACHER = "teacher"


@dataclass(frozen=True, eq=False)
class Row:
    """A set of images that was measured: how many, its numbers by column, and its first images.

    run: the run that it is of, None for a folder.  reference: whether others were compared with it.  known: what else
    JSON tells of it.
    """

    source: str
    title: str
    count: int
    values: Mapping[str, float]
    pictures: Image
    run: str | None = None
    reference: bool = False
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def competes(self) -> bool:
        """Whether it is among those of which the best are marked: what a student has been made of is not."""
        return not self.reference and self.known.get("policy") != TEACHER


@dataclass(frozen=True, eq=False)
class Report:
    """rows: references, of runs or one for all, among them.  notes: what a reader must know."""

    settings: Mapping[str, Any]
    columns: Mapping[str, Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def shown(self) -> dict[str, Column]:
        """The columns of which there are numbers."""
        there = {key for row in self.rows for key in row.values}
        return {key: column for key, column in self.columns.items() if key in there}

    @property
    def sources(self) -> list[str]:
        """The runs and folders that were measured, in order."""
        return list(dict.fromkeys(row.source for row in self.rows if not row.reference))

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """The rows of each run, and those of all folders, below a heading; "" where there is only one of them."""
        runs = list(dict.fromkeys(row.run for row in self.rows))
        several = len(runs) > 1
        found = [(run, [row for row in self.rows if row.run == run]) for run in runs]
        return [((run or "folders") if several else "", rows) for run, rows in found]

    def title(self, row: Row) -> str:
        """A row's, with its run where there are several."""
        return f"{row.run}: {row.title}" if row.run is not None and len(self.groups) > 1 else row.title

    def best(self, key: str) -> list[Row]:
        """The rows of the best value as it is shown, of at least two that compete; none where no value is better."""
        column, rows = self.columns[key], [row for row in self.rows if row.competes and key in row.values]
        if column.better is None or len(rows) < 2:
            return []
        choose = min if column.better == "lower" else max
        best = column.shown(choose(row.values[key] for row in rows))
        return [row for row in rows if column.shown(row.values[key]) == best]


def versions() -> dict[str, str]:
    """Of what the numbers may depend on."""
    return {name: version(name) for name in ("pitools", "torch", "numpy")} | {"python": platform.python_version()}


def as_json(report: Report) -> dict[str, Any]:
    """Every number, unrounded."""

    def told(row: Row) -> dict[str, Any]:
        return {"source": row.source, "title": row.title, **row.known, "images": row.count, **row.values}

    return {
        "settings": dict(report.settings),
        "references": [told(row) for row in report.rows if row.reference],
        "rows": [told(row) for row in report.rows if not row.reference],
        "columns": {
            key: {"title": column.title, "better": column.better, "about": column.about}
            for key, column in report.shown.items()
        },
        "notes": list(report.notes),
        "versions": versions(),
        "seconds": round(report.seconds, 2),
    }


def tables_of(report: Report, width: int) -> list[Table]:
    """For the console, as many below one another as are no wider than it; the best are bold."""
    rows = [row for _, group in report.groups for row in group]
    titles = [report.title(row) for row in rows]
    parts: list[list[str]] = [[]]
    left = free = width - max(map(len, titles)) - len("images") - 4
    for key, column in report.shown.items():
        cells = [column.shown(row.values[key]) for row in rows if key in row.values]
        needed = max(map(len, [column.heading, *cells])) + 2
        if needed > left and parts[-1]:
            parts.append([])
            left = free
        parts[-1].append(key)
        left -= needed
    return [_part(report, rows, keys) for keys in parts]


def _part(report: Report, rows: Sequence[Row], keys: Sequence[str]) -> Table:
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.add_column("images", justify="right", no_wrap=True)
    for key in keys:
        table.add_column(escape(report.columns[key].heading), justify="right", no_wrap=True)
    best = {key: report.best(key) for key in keys}
    for row in rows:
        cells = []
        for key in keys:
            cell = report.columns[key].shown(row.values[key]) if key in row.values else "-"
            cells.append(f"[bold]{cell}[/]" if row in best[key] else cell)
        title = escape(report.title(row))
        table.add_row(title, str(row.count), *cells, style="dim" if row.reference else None)
    return table
