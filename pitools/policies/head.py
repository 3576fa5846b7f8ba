"""What a head is: how many network outputs a policy needs, and how to read them.

A network answers with V velocities of C channels and E numbers for each of the L factors, and with P numbers
for each sample. A head turns them into a policy; it is a frozen dataclass of the policy's own sizes, and
networks know no policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from pitools.types import Policy, Time


@dataclass(frozen=True)
class HeadSizes:
    """velocities: V, for each factor.  factor: E, for each factor.  sample: P, for each sample.

    start: how a network that starts as the teacher fills its velocities: every one is the teacher's ("tiled"), the
    same but apart from each other ("spread"), or the first one is and the others are zero ("first").
    """

    velocities: int
    factor: int = 0
    sample: int = 0
    start: Literal["tiled", "spread", "first"] = "tiled"


class Outputs(NamedTuple):
    """velocities: `[B, L, V, C]`.  factor: `[B, L, E]`.  sample: `[B, P]`.

    A tuple, so that wrappers which look for tensors in what a module returns (DDP, FSDP, compilers) find them.
    """

    velocities: Tensor
    factor: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Segment:
    """length: the raw reach of a policy below its source, which a DX grid spans.  shift: m."""

    length: float
    shift: float = 1.0


class Head(Protocol):
    """Reads a policy off a network's outputs."""

    @property
    def sizes(self) -> HeadSizes:
        """How many outputs the policy needs."""
        ...

    @property
    def reaches_zero(self) -> bool:
        """Whether the policy serves every t below t_src, whatever segment it was trained on."""
        ...

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> Policy:
        """The policy at x_src `[B, L, C]`, t_src."""
        ...
