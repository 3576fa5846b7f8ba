"""Many `pitools` commands from one process: imports take seconds, and a fork of what has imported takes none.

    with Commands() as commands:
        run = commands(["distill", "recipe.toml"], folder, before="at(os, 'fsync', 3, die)")

Run as a script, it is that process: a line of JSON for each command. A command runs in a child of its own, which may
kill itself. `before` is code that it runs first, with `at` and its actions at hand.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

HEAVY = ("accelerate", "matplotlib.backends.backend_agg", "pitools.cli", "pitools.training.distillation", "toys.plots")


@dataclass(frozen=True)
class Run:
    """code: the exit status; negative for a signal that killed the command.  out, err: what it printed."""

    code: int
    out: str
    err: str


class Commands:
    """Runs `pitools` in children of one process that has everything loaded, and further `modules`."""

    def __init__(self, *modules: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        )

    def __call__(self, arguments: Sequence[str], folder: Path, before: str = "") -> Run:
        """`pitools ARGUMENTS` in `folder`, after the code `before`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        told = {"arguments": [str(one) for one in arguments], "folder": str(folder), "before": before}
        self._server.stdin.write(json.dumps(told) + "\n")
        self._server.stdin.flush()
        return Run(**json.loads(self._server.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


def at(
    owner: Any,
    name: str,
    call: int,
    action: Callable[[], object],
    after: bool = False,
    when: Callable[..., bool] = lambda *arguments: True,
) -> None:
    """Do `action` at the given call of `owner.name`, from 1, of those for which `when(*arguments)` holds; 0: all."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        due = False
        if when(*arguments):
            calls += 1
            due = call in (0, calls)
        if due and not after:
            action()
        result = original(*arguments, **options)
        if due and after:
            action()
        return result

    setattr(owner, name, counted)


def die() -> None:
    """As kill -9, or the loss of power but for what the disk had not got yet."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """As Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    """As a cluster that wants its machine back."""
    os.kill(os.getpid(), signal.SIGTERM)


def full_disk() -> None:
    """What a write to a full disk raises: no file name."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _serve() -> None:
    for module in (*HEAVY, *sys.argv[1:]):
        importlib.import_module(module)
    # What the first teacher would import, and the first evaluation train: once for all.
    importlib.import_module("scale.dit").DiT(1, 4, 2, 1, 1, 4, 1).teacher(importlib.import_module("torch").Generator())
    importlib.import_module("toys.digits").load_classifier()
    for line in sys.stdin:
        told = json.loads(line)
        outputs = [os.memfd_create(name) for name in ("out", "err")]
        child = os.fork()
        if child == 0:
            os.dup2(outputs[0], 1)
            os.dup2(outputs[1], 2)
            os._exit(_command(**told))
        _, status = os.waitpid(child, 0)
        texts = []
        for output in outputs:
            os.lseek(output, 0, os.SEEK_SET)
            with open(output, encoding="utf-8") as file:
                texts.append(file.read())
        print(json.dumps({"code": os.waitstatus_to_exitcode(status), "out": texts[0], "err": texts[1]}), flush=True)


def _command(arguments: list[str], folder: str, before: str) -> int:
    code: object = 0
    try:
        os.chdir(folder)
        # The parent's rest of the command lines is not the child's.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        exec(before, {**globals(), "Path": Path})
        sys.argv = ["pitools", *arguments]
        importlib.import_module("pitools.cli").main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    _serve()
