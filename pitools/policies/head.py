"""What a head is: how many network outputs a policy needs, and how to read them.

A network gives `factor` outputs for each of the L factors and `sample` outputs for each sample, all in
velocity space. A head is a frozen dataclass of the policy's own sizes; networks know no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from pitools.types import Policy, Time


class HeadSizes(NamedTuple):
    """Outputs for each factor, and for each sample."""

    factor: int
    sample: int


@dataclass(frozen=True)
class Segment:
    """The raw reach of a policy below its source, and the shift: what a DX grid spans."""

    length: float
    shift: float = 1.0


class Head(Protocol):
    """Reads a policy off a network's outputs."""

    @property
    def reaches_zero(self) -> bool:
        """Whether the policy serves every t below t_src, whatever segment it was trained on."""
        ...

    def sizes(self, channels: int) -> HeadSizes:
        """How many outputs the policy needs for factors of `channels`."""
        ...

    def read(self, factor: Tensor, sample: Tensor, x_src: Tensor, t_src: Time, segment: Segment) -> Policy:
        """The policy from outputs `[B, L, factor]` and `[B, sample]`, for x_src `[B, L, C]`."""
        ...
