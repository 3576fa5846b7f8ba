"""`pitools accuracy`: error against evaluations."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pitools.cli import app
from toys.accuracy import SEGMENTS, Point, curves, fewest


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return curves(24)


def test_every_method_is_on_it_and_finer_is_better(points: list[Point]) -> None:
    assert {point.method for point in points} == {"euler", "midpoint", "heun", "rk4", "ab2", "auto", "adaptive"}
    for segment in SEGMENTS:
        for method in {point.method for point in points}:
            own = [p for p in points if (p.segment, p.method) == (segment.title, method)]
            own = sorted(own, key=lambda p: p.evaluations)
            assert own[-1].error < own[0].error / 10
            assert own[-1].error < 2e-3


def test_auto_and_adaptive_need_fewest_evaluations(points: list[Point]) -> None:
    for segment in SEGMENTS:
        for method in ("euler", "midpoint", "heun", "rk4", "ab2"):
            fixed = fewest(points, segment.title, method, 1e-3)
            for own in ("auto", "adaptive"):
                mine = fewest(points, segment.title, own, 1e-3)
                assert mine is not None
                assert fixed is None or mine < fixed


def test_the_command_writes_a_picture_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: list[Point]
) -> None:
    monkeypatch.setattr("toys.accuracy.curves", lambda *_: points)
    out = tmp_path / "here.png"
    done = CliRunner().invoke(app, ["accuracy", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(b"\x89PNG")
    assert len(json.loads(out.with_suffix(".json").read_text())) == len(points)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["accuracy", "--out", str(tmp_path / "no" / "a.png")])
    assert done.exit_code == 2
    assert "there is no folder" in done.output
