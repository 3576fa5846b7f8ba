"""What a training run tells: a line of JSON for each interval of steps, TensorBoard, and the console.

    log.jsonl: {"step": s, "loss": mean over the steps since the last line, ...}, s = every, 2 every, ..., total

A run that is killed and resumed ends with the lines of one that was not, but for times and memory: what was
logged after the checkpoint is dropped, and the open interval's sums travel in the checkpoint (`state`).
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

SMOOTHING = 0.95
"""How much of the shown loss and speed is kept at each step."""

QUIET_SECONDS, SILENT_SECONDS = 10.0, 60.0
"""Where no bar can be shown, a line comes at most about every 10 s, and at least every minute, or every step."""


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step.

    step: 1, 2, ...  gradient_norm: before clipping.  seconds: of the whole step; network_seconds and
    policy_seconds: those parts of it.  memory_bytes: the peak so far, as from `peak_memory`.  auxiliary_loss: of a
    helper's network, None without one.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    network_seconds: float = 0.0
    policy_seconds: float = 0.0
    memory_bytes: int = 0
    auxiliary_loss: float | None = None


def peak_memory(device: torch.device | str = "cpu") -> int:
    """The most bytes held so far: allocated on a CUDA device, else resident in this process (0 if unknown)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Window:
    """The sums of `steps` steps, the last of which is `step`; the learning rate is the last, the memory the most."""

    step: int
    steps: int = 0
    loss: float = 0.0
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    seconds: float = 0.0
    network_seconds: float = 0.0
    policy_seconds: float = 0.0
    memory_bytes: int = 0
    auxiliary_loss: float | None = None

    def added(self, record: StepRecord) -> Window:
        """The window with one more step."""
        return Window(
            step=record.step,
            steps=self.steps + 1,
            loss=self.loss + record.loss,
            learning_rate=record.learning_rate,
            gradient_norm=self.gradient_norm + record.gradient_norm,
            seconds=self.seconds + record.seconds,
            network_seconds=self.network_seconds + record.network_seconds,
            policy_seconds=self.policy_seconds + record.policy_seconds,
            memory_bytes=max(self.memory_bytes, record.memory_bytes),
            auxiliary_loss=(
                None if record.auxiliary_loss is None else (self.auxiliary_loss or 0.0) + record.auxiliary_loss
            ),
        )

    def line(self) -> dict[str, int | float]:
        """What log.jsonl says of the window: means for a step, times in seconds."""
        helped = {} if self.auxiliary_loss is None else {"auxiliary_loss": self.auxiliary_loss / self.steps}
        return {
            "step": self.step,
            "loss": self.loss / self.steps,
            **helped,
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm / self.steps,
            "seconds_per_step": self.seconds / self.steps,
            "network_seconds": self.network_seconds / self.steps,
            "policy_seconds": self.policy_seconds / self.steps,
            "policy_share": self.policy_seconds / self.seconds if self.seconds > 0 else 0.0,
            "memory_mib": self.memory_bytes / 2**20,
        }


def tell(console: Console, message: str) -> None:
    """Print a line, whatever is in it."""
    # A path may look like markup, and is easier to copy from one line.
    console.print(message, markup=False, highlight=False, soft_wrap=True)


class RunLog:
    """Tells of a run's steps; a context manager.

    folder: where `log.jsonl` and `tensorboard/` go; None writes neither, as on every rank but the first.
    console: None shows nothing.  total_steps: of the whole run.  description: the run's name on the console.
    resume_step: the step of the checkpoint, 0 for a new run; what the folder has of later steps is dropped.
    every: steps for a line.  state: what `state()` gave for the checkpoint.  clock: seconds, for tests.
    Raises `ValueError` for counts out of range and a state of another step.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console | None,
        total_steps: int,
        description: str,
        resume_step: int = 0,
        tensorboard: bool = True,
        every: int = 10,
        state: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= resume_step <= total_steps:
            raise ValueError(
                f"resume_step must lie between 0 and the {total_steps} steps of the run, got {resume_step}"
            )
        self._window = _window(state, resume_step)
        self._total, self._every, self._description = total_steps, every, description
        self._console, self._clock = console, clock
        self._lines, self._writer = None, None
        self._loss, self._seconds = math.nan, math.nan
        self._started, self._told_step, self._told_at = clock(), resume_step, -math.inf
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "log.jsonl"
            _drop_after(path, resume_step, resume_step - self._window.steps, total_steps)
            self._lines = path.open("a", encoding="utf-8")
            self._writer = self._tensorboard(folder / "tensorboard", resume_step) if tensorboard else None
        self._progress = _progress(console) if console is not None and console.is_terminal else None
        if self._progress is not None:
            self._task = self._progress.add_task(description, total=total_steps, completed=resume_step, status="")
            self._progress.start()

    def record(self, record: StepRecord) -> None:
        """Take in a step. `ValueError` unless it follows the one before."""
        if record.step != self._window.step + 1:
            raise ValueError(
                f"step must be {self._window.step + 1}, the one after the last, got {record.step}; "
                f"a resumed run passes resume_step"
            )
        self._window = self._window.added(record)
        self._loss = _smoothed(self._loss, record.loss)
        self._seconds = _smoothed(self._seconds, record.seconds)
        full = record.step % self._every == 0
        if full or record.step == self._total:
            self._write(self._window.line())
        self._show(record, full)
        if full:  # only then: a run that is extended goes on with the interval that its old end cut short
            self._window = Window(record.step)

    def note(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._console is not None:
            tell(self._console, message)

    def image(self, tag: str, path: Path, step: int) -> None:
        """Show a picture file, such as a sheet of samples, in TensorBoard."""
        if self._writer is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                pixels = np.array(picture.convert("RGB"))
            self._writer.add_image(tag, pixels, step, dataformats="HWC")

    def state(self) -> dict[str, Any]:
        """The open interval, for the checkpoint of the last step; JSON can hold it.

        What was logged until then has been handed to the system.
        """
        if self._writer is not None:
            self._writer.flush()
        return asdict(self._window)

    def close(self) -> None:
        """End the bar and close the files; a second call does nothing. An open interval is not written."""
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()
        if self._lines is not None:
            self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _tensorboard(self, folder: Path, resume_step: int) -> SummaryWriter | None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.note("No TensorBoard log: the package tensorboard is not installed.")
            return None
        return SummaryWriter(str(folder), purge_step=resume_step + 1)

    def _write(self, line: Mapping[str, int | float]) -> None:
        if self._lines is not None:
            # JSON has no NaN: a loss that is none is null.
            finite = {key: value if math.isfinite(value) else None for key, value in line.items()}
            self._lines.write(json.dumps(finite) + "\n")
            self._lines.flush()
        if self._writer is not None:
            for tag, key in SCALARS.items():
                if key in line:
                    self._writer.add_scalar(tag, line[key], int(line["step"]))

    def _show(self, record: StepRecord, full: bool) -> None:
        memory = f"  {record.memory_bytes / 2**20:.0f} MiB" if record.memory_bytes else ""
        left = _clock_time((self._total - record.step) * self._seconds)
        status = f"{left} left  loss {self._loss:.3g}  {_speed(self._seconds)}{memory}"
        if self._progress is not None:
            self._progress.update(self._task, completed=record.step, status=status)
        elif self._console is not None:
            now = self._clock()
            waited = now - self._told_at
            due = full and record.step - self._told_step >= 10 * self._every and waited >= QUIET_SECONDS
            if due or waited >= SILENT_SECONDS or record.step == self._total:
                elapsed = _clock_time(now - self._started)
                self.note(f"{self._description}: step {record.step}/{self._total}  {elapsed}  {status}")
                self._told_step, self._told_at = record.step, now


SCALARS = {
    "loss": "loss",
    "auxiliary_loss": "auxiliary_loss",
    "learning_rate": "learning_rate",
    "gradient_norm": "gradient_norm",
    "seconds/network": "network_seconds",
    "seconds/policy": "policy_seconds",
    "seconds/step": "seconds_per_step",
    "policy_share": "policy_share",
    "memory_mib": "memory_mib",
}
"""TensorBoard's tags, and the key of a line that each shows."""


def _window(state: Mapping[str, Any] | None, resume_step: int) -> Window:
    if state is None:
        return Window(resume_step)
    try:
        window = Window(**state)
    except TypeError:
        raise ValueError(f"state must be what RunLog.state() gave, got the keys {', '.join(state)}") from None
    if window.step != resume_step or not 0 <= window.steps <= resume_step:
        raise ValueError(
            f"state belongs to step {window.step}, and resume_step is {resume_step}; take both from one checkpoint"
        )
    return window


def _drop_after(path: Path, resume_step: int, window_start: int, total_steps: int) -> None:
    """Rewrite a log without the lines of later steps, without a half-written one, and without the line of an old
    last step that lies in the open interval, unless it still is the last step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if step <= resume_step and (step <= window_start or step == total_steps):
            kept.append(line + b"\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),  # in a narrow terminal the one column that gives way
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )


def _smoothed(old: float, new: float) -> float:
    # One bad step must not hide all later ones behind a NaN.
    return SMOOTHING * old + (1 - SMOOTHING) * new if math.isfinite(old) else new


def _speed(seconds: float) -> str:
    """it/s, or s/it for slow steps."""
    return f"{1 / seconds:.1f} it/s" if 0 < seconds <= 1 else f"{seconds:.1f} s/it"


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
