"""The GMFlow policy (paper, 3.2 and F): a mixture over x_0 for each factor, conditioned as the state moves.

    q(u | x_src) = Π_i Σ_k A_ik N(u_i; μ_ik, s² I),    x_0 = x_src - t_src u                    (Eq. 21)
    π(x_t, t) = (x_t - E[x_0 | x_t]) / t                                                        (Eq. 28)

It answers to the state it is asked about, not only to the time, and it is valid down to t = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from pitools.draws import Randomness
from pitools.mixture import GaussianMixture
from pitools.path import align, as_time
from pitools.policies.checks import check_state, parameters
from pitools.policies.head import HeadSizes, Outputs, Segment
from pitools.types import Time


@dataclass(frozen=True, eq=False)
class GMPolicy:
    """A Gaussian mixture over x_0 for each factor, as seen from (x_src, t_src).

    mixture: means `[B, L, K, C]`.  x_src: `[B, L, C]`.  t_src in (0, 1]: float, 0-d or `[B]`.
    Raises `ValueError` for shapes that do not match and times out of range.
    """

    mixture: GaussianMixture
    x_src: Tensor
    t_src: Time

    def __post_init__(self) -> None:
        check_state("x_src", self.x_src)
        object.__setattr__(self, "x_src", parameters("x_src", self.x_src))
        batch, factors, channels = self.x_src.shape
        means = self.mixture.means
        if means.ndim != 4 or (*means.shape[:2], means.shape[-1]) != (batch, factors, channels):
            raise ValueError(
                f"the mixture's means must be [B, L, K, C] = [{batch}, {factors}, K, {channels}], "
                f"got {tuple(means.shape)}"
            )
        object.__setattr__(self, "t_src", as_time("t_src", self.t_src, self.x_src))

    @classmethod
    def from_velocity(
        cls, u_means: Tensor, log_weights: Tensor, log_std: Tensor | float, x_src: Tensor, t_src: Time
    ) -> Self:
        """From a mixture over velocities: means `[B, L, K, C]`, log-weights `[B, L, K]`, log_std `[B]` (Eq. 21)."""
        check_state("x_src", x_src)
        if u_means.ndim != 4 or (*u_means.shape[:2], u_means.shape[-1]) != tuple(x_src.shape):
            raise ValueError(f"u_means must be [B, L, K, C] for x_src {tuple(x_src.shape)}, got {tuple(u_means.shape)}")
        dtype = torch.float32
        for given in (u_means, log_weights, x_src, *([log_std] if isinstance(log_std, Tensor) else [])):
            dtype = torch.promote_types(dtype, given.dtype)
        x_src, u_means = x_src.to(dtype), u_means.to(dtype)
        std = torch.as_tensor(log_std, dtype=dtype, device=x_src.device).exp()
        if std.ndim > 1 or (std.ndim == 1 and len(std) != len(x_src)):
            raise ValueError(f"log_std must be a number or [B] = [{len(x_src)}], got {tuple(std.shape)}")
        source = as_time("t_src", t_src, x_src)
        means = x_src.unsqueeze(-2) - align(source, u_means) * u_means
        variance = (align(source, x_src) * align(std, x_src)).square()
        return cls(GaussianMixture(means, log_weights, variance), x_src, source)

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """`[B, L, C]` at (x_t, t), 0 < t <= t_src (Eq. 28)."""
        check_state("x_t", x_t, self.x_src)
        return self.mixture.velocity(x_t, t, self.x_src, self.t_src)

    def factors(self) -> Self:
        """The same policy with each of its B·L factors as a sample of its own, `[B L, 1, C]`."""
        batch, count, _ = self.x_src.shape
        q = self.mixture
        variance = q.variance.expand(batch, count, -1) if q.variance.ndim > 1 else q.variance
        source = torch.as_tensor(self.t_src).expand(batch).repeat_interleave(count)
        whole = GaussianMixture(
            q.means.flatten(0, 1).unsqueeze(1),
            q.log_weights.flatten(0, 1).unsqueeze(1),
            variance.flatten(0, 1).unsqueeze(1) if variance.ndim > 1 else variance,
        )
        return type(self)(whole, self.x_src.flatten(0, 1).unsqueeze(1), source)

    def __getitem__(self, samples: Tensor) -> Self:
        """The policy of some samples, an index `[n]`."""
        q = self.mixture
        variance = q.variance.expand(len(self.x_src), -1, -1)[samples] if q.variance.ndim > 1 else q.variance
        mixture = GaussianMixture(q.means[samples], q.log_weights[samples], variance)
        source = self.t_src[samples] if isinstance(self.t_src, Tensor) and self.t_src.ndim else self.t_src
        return type(self)(mixture, self.x_src[samples], source)

    def detach(self) -> Self:
        """The same policy without a graph."""
        return type(self)(self.mixture.detach(), self.x_src.detach(), self.t_src)

    def tempered(self, temperature: float) -> Self:
        """The policy at `temperature` (Eq. 4)."""
        return type(self)(self.mixture.tempered(temperature), self.x_src, self.t_src)

    def dropped(self, rate: float, generator: Randomness = None) -> Self:
        """GM dropout (section 5.1): one mask for each sample over K, all factors alike, never all of K."""
        return type(self)(self.mixture.dropped(rate, generator), self.x_src, self.t_src)


@dataclass(frozen=True)
class GMHead:
    """K means and K log-weights for each factor, one log-std for each sample."""

    components: int = 8
    reaches_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.components < 1:
            raise ValueError(f"components must be at least 1, got {self.components}")

    @property
    def sizes(self) -> HeadSizes:
        return HeadSizes(velocities=self.components, factor=self.components, sample=1, start="spread")

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> GMPolicy:
        return GMPolicy.from_velocity(outputs.velocities, outputs.factor, outputs.sample.squeeze(-1), x_src, t_src)
