"""Runs of `pitools distill` on one process or several, by torchrun and gloo on the CPU, and what they left.

One launch makes many runs, as a launch takes longer than a run: `SEVERAL` gives its arguments to the command line in
turn, and notes each run's exit code.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TIMEOUT = 1800
"""Seconds: a launch takes ten, but not where the cores are busy."""

SEVERAL = """
import json, os, sys
from pitools import cli
cli.PATIENCE = 0.0  # so that every process tells of its errors
for line in sys.argv[1:]:
    code = 0
    try:
        cli.app(json.loads(line))
    except SystemExit as stop:
        code = stop.code
    print(f"RANK {os.environ.get('RANK', '0')} EXIT {code}", flush=True)
cli.leave()
"""


@dataclass(frozen=True)
class Ended:
    """A launch that is over."""

    code: int
    out: str
    err: str

    def codes(self, rank: int = 0) -> list[int]:
        """The exit codes of the runs of a `SEVERAL`."""
        return [int(code) for code in re.findall(rf"RANK {rank} EXIT (\d+)", self.out)]


def launch(folder: Path, processes: int, *arguments: str) -> "subprocess.Popen[str]":
    """`python ...` on so many processes, in `folder`."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    # One thread each: threads that wait for each other on busy cores are a thousand times slower.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, *(torchrun if processes > 1 else []), *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> Ended:
    """What became of it."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def several(folder: Path, processes: int, *runs: tuple[str, ...]) -> Ended:
    """Run after run of `pitools distill RECIPE --set ...` in one launch."""
    (folder / "several.py").write_text(SEVERAL)
    lines = [json.dumps(command(*run)) for run in runs]
    return ended(launch(folder, processes, "several.py", *lines))


def command(recipe: str, *assignments: str) -> list[str]:
    """`pitools distill RECIPE --set ...`, but for its first word."""
    return ["distill", recipe, *(word for assignment in assignments for word in ("--set", assignment))]


def log(folder: Path) -> list[dict[str, float]]:
    """What a run noted of each step."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_course(run: Path, other: Path, first: int, last: int) -> None:
    """The steps `first` to `last` of `run` are those of `other`."""
    lines, expected = log(run), log(other)[first - 1 :]
    assert [line["step"] for line in lines] == list(range(first, last + 1))
    losses, expected_losses = ([line["loss"] for line in kept] for kept in (lines, expected))
    assert losses == pytest.approx(expected_losses, rel=0, abs=1e-5)
    assert losses == pytest.approx(expected_losses, rel=1e-3, abs=0)  # a student's are far below 1
    # Adam does not notice a gradient that is too large on all processes alike; its norm does.
    norms, expected_norms = ([line["gradient_norm"] for line in kept] for kept in (lines, expected))
    assert norms == pytest.approx(expected_norms, rel=1e-3, abs=1e-5)


def assert_same_weights(run: Path, other: Path, but: str | None = None) -> None:
    """The averages, which a student ends with; `but` those whose names end so."""
    weights, expected = (load_file(folder / "student.safetensors") for folder in (run, other))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        if but is not None and name.endswith(but):
            continue
        assert torch.allclose(value, expected[name], rtol=0, atol=1e-4), name


def cut(source: Path, target: Path, last: int) -> None:
    """A copy of a folder of runs in which each, a teacher or a student, is as a kill before the checkpoint of step
    `last` would have left it.

    But for its log, which is gone, so that it can only hold what is trained anew.
    """
    shutil.copytree(source, target)
    for path in target.rglob(f"step-{last:08d}"):
        shutil.rmtree(path)
        run = path.parent.parent
        (run / "log.jsonl").unlink()
        for weights in run.glob("*.safetensors"):
            weights.unlink()
