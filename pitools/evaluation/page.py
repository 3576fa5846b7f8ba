"""The page of an evaluation: one HTML file with everything in it, that needs no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

from pitools.evaluation.report import Report, Row, versions
from pitools.evaluation.sheets import png

if TYPE_CHECKING:
    from PIL.Image import Image


def page(report: Report) -> str:
    """The contents of the file."""
    settings, shown = report.settings, report.shown
    marked = any(report.best(key) for key in shown)
    lead = f"Measured against {settings['reference']}, by features of {settings['features']}."
    if marked:
        lead += " The best of each column is marked; ↓ is better low, ↑ is better high."
    told = {key: value for key, value in settings.items() if value not in (None, [], "")}
    template = Template(files("pitools.evaluation").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"Evaluation of {', '.join(report.sources)}"),
        lead=escape(lead),
        table=_table(report),
        notes=_notes(report.notes),
        sheets="\n".join(_sheets(report)),
        width=f"{max(row.pictures.width for row in report.rows)}px",
        glossary=_pairs({column.heading: column.about for column in shown.values()}),
        settings=_pairs({key.replace("_", " "): _said(value) for key, value in told.items()}),
        versions=escape(", ".join(f"{name} {each}" for name, each in versions().items())),
    )


def _table(report: Report) -> str:
    shown = report.shown
    best = {key: report.best(key) for key in shown}
    head = "".join(f'<th scope="col">{escape(column.heading)}</th>' for column in shown.values())
    lines = [f'<thead><tr><th scope="col"></th><th scope="col">images</th>{head}</tr></thead>', "<tbody>"]

    def line(row: Row) -> str:
        cells = [f"<td>{row.count:,}</td>"]
        for key, column in shown.items():
            cell = escape(column.shown(row.values[key])) if key in row.values else "–"
            cells.append(f"<td><b>{cell}</b></td>" if row in best[key] else f"<td>{cell}</td>")
        return f'<tr{_kind(row)}><th scope="row">{escape(row.title)}</th>{"".join(cells)}</tr>'

    for heading, rows in report.groups:
        if heading:
            span = f'<th scope="rowgroup" colspan="{len(shown) + 2}">'
            lines.append(f'<tr class="group">{span}{escape(heading)}</th></tr>')
        lines += map(line, rows)
    return "\n".join([*lines, "</tbody>"])


def _sheets(report: Report) -> list[str]:
    lines: list[str] = []
    for heading, rows in report.groups:
        lines += [f"<h3>{escape(heading)}</h3>"] if heading else []
        lines += ['<div class="sheets">', *map(_figure, rows), "</div>"]
    return lines


def _kind(row: Row) -> str:
    return ' class="reference"' if row.reference else ""


def _figure(row: Row) -> str:
    title = escape(row.title)
    alt = escape(f"images of {row.source}, {row.title}")
    return f'<figure{_kind(row)}><figcaption>{title}</figcaption><img src="{_uri(row.pictures)}" alt="{alt}"></figure>'


def _uri(picture: Image) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(picture)).decode()}"


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<div class="notes">{"".join(f"<p>{escape(note)}</p>" for note in notes)}</div>'


def _pairs(pairs: dict[str, str]) -> str:
    return "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in pairs.items())


def _said(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{each} for {key}" for key, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
