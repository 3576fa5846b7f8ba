"""Gaussian mixtures over x_0, and the velocity fields that they define.

    q(x_0 | x_t)  ∝  N(x_t; α_t x_0, σ_t² I) / N(x_src; α_src x_0, σ_src² I) · q(x_0 | x_src)   (Eq. 22)

α = 1 - t, σ = t; t = 1 is noise, t = 0 is data, and 0 < t <= t_src <= 1. As a function of x_0 the ratio
is exp(η·x_0 - λ‖x_0‖²/2), with (ν, ζ as in section F, S = (t_src t)²)

    λ = ζ/S = (t_src - t)(t_src + t - 2 t t_src) / (t_src t)²
    η = ν/S = (1 - t)/t² · (x_t - x_src)  +  (t_src - t)(t_src + t - t t_src) / (t_src t)² · x_src

so that a component A N(μ, v I) becomes A' N(μ', v' I), where ρ = 1/(1 + λv),

    μ' = ρ (μ + v η),    v' = ρ v,                                                       (Eqs. 24-25)
    log A' = log A + (C/2) log ρ + ρ (2 μ·η - λ‖μ‖² + v‖η‖²)/2 + const                     (Eq. 27)

Eq. 27 is written for one variance shared by all components and divides by ζ, which is 0 at t = t_src;
this form keeps the terms that a variance per component needs and has no special case: there λ = η = 0
and the mixture comes back unchanged. v = 0 is the discrete limit (Eqs. 29-30). With t_src = 1 the
denominator is constant in x_0, so the mixture is a *prior* over data, and its velocity the exact
marginal velocity of that data distribution.

In float32 the terms of log A' cancel. They are therefore taken about r, the posterior mean of a
Gaussian N(m, w I) as wide as the mixture: with d = μ - r and g = η - λr they read ρ (2 d·g - λ‖d‖² + v‖g‖²)/2.
The result does not depend on r, so m and w carry no gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform
from pitools.path import align, as_time
from pitools.types import Time

FEW = 16
"""Components up to which log-weights are normalised across memory."""


@dataclass(frozen=True, eq=False, init=False)
class GaussianMixture:
    """A mixture of K isotropic Gaussians in R^C, or a batch of them.

    means: `[..., K, C]`.
    log_weights: `[..., K]`; normalised here. -inf marks a component that is not there.
    variance: broadcastable to `[..., K]`; 0 makes the components points.

    Everything is held in float32 or better. Raises `ValueError` for shapes that do not match, NaN or
    infinite means, a NaN or +inf log-weight, a mixture with no component left, a variance that is
    negative or not finite.
    """

    means: Tensor
    log_weights: Tensor
    variance: Tensor

    def __init__(self, means: Tensor, log_weights: Tensor, variance: Tensor | float) -> None:
        if means.ndim < 2:
            raise ValueError(f"means must be [..., K, C], got shape {tuple(means.shape)}")
        if 0 in means.shape[-2:]:
            raise ValueError(f"means must hold at least one component and channel, got {tuple(means.shape)}")
        if log_weights.shape != means.shape[:-1]:
            raise ValueError(
                f"log_weights must be [..., K] = {tuple(means.shape[:-1])} for means {tuple(means.shape)}, "
                f"got {tuple(log_weights.shape)}"
            )
        dtype = torch.promote_types(torch.promote_types(means.dtype, log_weights.dtype), torch.float32)
        spread = torch.as_tensor(variance, dtype=dtype, device=means.device)
        if not _broadcasts(spread.shape, log_weights.shape, strict=True):
            raise ValueError(
                f"variance must broadcast to [..., K] = {tuple(log_weights.shape)}, got {tuple(spread.shape)}"
            )
        means, log_weights = means.to(dtype), _normalised(log_weights.to(dtype))
        if not all_finite(means):
            raise ValueError("means hold a NaN or an infinite value")
        if log_weights.numel() and math.isnan(log_weights.detach().amax()):
            raise ValueError("log_weights hold a NaN or +inf, or leave a mixture without any component")
        low, high = map(float, spread.detach().aminmax()) if spread.numel() else (0.0, 0.0)
        if not (low >= 0 and high < math.inf):
            raise ValueError(f"variance must be finite and not negative, got values from {low:g} to {high:g}")
        # K lies innermost in memory, so that sums over a small C run along vectors of K.
        object.__setattr__(self, "means", means.mT.contiguous().mT)
        object.__setattr__(self, "log_weights", log_weights)
        object.__setattr__(self, "variance", spread)

    @property
    def components(self) -> int:
        """K."""
        return self.means.shape[-2]

    @property
    def channels(self) -> int:
        """C."""
        return self.means.shape[-1]

    def detach(self) -> Self:
        """The same mixture without a graph."""
        twin = copy.copy(self)  # nothing to check again
        for name in ("means", "log_weights", "variance"):
            object.__setattr__(twin, name, getattr(self, name).detach())
        return twin

    def mean(self) -> Tensor:
        """`[..., C]`, the mean of the mixture."""
        return _weighted_sum(self.log_weights.exp(), self.means)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at `x` `[..., C]`, whose leading dimensions broadcast with the mixture's.

        Raises `ValueError` where a variance is 0: points have no density.
        """
        self._check_state("x", x)
        if not bool((self.variance > 0).all()):
            raise ValueError("a mixture with variance 0 has no density; give its components a variance first")
        distance = (x.unsqueeze(-2) - self.means).square().sum(-1)
        log_norm = (2 * math.pi * self.variance).log() * (self.channels / 2)
        return torch.logsumexp(self.log_weights - log_norm - distance / (2 * self.variance), dim=-1)

    def sample(self, shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draws of shape `[*shape, ..., C]`, where `...` are the mixture's own leading dimensions."""
        shape = tuple(shape)
        count = math.prod(shape)
        batch = self.log_weights.shape[:-1]
        weights = self.log_weights.exp().reshape(-1, self.components)
        means = self.means.reshape(-1, self.components, self.channels)
        if count == 0:
            return means.new_empty(*shape, *batch, self.channels)
        picks = torch.multinomial(weights, count, replacement=True, generator=generator)  # [batch, count]
        centres = means.gather(1, picks.unsqueeze(-1).expand(-1, -1, self.channels))
        deviation = self.variance.sqrt().expand(self.log_weights.shape).reshape(-1, self.components).gather(1, picks)
        noise = torch.randn(centres.shape, generator=generator, dtype=centres.dtype, device=centres.device)
        draws = centres + deviation.unsqueeze(-1) * noise
        return draws.transpose(0, 1).reshape(*shape, *batch, self.channels)

    def condition(self, x_t: Tensor, t: Time, x_src: Tensor | None = None, t_src: Time = 1.0) -> GaussianMixture:
        """The posterior over x_0 at (x_t, t), given that this mixture is the one at (x_src, t_src) (Eq. 23).

        x_t: `[..., C]`, for one mixture or for a batch of them with as many leading dimensions, which
        broadcast.  x_src: of x_t's shape; not needed at t_src = 1, where the mixture is a prior.
        t, t_src: float, 0-d or `[B]`, aligned with x_t's leading dimension, 0 < t <= t_src <= 1.
        Raises `ValueError` for shapes that do not match, times out of range, or a missing x_src.
        """
        ratio = self._ratio(x_t, t, x_src, t_src)
        logits, shrink = self._logits(ratio)
        shift = self.variance.unsqueeze(-1) * ratio.eta.unsqueeze(-2)
        means = shrink.unsqueeze(-1) * (self.means + shift)
        variance = torch.broadcast_to(shrink * self.variance, logits.shape)
        return GaussianMixture(torch.broadcast_to(means, (*logits.shape, self.channels)), logits, variance)

    def denoise(self, x_t: Tensor, t: Time, x_src: Tensor | None = None, t_src: Time = 1.0) -> Tensor:
        """E[x_0 | x_t] `[..., C]`, the mean of `condition(...)`; arguments and errors are the same."""
        return self._denoise(self._ratio(x_t, t, x_src, t_src))

    def velocity(self, x_t: Tensor, t: Time, x_src: Tensor | None = None, t_src: Time = 1.0) -> Tensor:
        """u = (x_t - E[x_0 | x_t]) / t `[..., C]` (Eq. 28); arguments and errors as in `condition`."""
        ratio = self._ratio(x_t, t, x_src, t_src)
        return (ratio.x_t - self._denoise(ratio)) / ratio.time

    def tempered(self, temperature: float) -> GaussianMixture:
        """The mixture nearest to q^(1/T) / ∫ q^(1/T) (Eqs. 3-4): means stay, variances become T v.

        A component's own power integrates to A^(1/T) v^(C(1 - 1/T)/2) up to a constant; Eq. 4 leaves
        out the factor in v, which all components share there. Raises `ValueError` unless T > 0, and
        for a mixture of points and Gaussians, whose power has no limit.
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be a positive number, got {temperature}")
        logits = (self.log_weights - self.log_weights.amax(-1, keepdim=True)) / temperature
        widest = self.variance.amax(-1, keepdim=True) if self.variance.ndim else self.variance
        if not torch.equal(self.variance, widest.expand_as(self.variance)):
            if not bool((self.variance > 0).all()):
                raise ValueError("a mixture with both zero and positive variances cannot be tempered")
            logits = logits + (self.variance / widest).log() * (self.channels / 2 * (1 - 1 / temperature))
        return GaussianMixture(self.means, logits, self.variance * temperature)

    def dropped(self, rate: float, generator: Randomness = None) -> GaussianMixture:
        """Each component left out with probability `rate`, the others renormalised (section 5.1).

        One mask over K for each sample (leading dimension), the same for all its factors; `generator` may be one
        for each sample. A sample that
        would lose every component of some factor keeps them all. Raises `ValueError` unless 0 <= rate < 1.
        """
        if not 0 <= rate < 1:
            raise ValueError(f"rate must lie in [0, 1), got {rate}")
        shape = list(self.log_weights.shape)
        shape[1:-1] = [1] * len(shape[1:-1])
        masked = self.log_weights.masked_fill(uniform(shape, generator, like=self.means) < rate, -math.inf)
        empty = (masked == -math.inf).all(-1, keepdim=True)
        if empty.ndim > 2:
            empty = empty.flatten(1).any(1).reshape(-1, *(1 for _ in shape[1:]))
        return GaussianMixture(self.means, torch.where(empty, self.log_weights, masked), self.variance)

    @cached_property
    def _reference(self) -> tuple[Tensor, Tensor]:
        """The centre `[..., C]` and the variance `[..., 1]` of a Gaussian as wide as the mixture."""
        means, variance = self.means.detach(), self.variance.detach()
        centre = means.mean(-2)
        spread = (means - centre.unsqueeze(-2)).square().sum(-1).amax(-1, keepdim=True) / self.channels
        return centre, spread + (variance.amax(-1, keepdim=True) if variance.ndim else variance)

    def _check_state(self, name: str, x: Tensor) -> None:
        batch = self.log_weights.shape[:-1]
        if x.ndim == 0 or x.shape[-1] != self.channels or not _broadcasts(x.shape[:-1], batch):
            raise ValueError(
                f"{name} must be [..., C] = [..., {self.channels}] with leading dimensions that broadcast with the "
                f"mixture's {tuple(batch)}, got {tuple(x.shape)}"
            )

    def _ratio(self, x_t: Tensor, t: Time, x_src: Tensor | None, t_src: Time) -> _Ratio:
        """λ and η of the likelihood ratio, checked."""
        self._check_state("x_t", x_t)
        if self.log_weights.ndim > 1 and self.log_weights.ndim != x_t.ndim:
            raise ValueError(
                f"x_t {tuple(x_t.shape)} must have as many leading dimensions as the batch of mixtures "
                f"{tuple(self.log_weights.shape[:-1])}: times are aligned with the first one"
            )
        x_t = x_t.to(torch.promote_types(x_t.dtype, self.means.dtype))
        source = as_time("t_src", t_src, x_t)
        time = as_time("t", t, x_t, maximum=source)
        if x_src is None:
            if not bool((source == 1).all()):
                raise ValueError("x_src is needed unless t_src is 1, where the mixture is a prior over data")
        elif x_src.shape != x_t.shape:
            raise ValueError(f"x_src must have x_t's shape {tuple(x_t.shape)}, got {tuple(x_src.shape)}")
        time, source = align(time, x_t), align(source, x_t)
        product = (time * source).square()
        precision = (source - time) * (source + time - 2 * time * source) / product
        alpha = (1 - time) / time.square()
        if x_src is None:
            return _Ratio(x_t, time, precision, alpha * x_t)
        drift = (source - time) * (source + time - time * source) / product
        return _Ratio(x_t, time, precision, alpha * (x_t - x_src) + drift * x_src)

    def _logits(self, ratio: _Ratio) -> tuple[Tensor, Tensor]:
        """log A' up to a constant, `[..., K]`, and ρ, broadcastable to it."""
        precision, eta = ratio.precision, ratio.eta
        centre, spread = self._reference
        scale = 1 + precision * spread
        r = (centre + spread * eta) / scale
        g = (eta - precision * centre) / scale
        d = self.means - r.unsqueeze(-2)
        half = (precision / 2).unsqueeze(-1) if precision.ndim else precision / 2
        inner = (d * (g.unsqueeze(-2) - half * d)).sum(-1)
        shrink = 1 / (1 + precision * self.variance)
        own = self.variance * (g.square().sum(-1, keepdim=True) / 2)
        return self.log_weights + shrink * (inner + own) + (self.channels / 2) * shrink.log(), shrink

    def _denoise(self, ratio: _Ratio) -> Tensor:
        """Σ_k A'_k μ'_k."""
        logits, shrink = self._logits(ratio)
        weights = torch.softmax(logits, dim=-1) * shrink
        return _weighted_sum(weights, self.means) + (weights * self.variance).sum(-1, keepdim=True) * ratio.eta


@dataclass(frozen=True)
class _Ratio:
    """exp(η·x_0 - λ‖x_0‖²/2) at (x_t, time): times and `precision` λ aligned with x_t, `eta` of its shape."""

    x_t: Tensor
    time: Tensor
    precision: Tensor
    eta: Tensor


def _weighted_sum(weights: Tensor, means: Tensor) -> Tensor:
    """Σ_k weights_k means_k: `[..., K]` and `[..., K, C]` to `[..., C]`."""
    # Policy maths is exact inside autocast too, which rounds products of matrices.
    with torch.autocast(means.device.type, enabled=False):
        return (weights.unsqueeze(-2) @ means.to(weights.dtype)).squeeze(-2)


def _normalised(logits: Tensor) -> Tensor:
    """Log-weights `[..., K]` whose exponentials sum to 1."""
    if logits.shape[-1] > FEW:
        return torch.log_softmax(logits, dim=-1)
    # On a CPU the last dimension is gone through a number at a time, any other along vectors: up to nine times faster.
    return (
        torch.log_softmax(logits.mT.contiguous(), dim=-2).mT if logits.ndim > 1 else torch.log_softmax(logits, dim=-1)
    )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    values = values.detach()
    # One pass over memory: only what overflows or is not finite has a sum that is not.
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def _broadcasts(shape: Sequence[int], onto: Sequence[int], strict: bool = False) -> bool:
    """Whether two shapes broadcast; `strict`, whether `shape` does so without enlarging `onto`.

    (torch.broadcast_shapes takes 0.2 ms a call, as long as a policy's velocity.)
    """
    if strict and len(shape) > len(onto):
        return False
    pairs = zip(reversed(shape), reversed(onto), strict=False)
    return all(a == b or a == 1 or (b == 1 and not strict) for a, b in pairs)
