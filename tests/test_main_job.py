"""What the README promises of `pitools toy`, at its defaults. Minutes: `python -m pytest -m slow -n 0`."""

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.slow

Row = dict[str, float | str]


@cache
def toy(*args: str) -> tuple[list[Row], float]:
    """The students' rows of a run on the CPU, and the seconds that the whole command took."""
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [
            sys.executable,
            "-c",
            "from pitools.cli import main; main()",
            "toy",
            *args,
            "--device",
            "cpu",
            "--out",
            "run",
        ]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
        seconds = time.perf_counter() - start
        return json.loads((Path(folder) / "run" / "metrics.json").read_text())["students"], seconds


def mean_of_seeds(nfe: int, key: str) -> float:
    rows = [row for seed in "012" for row in toy("--policy", "gm", "--seed", seed)[0] if row["nfe"] == nfe]
    return mean(float(row[key]) for row in rows)


def test_the_main_job_ends_within_two_minutes() -> None:
    assert all(toy("--policy", "gm", "--seed", seed)[1] < 120 for seed in "012")


def test_one_evaluation_is_enough() -> None:
    assert mean_of_seeds(1, "same_mode") >= 0.98
    assert mean_of_seeds(1, "off_mode") <= 0.01
    assert mean_of_seeds(1, "modes_covered") == 25


def test_four_evaluations_are_better() -> None:
    assert mean_of_seeds(4, "same_mode") >= 0.99


def test_the_same_seed_gives_the_same_metrics() -> None:
    again, _ = toy("--seed", "0", "--policy", "gm")  # in another order, so that the cache does not answer
    first, _ = toy("--policy", "gm", "--seed", "0")
    assert [row | {"seconds": 0} for row in again] == [row | {"seconds": 0} for row in first]


def test_the_papers_ranking_of_policies() -> None:
    rows, _ = toy("--policy", "gm,dx,shortcut", "--nfe", "1")
    gm, dx, shortcut = (float(row["endpoint_rmse"]) for row in rows)
    assert gm < dx < shortcut
    assert dx >= 2 * gm


def test_digits_are_the_digits_that_were_asked_for() -> None:
    rows, seconds = toy("--target", "digits")
    assert seconds < 240
    assert next(row for row in rows if row["nfe"] == 4)["class_accuracy"] >= 0.9
