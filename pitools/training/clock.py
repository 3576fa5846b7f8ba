"""Where a step's time goes: into networks, or into the policy's maths.

Forward, what is not spent inside a network call or on data is the policy's. Backward, the policy's part ends
when the gradient has reached the network's outputs. On a GPU each mark waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pitools.policies import Outputs
from pitools.types import Conditions, Time, VelocityField


@dataclass
class Clock:
    """Seconds since it was made: of the whole, of networks, of the policy."""

    device: torch.device
    network: float = 0.0
    policy: float = 0.0
    _start: float = field(default_factory=time.perf_counter)
    _reached: float = 0.0

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return self._now() - self._start

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Within it, time is a network's."""
        start = self._now()
        yield
        self.network += self._now() - start

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Within it, time is the policy's, but for what is a network's."""
        start, network = self._now(), self.network
        yield
        self.policy += self._now() - start - (self.network - network)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Within it, time is the policy's until the gradient has reached the watched outputs."""
        start = self._reached = self._now()
        yield
        self.policy += self._reached - start
        self.network += self._now() - self._reached

    def watch(self, outputs: Outputs) -> Outputs:
        """Note when the gradient reaches these outputs of a network."""
        for value in outputs:
            if value.requires_grad:
                value.register_hook(self._reach)
        return outputs

    def _reach(self, gradient: Tensor) -> None:
        self._reached = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class TimedNetwork:
    """A student's network, under a clock."""

    network: Callable[..., Outputs]
    clock: Clock

    def __call__(self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None) -> Outputs:
        """The network's outputs."""
        with self.clock.in_network():
            outputs = self.network(x_src, t_src, conditions)
        return self.clock.watch(outputs)


@dataclass(frozen=True)
class TimedTeacher:
    """A teacher under a clock."""

    teacher: VelocityField
    clock: Clock

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The teacher's velocity."""
        with self.clock.in_network():
            return self.teacher.velocity(x_t, t, conditions)
