"""The polynomial policy: a denoised state that moves as a polynomial of the raw time since t_src.

    π(x_t, t) = (x_t - x̂_0(t)) / t,    x̂_0(t) = Σ_n c_n (raw_src - raw)^n,    c_n = x_src - t_src u_n

A sibling of the DX policy (its grid replaced by N coefficients), published for Qwen-Image; order 0 is a
shortcut. It answers to the time only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pitools.path import as_time, check_shift, unshift_time
from pitools.policies.checks import check_state, denoised_from_velocity, parameters, policy_velocity
from pitools.policies.head import HeadSizes, Outputs, Segment
from pitools.types import Time


@dataclass(frozen=True, eq=False)
class PolynomialPolicy:
    """Coefficients `[B, N, L, C]` of x̂_0 in rising powers of raw_src - raw.

    t_src in (0, 1]: float, 0-d or `[B]`.  shift: m.
    Raises `ValueError` for a wrong shape, NaN or infinite values, times out of range.
    """

    coefficients: Tensor
    t_src: Time
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.coefficients.ndim != 4 or self.coefficients.shape[1] < 1:
            raise ValueError(f"coefficients must be [B, N, L, C] with N >= 1, got {tuple(self.coefficients.shape)}")
        object.__setattr__(self, "coefficients", parameters("coefficients", self.coefficients))
        check_shift(self.shift)
        object.__setattr__(self, "t_src", as_time("t_src", self.t_src, self.coefficients))

    @classmethod
    def from_velocity(cls, u_coefficients: Tensor, x_src: Tensor, t_src: Time, shift: float = 1.0) -> Self:
        """From velocities `[B, N, L, C]`: c_n = x_src - t_src u_n for every n; x_src `[B, L, C]`."""
        return cls(denoised_from_velocity("u_coefficients", u_coefficients, x_src, t_src), t_src, shift)

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """`[B, L, C]` at (x_t, t), 0 < t <= t_src."""
        check_state("x_t", x_t, self.coefficients[:, 0])
        return policy_velocity(x_t, t, self.t_src, self._denoised)

    def detach(self) -> Self:
        """The same policy without a graph."""
        return type(self)(self.coefficients.detach(), self.t_src, self.shift)

    def basis(self, t: Tensor) -> Tensor:
        """`[..., N]`: the powers of raw_src - raw at checked times `[...]`, whose last dimension is 1 or B."""
        return self._elapsed(t).unsqueeze(-1) ** torch.arange(self.coefficients.shape[1], device=t.device)

    def _elapsed(self, time: Tensor) -> Tensor:
        """raw_src - raw."""
        source = torch.as_tensor(self.t_src, dtype=time.dtype, device=time.device)
        return unshift_time(source, self.shift) - unshift_time(time, self.shift)

    def _denoised(self, time: Tensor) -> Tensor:
        """x̂_0 `[B, L, C]` at a checked time, by Horner's rule."""
        elapsed = self._elapsed(time).reshape(-1, 1, 1)
        powers = self.coefficients.unbind(1)
        x_0 = powers[-1]
        for coefficient in reversed(powers[:-1]):
            x_0 = torch.addcmul(coefficient, elapsed, x_0)
        return x_0


@dataclass(frozen=True)
class PolynomialHead:
    """N coefficients for each factor (degree N - 1)."""

    coefficients: int = 4
    reaches_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.coefficients < 1:
            raise ValueError(f"coefficients must be at least 1, got {self.coefficients}")

    @property
    def sizes(self) -> HeadSizes:
        return HeadSizes(velocities=self.coefficients, start="first")

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> PolynomialPolicy:
        return PolynomialPolicy.from_velocity(outputs.velocities.transpose(1, 2), x_src, t_src, segment.shift)
