"""A flow map as a student: f(z, 1) = z - F(z, 1), one network evaluation from noise to data (FreeFlow, section 4).

Its policy is the shortcut with the mean velocity F: a straight line, whose end alone means something.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.path import as_time
from pitools.policies.shortcut import ShortcutPolicy
from pitools.types import Conditions, Factorisation, FlowMap, Schedule, Time


@dataclass(frozen=True)
class NetworkFlowMap:
    """A `FlowMap` from a network that takes δ as one more condition, "delta" `[B]`, and is asked at t = 1."""

    network: Callable[..., Tensor]

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        """F of the noise's shape; float32 or better."""
        mean = self.network(noise, torch.ones_like(delta), {**(conditions or {}), "delta": delta})
        return mean.to(torch.promote_types(mean.dtype, torch.float32))


@dataclass(frozen=True)
class FlowMapStudent:
    """A `Student` of one evaluation from a flow map.

    guidance: the strength γ that it is given unless the conditions have "guidance", a number or `[B]`; None for a flow
    map without.
    """

    flow_map: FlowMap
    factorisation: Factorisation
    guidance: float | None = None

    @property
    def schedule(self) -> Schedule:
        """One evaluation."""
        return Schedule(nfe=1)

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> ShortcutPolicy:
        """The policy for noise `x_src` at t_src = 1. `ValueError` for any other time: it starts from noise alone."""
        times = as_time("t_src", t_src, x_src).expand(len(x_src))
        if bool((times != 1).any()):
            raise ValueError(f"a flow map starts at t = 1 and takes one evaluation; it was asked at {float(times[0])}")
        given = dict(conditions or {})
        strength = given.get("guidance", self.guidance)
        if isinstance(strength, (int, float)):
            given["guidance"] = torch.full_like(times, strength)
        mean = self.flow_map(x_src, times, given)
        pack = self.factorisation.pack
        return ShortcutPolicy.from_velocity(pack(mean), pack(x_src).to(mean.dtype), times)
