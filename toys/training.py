"""What all of the toys' methods share: a teacher that counts, an optimiser's step, and what a training comes to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pitools.training import EMA, DivergenceError
from pitools.types import Conditions, Time
from toys.targets import Target

WARMUP = 50


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


class Learner:
    """A network under Adam, its rate warmed up over 50 steps and brought to 0 along a cosine, and its average."""

    def __init__(self, network: nn.Module, steps: int, learning_rate: float, ema_gamma: float, clip: float) -> None:
        self.network, self.steps, self.learning_rate, self.clip = network, steps, learning_rate, clip
        self.ema = EMA(network, ema_gamma)
        self.optimiser = torch.optim.Adam(network.parameters(), lr=learning_rate, betas=(0.9, 0.99))

    def update(self, step: int, loss: float, name: str) -> None:
        """Take step `step`, from 0, with the gradients that there are.

        Raises `DivergenceError` for a loss or a gradient that is not finite, before it reaches the weights.
        """
        norm = float(nn.utils.clip_grad_norm_(self.network.parameters(), self.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise DivergenceError(
                f"step {step + 1} ({name}): loss {loss}, gradient norm {norm}; a lower learning rate may help"
            )
        ramp = min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * ramp
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.ema.update(self.network)


@dataclass(frozen=True)
class Outcome:
    """ema: the average of the weights.  teacher_calls: the teacher's answers, counted for each sample.  auxiliary:
    FreeFlow's auxiliary network, None where there was none."""

    ema: EMA
    teacher_calls: int
    auxiliary: nn.Module | None = None
