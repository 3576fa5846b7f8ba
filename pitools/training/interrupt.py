"""Stopping on Ctrl-C or SIGTERM without losing what is done."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from pitools.training.errors import Stopped


class Interrupt:
    """Whether a stop has been asked for, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def graceful_interrupt() -> Iterator[Interrupt]:
    """Within it, the first Ctrl-C or SIGTERM only sets `requested`, so that a step is never cut in half; the next
    one raises `KeyboardInterrupt`. Must be entered in the main thread."""
    interrupt = Interrupt()

    def handle(signum: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.signal = signum

    with _handled(handle):
        yield interrupt


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Within it, where there is nothing left to save, Ctrl-C or SIGTERM raises `Stopped` with this message at once.

    A `graceful_interrupt` inside goes first. Must be entered in the main thread.
    """

    def handle(signum: int, frame: FrameType | None) -> None:
        raise Stopped(message, signum)

    with _handled(handle):
        yield


@contextmanager
def _handled(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    previous = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
