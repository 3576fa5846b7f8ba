"""What `pitools bench` prints and writes: a table for each part, and all of it as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pitools.bench import Answer, Report
from pitools.bench.parts import NFE, SEGMENT_SUBSTEPS, WINDOW, Row
from pitools.bench.timing import Ceilings

TITLES = {
    "rollouts": "Roll-outs from t = 1 to 0, Euler",
    "velocity": "One velocity",
    "backward": f"Forward and backward: one velocity, and the mean velocity of a window of {WINDOW} substeps",
    "training": "A training step of toys/digits.toml",
    "sampling": f"Sampling without a network: {NFE} segments of {SEGMENT_SUBSTEPS} substeps",
}
SIDES = ("elementwise", "plain", "fused", "no compiler")
COUNTED = (
    "FLOPs are counted as B·L·K·(4C + 20) an evaluation: two products and about 20 for the exponential. Bytes: every "
    "number of the mixture, x_src, x and the result once."
)


def show(report: Report, rounds: int, console: Console) -> None:
    """Print the tables."""
    where = report.machine
    console.print(
        f"{where['device']}, {where['processor']}, {where['threads']} threads, torch {where['torch']}, compiler: "
        f"{where['compiler']}\n"
        f"float32; medians of {rounds} rounds (3 where they are long), the sides taking turns after a warm-up\n"
        f"ceilings, the best in this run: matmul {report.ceilings.gflops:,.0f} GFLOP/s, "
        f"copy {report.ceilings.gbytes:,.1f} GB/s",
        markup=False,
        highlight=False,
    )
    for part, title in TITLES.items():
        if part in report.skipped:
            console.print(f"\n{title}: skipped, {report.skipped[part]}", markup=False, highlight=False)
        elif rows := [row for row in report.rows if row.part == part]:
            console.print()
            console.print(_table(title, rows))
    if any(row.gflops is not None for row in report.rows):
        console.print()
        console.print(_rates(report.rows, report.ceilings))
        console.print(COUNTED, markup=False, highlight=False)


def show_answers(answers: Sequence[Answer], console: Console) -> None:
    """Print what `--explain` found."""
    table = Table(title="Which path a roll-out takes", title_justify="left")
    for heading in ("request", "path", "why"):
        table.add_column(heading)
    for answer in answers:
        table.add_row(*map(escape, (answer.request, answer.path, answer.reason)))
    console.print(table)


def as_json(report: Report, rounds: int) -> str:
    """The report; every row has its sides and their ratios."""
    return json.dumps({**asdict(report), "rounds": rounds, "dtype": "float32", "counted": COUNTED}, indent=2) + "\n"


def as_json_of_answers(answers: Sequence[Answer]) -> str:
    """What `--explain` found."""
    return json.dumps([asdict(answer) for answer in answers], indent=2) + "\n"


def writable(path: Path | None) -> None:
    """`ValueError` unless a file can be written there."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"--json {path} cannot be written; name a file in a folder that exists")


def _table(title: str, rows: Sequence[Row]) -> Table:
    """Times and ratios."""
    sides = [side for side in SIDES if any(side in row.milliseconds for row in rows)]
    ratios = list(dict.fromkeys(name for row in rows for name in row.ratios))
    shares = any(row.policy_share for row in rows)
    headings = ["sub-\nsteps", *(f"{_broken(side)}\nms" for side in sides), *map(_broken, ratios)]
    table = _titled(title, headings + (["policy,\nplain", "policy,\nfused"] if shares else []))
    for row in rows:
        cells = [_named(row), str(row.substeps)]
        cells += [_milliseconds(row.milliseconds.get(side)) for side in sides]
        cells += [f"{row.ratios[name]:.1f}×" if name in row.ratios else "" for name in ratios]
        cells += [f"{row.policy_share[side]:.1%}" for side in ("plain", "fused")] if shares else []
        table.add_row(*map(escape, cells))
    return table


def _rates(rows: Sequence[Row], most: Ceilings) -> Table:
    """What the fused side does in a second."""
    table = _titled("Fused, against the ceilings", ["", "by", "GFLOP/s", "of matmul", "GB/s", "of copy"])
    for row in rows:
        if row.gflops is not None and row.gbytes is not None:
            rates = f"{row.gflops:.3g}", f"{row.gflops / most.gflops:.0%}"
            moved = f"{row.gbytes:.3g}", f"{row.gbytes / most.gbytes:.0%}"
            table.add_row(*map(escape, (_named(row), row.part, row.by, *rates, *moved)))
    return table


def _titled(title: str, headings: Sequence[str]) -> Table:
    # Without frames and in narrow columns: nine of them on a line of 80.
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("shape\nB, L, K, C", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _named(row: Row) -> str:
    return f"{row.name}\n{', '.join(map(str, row.sizes.values()))}"


def _broken(name: str) -> str:
    """In narrow lines."""
    return (
        name.replace("elementwise", "ele-\nment-\nwise").replace("no compiler", "no\ncom-\npiler").replace("/", " /\n")
    )


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
