"""The table, the page and the JSON of an evaluation, and the page in a browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from mixtures import rand, random
from PIL import Image
from rich.console import Console

from pitools.evaluation.measure import COLUMNS, columns_of
from pitools.evaluation.page import page
from pitools.evaluation.report import Report, Row, as_json, tables_of
from pitools.evaluation.sheets import COLUMNS as PICTURES
from pitools.evaluation.sheets import GAP, SIDE, sheet, thumbnails

STRIP = thumbnails(2 * rand(random(0), 4, 1, 8, 8) - 1)


def row(source: str, title: str, policy: str = "gm", **values: float) -> Row:
    """Of a run."""
    return Row(source, title, 1234, values, STRIP, source, known={"policy": policy, "nfe": 1})


def reference(source: str, run: str | None, **values: float) -> Row:
    return Row(source, f"{source} (reference)", 20, values, STRIP, run, reference=True)


def report(**changes: object) -> Report:
    """Of two runs, and what a run may be called."""
    one, two = "runs/digits", 'runs/<b>"two"</b> & γ'
    own = Report(
        {"reference": "data", "features": "digits", "samples": None, "seed": 0},
        columns_of(False, True, ["clip:<model>"]),
        [
            reference("data", one, diversity=17.0),
            reference("data", two),
            row(one, "teacher, 64 steps", "teacher", frechet=1.0, precision=0.99, diversity=1.0),
            row(one, "gm, 1 NFE", frechet=3.0004, precision=0.9501, diversity=2.0),
            row(two, "gm, 1 NFE", frechet=2.0, precision=0.9, diversity=3.0),
            row(two, "dx, 1 NFE", frechet=9.0, precision=0.95009, **{"clip:<model>": 0.25}),
        ],
        ["Too few samples for <anything>."],
    )
    return replace(own, **changes)  # type: ignore[arg-type]


def test_the_best_are_those_of_the_students_as_they_are_shown() -> None:
    told = report()
    assert [each.title for each in told.best("frechet")] == ["gm, 1 NFE"]
    assert told.best("frechet")[0].source != "runs/digits"  # and not the teacher
    assert [each.title for each in told.best("precision")] == ["gm, 1 NFE", "dx, 1 NFE"]  # 95.0% both
    assert told.best("diversity") == []  # neither way is better
    assert told.best("clip:<model>") == []  # of one there is no best
    assert list(told.shown) == ["frechet", "precision", "diversity", "clip:<model>"]


def test_every_column_of_inception_has_its_usual_name() -> None:
    titles = [column.title for column in columns_of(True, False, []).values()]
    assert titles[:4] == ["FID", "pFID", "KID", "IS"]
    assert "per prompt" in titles
    assert len(titles) == len(COLUMNS) == len(set(titles))
    assert "per class" in [column.title for column in columns_of(False, True, []).values()]


def printed(told: Report, width: int) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        for table in tables_of(told, width):
            console.print(table)
    return capture.get()


@pytest.mark.parametrize("width", [60, 100, 200])
def test_the_table_fits_the_console_and_loses_nothing(width: int) -> None:
    text = printed(report(), width)
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("1234") >= 4
    assert "…" not in text
    for cell in ("FD ↓", "precision ↑", "diversity", "clip:<model> ↑", "3.000", "2.000", "95.0%", "17.000", "0.2500"):
        assert cell in text
    assert 'runs/<b>"two"</b> & γ: dx, 1 NFE' in text


def test_the_json_has_every_number_as_it_is() -> None:
    told = json.loads(json.dumps(as_json(report())))
    assert [line["title"] for line in told["references"]] == ["data (reference)"] * 2
    assert told["rows"][1] == {
        "source": "runs/digits", "title": "gm, 1 NFE", "policy": "gm", "nfe": 1, "images": 1234,
        "frechet": 3.0004, "precision": 0.9501, "diversity": 2.0,
    }  # fmt: skip
    assert told["columns"]["precision"]["better"] == "higher"
    assert set(told["versions"]) == {"pitools", "torch", "numpy", "python"}
    assert told["settings"]["seed"] == 0


class Elements(HTMLParser):
    """What a page consists of."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.sources: list[str] = []
        self.cells: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.cells.setdefault(tag, []).append(data)


def test_the_page_is_one_file_that_asks_nobody() -> None:
    text = page(report())
    elements = Elements(text)
    assert "script" not in elements.names
    assert all(source.startswith("data:") for source in elements.sources)
    assert not re.search(r"@import|url\(|https?:", text)
    assert elements.names.count("img") == 6  # the references have pictures, too
    assert "$" not in text


def test_the_page_tells_what_the_report_does() -> None:
    elements = Elements(page(report()))
    assert elements.cells["b"] == ["95.0%", "2.000", "95.0%"]
    text = "".join(elements.cells["main"])
    assert 'runs/<b>"two"</b> & γ' in text  # escaped, and so itself
    assert "Too few samples for <anything>." in text
    assert all(COLUMNS[key].about in text for key in ("frechet", "precision", "diversity"))
    assert COLUMNS["recall"].about not in text
    assert elements.names.count("h3") == 2  # a heading for each run
    assert elements.cells["td"].count("1,234") == 4
    alone = Elements(page(report(rows=report().rows[2:4], notes=[])))
    assert "h3" not in alone.names
    assert "b" not in alone.names  # one student has no better


def test_a_folder_stands_beside_its_reference() -> None:
    folders = [Row(name, name[-1], 9, {"frechet": value}, STRIP) for name, value in (("mine", 2.0), ("their/s", 3.0))]
    for one in ("coco", "mine"):  # which may be measured against itself
        elements = Elements(page(report(rows=[reference(one, None, diversity=1.0), *folders])))
        assert elements.cells["b"] == ["2.000"]
        assert elements.names.count("img") == 3
        assert "h3" not in elements.names
        assert "Evaluation of mine, their/s" in elements.cells["h1"]
    beside = Elements(page(report(rows=[*report().rows[:1], *folders])))
    assert beside.cells["h3"] == ["runs/digits", "folders"]


def test_thumbnails_are_the_images() -> None:
    images = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    strip = thumbnails(images)
    assert strip.size == (PICTURES * (SIDE + GAP) - GAP, SIDE)
    levels = [strip.getpixel((column * (SIDE + GAP) + SIDE // 2, SIDE // 2)) for column in range(4)]
    assert levels == [(0, 0, 0, 255), (128, 128, 128, 255), (255, 255, 255, 255), (0, 0, 0, 0)]
    # A wide one is cut to its middle; small pixels stay sharp.
    wide = torch.cat([-torch.ones(1, 8, 8), torch.ones(1, 8, 8), -torch.ones(1, 8, 8)], 2)
    assert thumbnails([wide]).crop((0, 0, SIDE, SIDE)).getcolors() == [(SIDE * SIDE, (255, 255, 255, 255))]
    large = 2 * rand(random(1), 12, 3, 200, 300) - 1
    assert thumbnails(large).size == strip.size


def test_the_sheet_has_its_titles() -> None:
    picture = sheet([("teacher, γ = 2", STRIP), ("π", STRIP)])
    assert picture.height == 2 * (SIDE + GAP) + GAP
    titles = picture.crop((0, 0, picture.width - STRIP.width - GAP, picture.height))
    assert titles.convert("L").getextrema() == (0, 255)
    # Greek is drawn as itself, and not as the box of a letter that the font lacks.
    greek, other = (sheet([(letter, STRIP)]).crop((0, 0, 24, SIDE)) for letter in ("π", "γ"))
    assert greek.tobytes() != other.tobytes()
    assert isinstance(picture, Image.Image)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_opens_the_page_without_complaint(scheme: str, tmp_path: Path) -> None:
    assert BROWSER is not None
    file, shot = tmp_path / "report.html", tmp_path / "shot.png"
    file.write_text(page(report()), encoding="utf-8")
    run = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'browser'}",
            f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
            "--enable-logging=stderr",
            "--window-size=1200,900",
            f"--screenshot={shot}",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr
    with Image.open(shot) as picture:
        assert picture.size == (1200, 900)
        corner = picture.convert("L").getpixel((3, 3))
    assert isinstance(corner, int)
    assert (corner < 60) if scheme == "dark" else (corner > 220)
