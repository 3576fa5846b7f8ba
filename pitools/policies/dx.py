"""The dynamic-x̂_0 policy (paper, 3.1): a grid of denoised states, linear in raw time between them.

    π(x_t, t) = (x_t - x̂_0(t)) / t,    x̂_0(t) interpolated over N evenly spaced raw times of [t_dst, t_src]

It answers to the time only, not to the state. Index 0 of the grid is t_dst and N - 1 is t_src; outside
the grid the nearest value holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pitools.path import as_time, check_shift, shift_time, unshift_time
from pitools.policies.checks import check_state, denoised_from_velocity, parameters, policy_velocity
from pitools.policies.head import HeadSizes, Outputs, Segment
from pitools.types import Time


@dataclass(frozen=True, eq=False)
class DXPolicy:
    """Denoised states on a grid.

    x0_grid: `[B, N, L, C]`.  t_src in (0, 1], t_dst in [0, t_src]: float, 0-d or `[B]`.  shift: m.
    Raises `ValueError` for a wrong shape, NaN or infinite values, times out of range.
    """

    x0_grid: Tensor
    t_src: Time
    t_dst: Time
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.x0_grid.ndim != 4 or self.x0_grid.shape[1] < 1:
            raise ValueError(f"x0_grid must be [B, N, L, C] with N >= 1, got {tuple(self.x0_grid.shape)}")
        object.__setattr__(self, "x0_grid", parameters("x0_grid", self.x0_grid))
        check_shift(self.shift)
        source = as_time("t_src", self.t_src, self.x0_grid)
        object.__setattr__(self, "t_src", source)
        object.__setattr__(self, "t_dst", as_time("t_dst", self.t_dst, self.x0_grid, maximum=source, zero=True))

    @classmethod
    def from_velocity(cls, u_grid: Tensor, x_src: Tensor, t_src: Time, t_dst: Time, shift: float = 1.0) -> Self:
        """From velocities `[B, N, L, C]`, each read as x_0 = x_src - t_src u; x_src `[B, L, C]`."""
        return cls(denoised_from_velocity("u_grid", u_grid, x_src, t_src), t_src, t_dst, shift)

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """`[B, L, C]` at (x_t, t), 0 < t <= t_src."""
        check_state("x_t", x_t, self.x0_grid[:, 0])
        return policy_velocity(x_t, t, self.t_src, self._denoised)

    def detach(self) -> Self:
        """The same policy without a graph."""
        return type(self)(self.x0_grid.detach(), self.t_src, self.t_dst, self.shift)

    def basis(self, t: Tensor) -> Tensor:
        """`[..., N]`: what each point of the grid counts for in x̂_0 at checked times `[...]`, whose last dimension is
        1 or B: a hat about its place."""
        points = torch.arange(self.x0_grid.shape[1], dtype=t.dtype, device=t.device)
        return (1 - (self._place(t).unsqueeze(-1) - points).abs()).clamp(min=0)

    def _place(self, time: Tensor) -> Tensor:
        """Where times lie on the grid, in [0, N - 1]."""
        source, end = (
            unshift_time(torch.as_tensor(t, dtype=time.dtype, device=time.device), self.shift)
            for t in (self.t_src, self.t_dst)
        )
        span = source - end
        offset = unshift_time(time, self.shift) - end
        place = torch.where(span > 0, offset / torch.where(span > 0, span, 1.0), 0.0).clamp(0, 1)
        return place * (self.x0_grid.shape[1] - 1)

    def _denoised(self, time: Tensor) -> Tensor:
        """x̂_0 `[B, L, C]` at a checked time, 0-d or `[B]`."""
        batch, points = self.x0_grid.shape[:2]
        place = self._place(time)
        lower = place.floor().clamp(max=max(points - 2, 0)).expand(batch)
        weight = (place - lower).to(self.x0_grid.dtype).reshape(-1, 1, 1)
        rows = torch.arange(batch, device=self.x0_grid.device)
        below = self.x0_grid[rows, lower.long()]
        above = self.x0_grid[rows, (lower.long() + 1).clamp(max=points - 1)]
        return torch.lerp(below, above, weight.expand_as(below))


@dataclass(frozen=True)
class DXHead:
    """N denoised states for each factor, over the segment that the student is trained on."""

    grid_points: int = 10
    reaches_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.grid_points < 1:
            raise ValueError(f"grid_points must be at least 1, got {self.grid_points}")

    @property
    def sizes(self) -> HeadSizes:
        return HeadSizes(velocities=self.grid_points)

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> DXPolicy:
        source = as_time("t_src", t_src, x_src)
        raw_dst = (unshift_time(source, segment.shift) - segment.length).clamp(min=0)
        t_dst = shift_time(raw_dst, segment.shift)
        return DXPolicy.from_velocity(outputs.velocities.transpose(1, 2), x_src, source, t_dst, segment.shift)
