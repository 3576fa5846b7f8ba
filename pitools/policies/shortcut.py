"""The shortcut policy: one denoised state for the whole segment.

    π(x_t, t) = (x_t - x̂_0) / t,    x̂_0 = x_src - t_src u

Its path is the straight line from x_src to x̂_0, which is what a shortcut-predicting student amounts to
(paper, Fig. 2b): DX with one grid point, or a polynomial of order 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pitools.path import as_time
from pitools.policies.checks import check_state, denoised_from_velocity, parameters, policy_velocity
from pitools.policies.head import HeadSizes, Outputs, Segment
from pitools.types import Time


@dataclass(frozen=True, eq=False)
class ShortcutPolicy:
    """One denoised state x0 `[B, L, C]`; t_src in (0, 1]: float, 0-d or `[B]`.

    Raises `ValueError` for a wrong shape, NaN or infinite values, times out of range.
    """

    x0: Tensor
    t_src: Time

    def __post_init__(self) -> None:
        check_state("x0", self.x0)
        object.__setattr__(self, "x0", parameters("x0", self.x0))
        object.__setattr__(self, "t_src", as_time("t_src", self.t_src, self.x0))

    @classmethod
    def from_velocity(cls, u: Tensor, x_src: Tensor, t_src: Time) -> Self:
        """From one velocity `[B, L, C]`: x_0 = x_src - t_src u."""
        check_state("u", u, x_src)
        return cls(denoised_from_velocity("u", u.unsqueeze(1), x_src, t_src)[:, 0], t_src)

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """`[B, L, C]` at (x_t, t), 0 < t <= t_src."""
        check_state("x_t", x_t, self.x0)
        return policy_velocity(x_t, t, self.t_src, lambda _: self.x0)

    def detach(self) -> Self:
        """The same policy without a graph."""
        return type(self)(self.x0.detach(), self.t_src)

    def basis(self, t: Tensor) -> Tensor:
        """`[..., 1]`: one, at checked times `[...]`."""
        return torch.ones_like(t).unsqueeze(-1)


@dataclass(frozen=True)
class ShortcutHead:
    """One denoised state for each factor."""

    reaches_zero: ClassVar[bool] = False

    @property
    def sizes(self) -> HeadSizes:
        return HeadSizes(velocities=1)

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> ShortcutPolicy:
        return ShortcutPolicy.from_velocity(outputs.velocities.squeeze(2), x_src, t_src)
