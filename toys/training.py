"""What all of the toys' methods share: a teacher that counts, and what a training comes to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pitools.training import EMA
from pitools.types import Conditions, Time
from toys.targets import Target


@dataclass
class Counted:
    """A target as a teacher that counts the samples it was asked about."""

    target: Target
    calls: int = 0

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The target's velocity."""
        self.calls += len(x_t)
        return self.target.velocity(x_t, t, conditions)

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        """As a flow map of one Euler step."""
        return self.velocity(x_t, t, conditions)


@dataclass(frozen=True)
class Outcome:
    """ema: the average of the weights.  teacher_calls: the teacher's answers, counted for each sample."""

    ema: EMA
    teacher_calls: int
