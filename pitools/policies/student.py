"""A student made of a network and a head: G(x_src, t_src, c) = π (paper, section 3).

The network answers with tensors and knows no policy; the head reads them, in float32 or better and outside of
autocast, so that wrapping, sharding, compiling or casting the network leaves the policy's maths alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pitools.path import as_time
from pitools.policies.head import Head, Outputs, Segment
from pitools.types import Conditions, Factorisation, Policy, Schedule, Time


class PolicyNetwork(Protocol):
    """What a backbone makes of a transformer: latents to a head's outputs."""

    def __call__(self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None) -> Outputs:
        """Outputs for latents x_src `[B, ...]` at t_src `[B]`."""
        ...


@dataclass(frozen=True)
class NetworkStudent:
    """A `Student` from a network (as a rule an `nn.Module`), a head, a schedule and a factorisation."""

    network: PolicyNetwork
    head: Head
    schedule: Schedule
    factorisation: Factorisation

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        """The policy at latents `x_src`, t_src in (0, 1]: float, 0-d or `[B]`."""
        times = as_time("t_src", t_src, x_src).expand(len(x_src))
        return self.read(self.network(x_src, times, conditions), x_src, times)

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Tensor) -> Policy:
        """The policy that the network's `outputs` describe."""
        with torch.autocast(x_src.device.type, enabled=False):
            exact = Outputs(*(value.to(torch.promote_types(value.dtype, torch.float32)) for value in outputs))
            packed = self.factorisation.pack(x_src).to(torch.promote_types(x_src.dtype, torch.float32))
            return self.head.read(exact, packed, t_src, Segment(self.schedule.segment, self.schedule.shift))
