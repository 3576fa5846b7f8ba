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
    """A set of images that was measured: how many, what is known of it, its numbers by column, and its first images."""

    source: str
    title: str
    count: int
    values: Mapping[str, float]
    pictures: Image
    known: Mapping[str, Any] = field(default_factory=dict)

    @property
    def competes(self) -> bool:
        """Whether it is among those of which the best are marked: what a student has been made of is not."""
        return self.known.get("policy") != TEACHER


@dataclass(frozen=True, eq=False)
class Report:
    """references: what was compared with, one for each source or one for all.  notes: what a reader must know."""

    settings: Mapping[str, Any]
    columns: Mapping[str, Column]
    references: Sequence[Row]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def shown(self) -> dict[str, Column]:
        """The columns of which there are numbers."""
        there = {key for row in (*self.references, *self.rows) for key in row.values}
        return {key: column for key, column in self.columns.items() if key in there}

    @property
    def sources(self) -> list[str]:
        """The runs and folders, in order."""
        return list(dict.fromkeys(row.source for row in self.rows))

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
        "references": [told(row) for row in report.references],
        "rows": [told(row) for row in report.rows],
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
    rows = [*report.references, *report.rows]
    several = len(report.sources) > 1
    titles = [f"{row.source}: {row.title}" if several and row.known else row.title for row in rows]
    parts: list[list[str]] = [[]]
    left = free = width - max(map(len, titles)) - 2
    for key, column in report.shown.items():
        cells = [column.shown(row.values[key]) for row in rows if key in row.values]
        needed = max(map(len, [column.heading, *cells])) + 2
        if needed > left and parts[-1]:
            parts.append([])
            left = free
        parts[-1].append(key)
        left -= needed
    return [_part(report, rows, titles, keys) for keys in parts]


def _part(report: Report, rows: Sequence[Row], titles: Sequence[str], keys: Sequence[str]) -> Table:
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for key in keys:
        table.add_column(escape(report.columns[key].heading), justify="right", no_wrap=True)
    best = {key: report.best(key) for key in keys}
    for row, title in zip(rows, titles, strict=True):
        cells = []
        for key in keys:
            cell = report.columns[key].shown(row.values[key]) if key in row.values else "-"
            cells.append(f"[bold]{cell}[/]" if row in best[key] else cell)
        table.add_row(escape(title), *cells, style="dim" if row in report.references else None)
    return table
