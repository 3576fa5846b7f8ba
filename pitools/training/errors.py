"""What can go wrong in a training run that no argument is to blame for."""

from __future__ import annotations


class DivergenceError(RuntimeError):
    """A loss or a gradient that is not finite."""


class CheckpointError(RuntimeError):
    """A file of a run that cannot be written, or that is not what was written."""


class Stopped(Exception):  # noqa: N818 - not an error
    """A run that was asked to stop, and has saved where it was.

    signal: that asked for it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[type[Stopped], tuple[str, int]]:
        # It is sent from one process to the others.
        return type(self), (str(self), self.signal)
