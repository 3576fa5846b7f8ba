"""The log: its lines, the same after a kill and a resume; TensorBoard; what the console shows."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pitools.training.log import RunLog, StepRecord, peak_memory

WALL = {"seconds_per_step", "network_seconds", "policy_seconds", "policy_share", "memory_mib"}
KEYS = {"step", "loss", "learning_rate", "gradient_norm"} | WALL


def step(number: int) -> StepRecord:
    return StepRecord(
        step=number,
        loss=math.exp(-number / 7),
        learning_rate=1e-3 / number,
        gradient_norm=math.sqrt(number),
        seconds=0.5,
        network_seconds=0.25,
        policy_seconds=0.125,
        memory_bytes=number * 2**20,
    )


def open_log(folder: Path | None, total: int = 25, **options: object) -> RunLog:
    arguments: dict[str, object] = {"console": None, "description": "test", "tensorboard": False, **options}
    return RunLog(folder, total_steps=total, **arguments)  # type: ignore[arg-type]


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "log.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def record(log: RunLog, first: int, last: int) -> None:
    for number in range(first, last + 1):
        log.record(step(number))


def test_a_line_holds_the_means_of_its_interval(tmp_path: Path) -> None:
    with open_log(tmp_path / "new" / "run") as log:
        record(log, 1, 25)
    got = lines(tmp_path / "new" / "run")
    assert [line["step"] for line in got] == [10, 20, 25]
    for line, (first, last) in zip(got, [(1, 10), (11, 20), (21, 25)], strict=True):
        steps = [step(number) for number in range(first, last + 1)]
        assert set(line) == KEYS
        assert line["loss"] == pytest.approx(sum(s.loss for s in steps) / len(steps), rel=1e-12)
        assert line["gradient_norm"] == pytest.approx(sum(s.gradient_norm for s in steps) / len(steps), rel=1e-12)
        assert line["learning_rate"] == steps[-1].learning_rate
        assert (line["seconds_per_step"], line["network_seconds"], line["policy_seconds"]) == (0.5, 0.25, 0.125)
        assert line["policy_share"] == 0.25
        assert line["memory_mib"] == last


def test_a_line_is_there_as_soon_as_its_interval_ends(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    record(log, 1, 9)
    assert lines(tmp_path) == []
    record(log, 10, 12)
    assert [line["step"] for line in lines(tmp_path)] == [10]
    log.close()
    log.close()
    with pytest.raises(ValueError, match="closed"):
        record(log, 13, 20)
    assert [line["step"] for line in lines(tmp_path)] == [10]  # the open interval is not written


def test_the_memory_is_the_intervals_peak(tmp_path: Path) -> None:
    with open_log(tmp_path, total=2, every=2) as log:
        log.record(dataclasses.replace(step(1), memory_bytes=5 * 2**20))
        log.record(dataclasses.replace(step(2), memory_bytes=3 * 2**20))
    assert lines(tmp_path)[0]["memory_mib"] == 5


@pytest.mark.parametrize("saved", [0, 7, 10, 13, 25])
@pytest.mark.parametrize("killed", [8, 14, 20, 25])
def test_a_resumed_run_ends_with_the_lines_of_one_that_was_not_killed(tmp_path: Path, saved: int, killed: int) -> None:
    if saved > killed:
        return
    with open_log(tmp_path / "whole") as log:
        record(log, 1, 25)

    log = open_log(tmp_path / "cut")
    record(log, 1, saved)
    state = json.loads(json.dumps(log.state()))
    record(log, saved + 1, killed)
    log.close()
    with (tmp_path / "cut" / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # cut off in the middle of a line

    with open_log(tmp_path / "cut", resume_step=saved, state=state) as log:
        kept = lines(tmp_path / "cut")
        assert [line["step"] for line in kept] == [s for s in (10, 20, 25) if s <= saved]
        record(log, saved + 1, 25)

    def without_times(folder: Path) -> list[dict[str, float]]:
        return [{key: value for key, value in line.items() if key not in WALL} for line in lines(folder)]

    assert without_times(tmp_path / "cut") == without_times(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["log.jsonl"]


def test_the_state_carries_the_open_intervals_losses(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    record(log, 1, 13)
    state = log.state()
    log.close()
    with open_log(tmp_path, resume_step=13, state=state) as log:
        record(log, 14, 20)
    with_state = lines(tmp_path)[1]["loss"]
    assert with_state == pytest.approx(sum(step(s).loss for s in range(11, 21)) / 10, rel=1e-12)
    with open_log(tmp_path, resume_step=13) as log:
        record(log, 14, 20)
    assert lines(tmp_path)[1]["loss"] == pytest.approx(sum(step(s).loss for s in range(14, 21)) / 7, rel=1e-12)


def test_a_run_that_is_extended_forgets_where_it_once_ended(tmp_path: Path) -> None:
    with open_log(tmp_path, total=15) as log:
        record(log, 1, 15)
        state = log.state()
    assert [line["step"] for line in lines(tmp_path)] == [10, 15]
    with open_log(tmp_path, total=20, resume_step=15, state=state) as log:
        record(log, 16, 20)
    got = lines(tmp_path)
    assert [line["step"] for line in got] == [10, 20]
    assert got[1]["loss"] == pytest.approx(sum(step(s).loss for s in range(11, 21)) / 10, rel=1e-12)


def test_a_new_run_in_an_old_folder_drops_the_old_lines(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        record(log, 1, 25)
    open_log(tmp_path).close()
    assert lines(tmp_path) == []


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    with open_log(tmp_path, total=3, every=1, console=Console(file=io.StringIO())) as log:
        for number, loss in enumerate((math.nan, math.inf, 1.0), start=1):
            log.record(dataclasses.replace(step(number), loss=loss))
    assert [line["loss"] for line in lines(tmp_path)] == [None, None, 1.0]


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        open_log(tmp_path, every=0)
    for resume in (-1, 26):
        with pytest.raises(
            ValueError, match=f"resume_step must lie between 0 and the 25 steps of the run, got {resume}"
        ):
            open_log(tmp_path, resume_step=resume)
    log = open_log(None)
    with pytest.raises(ValueError, match="step must be 1, the one after the last, got 2"):
        log.record(step(2))
    record(log, 1, 5)
    with pytest.raises(ValueError, match="step must be 6, the one after the last, got 5"):
        log.record(step(5))
    with pytest.raises(ValueError, match="state belongs to step 5, and resume_step is 4"):
        open_log(None, resume_step=4, state=log.state())
    with pytest.raises(ValueError, match="state belongs to step 5"):
        open_log(None, resume_step=5, state={**log.state(), "steps": 6})
    with pytest.raises(ValueError, match="state must be what"):
        open_log(None, resume_step=4, state={"sum": 1})


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(None, tensorboard=True) as log:
        record(log, 1, 25)
        log.note("unheard")
        log.image("samples", tmp_path / "none.png", 25)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    found = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(event.step, event.width) for event in events.Images(tag)] for tag in tags["images"]}
    return found


def test_tensorboard_reads_back_the_lines_and_forgets_what_a_resume_dropped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    import numpy as np
    from PIL import Image

    picture = tmp_path / "sheet.png"
    Image.fromarray(np.zeros((4, 6), dtype=np.uint8)).save(picture)
    log = open_log(tmp_path, tensorboard=True)
    record(log, 1, 13)
    state = log.state()
    assert scalars(tmp_path)["loss"] == [(10, pytest.approx(lines(tmp_path)[0]["loss"]))]  # on disk with the checkpoint
    record(log, 14, 20)
    log.image("samples", picture, 20)
    log.close()
    assert [s for s, _ in scalars(tmp_path)["loss"]] == [10, 20]
    assert scalars(tmp_path)["samples"] == [(20, 6)]

    with open_log(tmp_path, tensorboard=True, resume_step=13, state=state) as log:
        log.state()
        assert [s for s, _ in scalars(tmp_path)["loss"]] == [10]
        record(log, 14, 25)
    # A line at the very step of the checkpoint stays.
    with open_log(tmp_path, tensorboard=True, resume_step=20) as log:
        record(log, 21, 25)
    found, written = scalars(tmp_path), lines(tmp_path)
    assert found.pop("samples") == []
    assert set(found) == {
        "loss",
        "learning_rate",
        "gradient_norm",
        "seconds/network",
        "seconds/policy",
        "seconds/step",
        "policy_share",
        "memory_mib",
    }
    for tag, key in {**{key: key for key in found if "/" not in key}, "seconds/policy": "policy_seconds"}.items():
        assert found[tag] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in written]


def test_without_tensorboard_a_note_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    shown = io.StringIO()
    with open_log(tmp_path, tensorboard=True, console=Console(file=shown)) as log:
        record(log, 1, 25)
    assert shown.getvalue().count("tensorboard is not installed") == 1
    assert len(lines(tmp_path)) == 3


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def shown_steps(seconds: float, total: int, every: int = 2) -> list[int]:
    shown, clock = io.StringIO(), Clock()
    with open_log(None, total, every=every, console=Console(file=shown, width=40), clock=clock) as log:
        for number in range(1, total + 1):
            clock.now += seconds
            log.record(dataclasses.replace(step(number), seconds=seconds))
    return [int(line.split("step ")[1].split("/")[0]) for line in shown.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (1.0, [1, 22, 42, 50]),  # every 10 intervals: 20 steps
        (0.1, [1, 50]),  # but not more often than every 10 s
        (0.45, [1, 24, 48, 50]),
        (25.0, [1, *range(4, 50, 3), 50]),  # and every minute
        (100.0, [*range(1, 51)]),
    ],
)
def test_where_there_is_no_terminal_lines_come_now_and_then(seconds: float, expected: list[int]) -> None:
    assert shown_steps(seconds, 50) == expected


def test_a_plain_line_says_how_far_and_how_fast() -> None:
    shown, clock = io.StringIO(), Clock()
    with open_log(None, 100, description="gm [x]", console=Console(file=shown, width=40), clock=clock) as log:
        clock.now += 3
        log.record(dataclasses.replace(step(1), loss=0.25))
    assert shown.getvalue() == "gm [x]: step 1/100  0:00:03  0:00:50 left  loss 0.25  2.0 it/s  1 MiB\n"


def test_a_terminal_shows_a_bar_from_where_the_run_resumes() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=100, color_system=None)
    with open_log(None, 100, description="gm [x]", resume_step=40, console=console) as log:
        log.record(dataclasses.replace(step(41), seconds=4.0))
        log.note("a [note]")
    text = shown.getvalue()
    assert "gm [x]" in text
    assert " 40/100 " in text
    assert " 41/100 " in text
    assert "0:03:56 left" in text
    assert "4.0 s/it" in text
    assert "41 MiB" in text
    assert "a [note]" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_loss_does_not_hide_the_later_ones(bad: float) -> None:
    shown = io.StringIO()
    with open_log(None, 3, console=Console(file=shown)) as log:
        for number, loss in enumerate((1.0, bad, 0.5), start=1):
            log.record(dataclasses.replace(step(number), loss=loss))
    assert "loss 0.5 " in shown.getvalue()


def test_the_shown_loss_is_smoothed() -> None:
    shown = io.StringIO()
    with open_log(None, 2, console=Console(file=shown)) as log:
        for number, loss in enumerate((1.0, 2.0), start=1):
            log.record(dataclasses.replace(step(number), loss=loss))
    assert "loss 1.05 " in shown.getvalue()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own count is Linux's")
def test_the_peak_memory_is_the_kernels() -> None:
    status = Path("/proc/self/status").read_text()
    kernel = 1024 * int(status.split("VmHWM:")[1].split()[0])
    assert 0.9 * kernel < peak_memory() < 10 * kernel  # a process may inherit the peak of the one that began it
