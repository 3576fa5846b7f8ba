"""Runs of the whole command that are killed, stopped, or out of disk: they end as the one that was left alone.

Bit for bit, on the CPU in float32: weights, averages, the optimiser's state, metrics and the log, but for times and
memory.
"""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Commands, Run
from recipes import tiny, write
from safetensors.torch import load_file

RECIPE = tiny(
    **{
        "students.gm.objective": {
            "data_free": True, "step_size": 0.125, "dropout": 0.2, "teacher_ratio": 0.5, "decay_steps": 4,
        },
        "students.dx": {
            "policy": "dx", "grid_points": 4, "nfe": [1], "objective": {"step_size": 0.125, "window": 0.2},
        },
        "teacher.training.checkpoint_every": 2,
        "teacher.training.log_every": 4,
        "training.checkpoint_every": 2,
        "training.log_every": 4,
        "training.sheet_every": 3,
    }
)  # fmt: skip
"""Everything that could be out of step: dropout, a falling teacher's share, and a log line across checkpoints."""

SETUP = """
import os, torch
import pitools.training.distillation as distillation
from toys.digits import DigitsEvaluation
import toys.digits
distillation.SHEET = 2

def drawn(path, rows):  # in no time, and to the last bit
    path.write_bytes(b"".join(title.encode() + images.numpy().tobytes() for title, images in rows))

toys.digits.draw_sheet = drawn

def opened(part):
    return lambda descriptor: part in os.readlink(f"/proc/self/fd/{descriptor}")

def onto(part):
    return lambda source, target: str(target).endswith(part)
"""

STEP = "at(torch.optim.AdamW, 'step', {call}, {action}, after={after})"

SYNC = "at(os, 'fsync', 1, die, when=opened('gm-2nfe/checkpoints/.tmp-step-00000004/{}'))"

RENAME = "at(os, 'replace', 1, die, after={after}, when=onto('gm-2nfe/checkpoints/step-00000004'))"

KILLS = {
    "while the folder is claimed": "at(os, 'replace', 1, die, when=onto('recipe.toml'))",
    "in the teacher's first step": STEP.format(call=1, action="die", after=False),
    "in the teacher's training": STEP.format(call=5, action="die", after=False),
    "before the teacher's weights": "at(os, 'replace', 1, die, when=onto('teacher.safetensors'))",
    "between two files of a checkpoint": SYNC.format("ema"),
    "before the manifest": SYNC.format("manifest"),
    "before a checkpoint's rename": RENAME.format(after=False),
    "after a checkpoint's rename": RENAME.format(after=True),
    "after a step, before its log": STEP.format(call=1, action="die", after=True),
    "in the last step": STEP.format(call=2, action="die", after=False),
    "while an old checkpoint is removed": "at(os, 'replace', 1, die, after=True, when=onto('-step-00000002'))",
    "before a student's weights": "at(os, 'replace', 1, die, when=onto('gm-2nfe/student.safetensors'))",
    "between the students": "at(distillation, 'train_student', 2, die)",
    "in the next student's sheet": "at(toys.digits, 'draw_sheet', 1, die)",
    "in the evaluation": "at(DigitsEvaluation, 'student', 2, die)",
    "before the metrics": "at(os, 'replace', 1, die, when=onto('metrics.json'))",
    "after the metrics": "at(os, 'replace', 1, die, after=True, when=onto('metrics.json'))",
}  # fmt: skip
"""In the order of a run, each counted from where the one before left it."""


@dataclass(frozen=True)
class Folder:
    """A scratch folder with the recipe, in which the command runs."""

    path: Path
    commands: Commands

    def run(self, before: str = "", *assign: str) -> Run:
        arguments = ["distill", "recipe.toml", *(part for one in assign for part in ("--set", one))]
        return self.commands(arguments, self.path, SETUP + before)

    @property
    def gm(self) -> Path:
        return self.path / "runs" / "recipe" / "gm-2nfe"

    def left(self) -> dict[str, Any]:
        """What lies in the folder, hidden or not, without what is a matter of time: file name -> contents."""
        names = {str(path.relative_to(self.path)): path for path in self.path.rglob("*") if path.is_file()}
        return {name: _contents(path) for name, path in names.items()}


def _contents(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return {name: (str(value.dtype), value.tolist()) for name, value in load_file(path).items()}
    if path.name == "log.jsonl":
        return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
    if path.name == "metrics.json":
        return _timeless(json.loads(path.read_text()))
    if path.name == "manifest.json":  # of what is compared itself, and of times
        return json.loads(path.read_text())["step"]
    return path.read_bytes()


def _timeless(table: dict[str, Any]) -> dict[str, Any]:
    timed = ("seconds", "policy_share", "memory_mib")
    return {key: value for key, value in table.items() if not any(word in key for word in timed)}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run that is left alone."""
    folder = Folder(tmp_path_factory.mktemp("whole"), commands)
    write(folder.path / "recipe.toml", RECIPE)
    run = folder.run()
    assert run.code == 0, run.out + run.err
    return folder


@pytest.fixture
def folder(whole: Folder, tmp_path: Path) -> Folder:
    """A new run."""
    shutil.copy(whole.path / "recipe.toml", tmp_path)
    return Folder(tmp_path, whole.commands)


@pytest.fixture
def taught(whole: Folder, folder: Folder) -> Folder:
    """A new run whose teacher is trained."""
    shutil.copytree(whole.path / "runs" / "teachers", folder.path / "runs" / "teachers")
    return folder


def assert_ends_as(whole: Folder, folder: Folder, before: str = "") -> None:
    """Run it to its end, and compare."""
    run = folder.run(before)
    assert run.code == 0, run.out + run.err
    expected, got = whole.left(), folder.left()
    assert sorted(got) == sorted(expected)
    assert [name for name in expected if got[name] != expected[name]] == []


def one_error(run: Run) -> str:
    """The one line that a failed command says."""
    assert "Traceback" not in run.err
    (line,) = [line for line in run.err.splitlines() if line.startswith("Error: ")]
    return line


def test_a_run_holds_what_is_compared(whole: Folder) -> None:
    left = whole.left()
    out = "runs/recipe"
    assert {f"{out}/{name}" for name in ("recipe.toml", "metrics.json", "samples.png")} <= set(left)
    for student in ("gm-2nfe", "dx-1nfe"):
        assert {f"{out}/{student}/student.safetensors", f"{out}/{student}/log.jsonl"} <= set(left)
        assert [line["step"] for line in left[f"{out}/{student}/log.jsonl"]] == [4, 6]
        for step in (4, 6):
            files = {f"{name}.safetensors" for name in ("model", "ema", "optimiser")}
            assert {f"{out}/{student}/checkpoints/step-{step:08d}/{name}" for name in files} <= set(left)
    # Trained: neither as it started, nor one student as the other.
    weights = left[f"{out}/gm-2nfe/student.safetensors"]
    assert weights != left[f"{out}/gm-2nfe/checkpoints/step-00000004/ema.safetensors"]


def test_a_run_killed_again_and_again_ends_as_one_left_alone(whole: Folder, folder: Folder) -> None:
    for when, how in KILLS.items():
        run = folder.run(how)
        assert run.code == -9, f"{when}: {run}"
    assert_ends_as(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param(how, id=when) for when, how in KILLS.items()])
def test_a_run_killed_once_ends_as_one_left_alone(how: str, whole: Folder, folder: Folder) -> None:
    assert folder.run(how).code == -9
    assert_ends_as(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, 31))
def test_a_run_killed_at_any_sync_ends_as_one_left_alone(number: int, whole: Folder, taught: Folder) -> None:
    assert taught.run(f"at(os, 'fsync', {number}, die)").code == -9
    assert_ends_as(whole, taught)


@pytest.mark.slow
def test_a_run_killed_by_the_clock_ends_as_one_left_alone(whole: Folder, folder: Folder) -> None:
    kills = 0
    for hundredths in range(10, 500, 5):  # of a second of computing: later and later, so that it comes to its end
        # Nobody handles this signal: it kills in the middle of whatever is going on, files and arithmetic alike.
        run = folder.run(f"import signal; signal.setitimer(signal.ITIMER_PROF, {hundredths / 100})")
        if run.code == 0:
            break
        assert run.code == -signal.SIGPROF, run
        kills += 1
    assert kills > 3
    assert_ends_as(whole, folder)


@pytest.mark.parametrize(("action", "code"), [("interrupt", 130), ("terminate", 143)])
def test_a_signal_saves_the_step_that_was_running(action: str, code: int, whole: Folder, taught: Folder) -> None:
    run = taught.run(STEP.format(call=3, action=action, after=False))
    assert run.code == code, run
    # The signal came after the processes had agreed on step 3.
    assert "gm-2nfe stopped at step 4 of 6, and saved. Run the same command again to go on." in run.out
    assert (taught.gm / "checkpoints" / "step-00000004").is_dir()
    assert not (taught.gm / "checkpoints" / "step-00000005").exists()
    assert_ends_as(whole, taught)


def test_a_signal_before_the_first_checkpoint_is_due_saves_one(whole: Folder, taught: Folder) -> None:
    run = taught.run("at(__import__('pitools.training.jobs').training.jobs.Distillation, 'losses', 1, terminate)")
    assert run.code == 143, run
    assert "gm-2nfe stopped at step 1 of 6" in run.out
    assert [path.name for path in (taught.gm / "checkpoints").iterdir()] == ["step-00000001"]
    assert_ends_as(whole, taught)


def test_a_signal_in_the_last_step_keeps_the_next_student_from_starting(whole: Folder, taught: Folder) -> None:
    run = taught.run(STEP.format(call=6, action="terminate", after=False))
    assert run.code == 143, run
    assert "gm-2nfe stopped at step 6 of 6, and saved" in run.out
    assert not (taught.path / "runs" / "recipe" / "dx-1nfe").exists()
    assert_ends_as(whole, taught)


@pytest.mark.parametrize(
    ("action", "code"), [("interrupt", 130), pytest.param("terminate", 143, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_evaluation_stops_at_once(action: str, code: int, whole: Folder, taught: Folder) -> None:
    run = taught.run(f"at(DigitsEvaluation, 'student', 2, {action})")
    assert run.code == code, run
    assert "Run the same command again to go on." in run.out
    assert "Traceback" not in run.err
    assert not (taught.path / "runs" / "recipe" / "metrics.json").exists()
    assert_ends_as(whole, taught)


def test_a_second_signal_does_not_wait_for_the_step(whole: Folder, taught: Folder) -> None:
    twice = "at(torch.optim.AdamW, 'step', 5, lambda: (interrupt(), interrupt()))"
    run = taught.run(twice)
    assert run.code == 130, run
    assert not (taught.gm / "checkpoints" / "step-00000005").exists()
    assert_ends_as(whole, taught)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[-1] ^= 1
    path.write_bytes(contents)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_truncate, "truncated"),
        pytest.param(_alter, "altered", marks=pytest.mark.slow),
        pytest.param(Path.unlink, "missing", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    damage: Any, word: str, whole: Folder, taught: Folder
) -> None:
    taught.run(STEP.format(call=5, action="die", after=False))
    damage(taught.gm / "checkpoints" / "step-00000004" / "optimiser.safetensors")
    run = taught.run(STEP.format(call=1, action="die", after=False))  # only to read what it says
    assert f"Refused: runs/recipe/gm-2nfe/checkpoints/step-00000004/optimiser.safetensors is {word}" in run.out
    assert "Going on from runs/recipe/gm-2nfe/checkpoints/step-00000002\n" in run.out
    assert_ends_as(whole, taught)


def test_a_run_with_damaged_checkpoints_alone_names_them_and_changes_nothing(taught: Folder) -> None:
    taught.run(STEP.format(call=5, action="die", after=False))
    for step in (2, 4):
        _truncate(taught.gm / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    before = {path: path.read_bytes() for path in taught.path.rglob("*") if path.is_file()}
    run = taught.run()
    assert run.code == 1
    line = one_error(run)
    assert "step-00000002/model.safetensors is truncated" in line
    assert "step-00000004/model.safetensors is truncated" in line
    assert "move them away to start anew" in line
    assert {path: path.read_bytes() for path in taught.path.rglob("*") if path.is_file()} == before


def test_damaged_weights_are_named_and_written_again_once_deleted(whole: Folder, taught: Folder) -> None:
    taught.run("at(distillation, 'train_student', 2, die)")
    _truncate(taught.gm / "student.safetensors")
    run = taught.run()
    assert run.code == 1
    assert "gm-2nfe/student.safetensors is damaged" in one_error(run)
    (taught.gm / "student.safetensors").unlink()
    assert_ends_as(whole, taught)


FULL = {
    "a checkpoint": (
        "at(os, 'fsync', 1, full_disk, when=opened('gm-2nfe/checkpoints/.tmp-step-00000004/ema'))",
        "step 4 could not be saved in runs/recipe/gm-2nfe/checkpoints",
        "gm-2nfe/checkpoints/step-00000002",
    ),
    "the log": (
        "at(__import__('pitools.training.log').training.log.RunLog, '_write', 2, full_disk)",
        "gm-2nfe/log.jsonl could not be written",
        "The last good checkpoint is runs/recipe/gm-2nfe/checkpoints/step-00000004",
    ),
    "a sheet": (
        "at(toys.digits, 'draw_sheet', 1, full_disk)",
        "gm-2nfe/samples/step-000003.png could not be written",
        "The last good checkpoint is runs/recipe/gm-2nfe/checkpoints/step-00000002",
    ),
    "the weights": (
        "at(os, 'fsync', 1, full_disk, when=opened('gm-2nfe/.tmp-student'))",
        "gm-2nfe/student.safetensors could not be written",
        "",
    ),
    "the picture": (
        "at(toys.digits, 'draw_sheet', 5, full_disk)",
        "runs/recipe/samples.png could not be written",
        "",
    ),
    "the metrics": (
        "at(os, 'replace', 1, full_disk, when=onto('metrics.json'))",
        "runs/recipe/metrics.json could not be written",
        "",
    ),
    "the recipe": (
        "at(os, 'fsync', 1, full_disk)",
        "runs/recipe/recipe.toml could not be written",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("how", "message", "kept"),
    [
        pytest.param(*case, id=place, marks=[pytest.mark.slow] if place in ("the weights", "the metrics") else [])
        for place, case in FULL.items()
    ],
)
def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_later(
    how: str, message: str, kept: str, whole: Folder, taught: Folder
) -> None:
    run = taught.run(how)
    assert run.code == 1, run
    line = one_error(run)
    assert message in line
    assert "No space left on device" in line
    assert kept in line
    assert_ends_as(whole, taught)


def test_files_that_may_grow_no_further_are_one_clear_error(whole: Folder, taught: Folder) -> None:
    """The real thing: the system refuses the write, and half a file lies there."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    run = taught.run(limit)
    assert run.code == 1, run
    line = one_error(run)
    assert "step 2 could not be saved" in line
    assert "File too large" in line
    assert "none: there is no good one" in line
    assert list((taught.gm / "checkpoints").iterdir()) == []
    assert_ends_as(whole, taught)


def test_what_is_finished_is_not_done_again(whole: Folder, taught: Folder) -> None:
    run = taught.run("at(distillation, 'train_student', 2, die)")
    assert "gm-2nfe: step 6/6" in run.out
    run = taught.run()
    assert "gm-2nfe is trained: runs/recipe/gm-2nfe/student.safetensors" in run.out
    assert "gm-2nfe: step" not in run.out
    assert "dx-1nfe: step 6/6" in run.out
    again = taught.run()
    assert again.code == 0
    assert ": step" not in again.out
    assert again.out.count("Comparing:") == 3
    assert taught.left() == whole.left()


def test_threads_are_one() -> None:
    """What bit-identity within this file rests on: more threads may sum in another order."""
    assert torch.get_num_threads() == 1
