"""The command line, end to end, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

PITOOLS = [sys.executable, "-c", "from pitools.cli import main; main()"]


def pitools(*args: str, cwd: Path, code: int = 0, timeout: int = 300) -> str:
    run = subprocess.run(
        [*PITOOLS, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + run.stderr


SLOW = pytest.mark.slow
COSTS = {"policy", "method", "nfe", "steps", "teacher_calls", "seconds"}


def metrics(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "metrics.json").read_text())


def test_toy_writes_its_folder_and_the_same_seed_gives_the_same_metrics(tmp_path: Path) -> None:
    text = pitools("toy", "--policy", "gm", "--steps", "5", "--nfe", "2,1", "--components", "8", cwd=tmp_path)
    folder = tmp_path / "runs" / "toy-grid25-gm"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.json", "gm.safetensors", "samples.png", "trajectories.png",
    }  # fmt: skip
    assert "teacher" in text
    assert "same mode" in text
    first = metrics(folder)
    assert [(row["policy"], row["nfe"]) for row in first["students"]] == [("gm", 1), ("gm", 2)]
    distances = {"sliced_wasserstein", "energy_distance", "endpoint_rmse", "diversity"}
    keys = {"same_mode", "off_mode", "modes_covered", "spread"} | distances
    assert set(first["teacher"]) == keys
    assert set(first["students"][0]) == keys | COSTS
    config = json.loads((folder / "config.json").read_text())
    assert config["components"] == 8
    assert config["training"]["steps"] == 5
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "gm.safetensors").values())

    # Again: nothing is overwritten, and nothing but the time differs.
    pitools("toy", "--policy", "gm", "--steps", "5", "--nfe", "1,2", "--components", "8", cwd=tmp_path)
    second = metrics(tmp_path / "runs" / "toy-grid25-gm-2")
    assert first.pop("seconds") > 0
    assert second.pop("seconds") > 0
    for run in (first, second):
        assert run["students"][0].pop("seconds") == run["students"][1].pop("seconds") > 0  # one network
    assert first == second
    third = tmp_path / "other"
    pitools("toy", "--steps", "5", "--nfe", "1", "--components", "8", "--seed", "1", "--out", str(third), cwd=tmp_path)
    assert metrics(third)["students"][0]["endpoint_rmse"] != first["students"][0]["endpoint_rmse"]
    assert metrics(third)["teacher"] == first["teacher"]


def test_toy_compares_all_policies(tmp_path: Path) -> None:
    pitools(
        "toy",
        "--policy",
        "gm,dx,polynomial,shortcut",
        "--target",
        "moons",
        "--steps",
        "2",
        "--nfe",
        "1,2",
        "--out",
        "run",
        cwd=tmp_path,
    )
    rows = metrics(tmp_path / "run")["students"]
    assert [(row["policy"], row["nfe"]) for row in rows] == [
        (name, nfe) for name in ("gm", "dx", "polynomial", "shortcut") for nfe in (1, 2)
    ]
    assert set(rows[0]) == COSTS | {"sliced_wasserstein", "energy_distance", "endpoint_rmse", "diversity"}
    weights = {path.name for path in (tmp_path / "run").glob("*.safetensors")}
    assert "gm.safetensors" in weights  # one network for every NFE
    assert {"dx-1nfe.safetensors", "dx-2nfe.safetensors"} <= weights  # one for each


@pytest.mark.parametrize(
    "flow_maps",
    [
        ["freeflow", "consistency"],
        pytest.param(
            ["freeflow", "prediction", "dmd", "meanflow", "consistency", "progressive", "regression"],
            marks=SLOW,
            id="all",
        ),
    ],
)
def test_toy_compares_methods(flow_maps: list[str], tmp_path: Path) -> None:
    text = pitools(
        "toy", "--method", ",".join(["pi-id", "cloning", *flow_maps]), "--policy", "gm,dx", "--target", "ring8",
        "--steps", "6", "--nfe", "1,2", "--out", "run", cwd=tmp_path,
    )  # fmt: skip
    rows = metrics(tmp_path / "run")["students"]
    policies = [(f"{method} {name}", nfe) for method in ("pi-id", "cloning") for name in ("gm", "dx") for nfe in (1, 2)]
    assert [(row["policy"], row["nfe"]) for row in rows] == policies + [(name, 1) for name in flow_maps]
    assert all(row["teacher_calls"] > 0 for row in rows)
    # Every label is whole in the printed table.
    assert all(name in text for name in ("cloning dx", *flow_maps, "million"))
    names = {path.stem for path in (tmp_path / "run").glob("*.safetensors")}
    assert names == {"pi-id-gm", "cloning-gm", *flow_maps} | {
        f"{method}-dx-{nfe}nfe" for method in ("pi-id", "cloning") for nfe in (1, 2)
    }
    assert (tmp_path / "run" / "trajectories.png").stat().st_size > 0


@pytest.mark.parametrize(
    "target", ["ring8", pytest.param("spiral", marks=SLOW), pytest.param("checkerboard", marks=SLOW)]
)
def test_toy_takes_every_target_in_the_plane(target: str, tmp_path: Path) -> None:
    pitools("toy", "--target", target, "--steps", "2", "--nfe", "1", "--components", "4", "--out", "run", cwd=tmp_path)
    assert ("same_mode" in metrics(tmp_path / "run")["teacher"]) == (target == "ring8")


def test_toy_digits(tmp_path: Path) -> None:
    pitools(
        "toy", "--target", "digits", "--steps", "2", "--nfe", "1", "--components", "4", "--out", "run", cwd=tmp_path
    )
    assert metrics(tmp_path / "run")["teacher"]["class_accuracy"] == 1.0
    assert (tmp_path / "run" / "trajectories.png").stat().st_size > 0


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*PITOOLS, "toy", "--policy", "gm,dx", "--nfe", "1", "--components", "4", "--out", "run"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    config = tmp_path / "run" / "config.json"
    deadline = time.monotonic() + 60
    while not config.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(6)  # into the training of the first student
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output.decode()
    rows = metrics(tmp_path / "run")["students"]
    assert [row["policy"] for row in rows] == ["gm"]
    assert 0 < rows[0]["steps"] < 1000
    assert (tmp_path / "run" / "gm.safetensors").exists()
    assert (tmp_path / "run" / "samples.png").exists()


MISTAKES = {
    "unknown target": (["--target", "circle"], "ring8, grid25"),
    "unknown method": (["--method", "freeflo"], "pi-id, cloning, freeflow"),
    "unknown policy": (["--policy", "gm,xx"], "gm, dx, polynomial, shortcut"),
    "no evaluations": (["--nfe", "0"], "--nfe must be at least 1"),
    "not a number": (["--nfe", "1,two"], "whole numbers"),
    "no components": (["--components", "0"], "components must be at least 1"),
    "no grid points": (["--policy", "dx", "--grid-points", "0"], "grid_points must be at least 1"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "no such device": (["--device", "quantum"], "--device quantum"),
    "no such GPU": (["--device", "cuda:99"], "--device cuda:99"),
    "too many evaluations": (["--nfe", "200000000"], "at most 128"),
    "a folder in use": (["--out", "used"], "name another one"),
    "unknown option": (["--polcy", "gm"], "--policy"),
}


@pytest.mark.parametrize(("args", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_users_mistake_is_one_clear_error(args: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    output = pitools("toy", "--steps", "1", *args, cwd=tmp_path, code=2)
    assert message in output
    assert "Traceback" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["used"]
    assert (tmp_path / "used" / "thesis.txt").read_text() == "mine"


def test_help_and_version(tmp_path: Path) -> None:
    assert "toy" in pitools("--help", cwd=tmp_path)
    text = pitools("toy", "--help", cwd=tmp_path)
    assert "pitools toy --policy gm,dx,shortcut --nfe 1" in text
    assert pitools("--version", cwd=tmp_path).startswith("pitools 0.")
