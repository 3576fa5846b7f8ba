"""A Gaussian-mixture policy as it is written down, one pass over [B, K, C, H, W] for each substep (paper, Eqs. 24-28).

    ν = t_src² α_t x_t - t² α_src x_src,    ζ = t_src² α_t² - t² α_src²,    D = s² ζ + (t_src t)²
    m_k = (s² ν + (t_src t)² μ_k) / D,    log A'_k = log A_k - ‖ν - ζ μ_k‖² / (2 ζ D),    A' = softmax
    π(x_t, t) = (x_t - Σ_k A'_k m_k) / t

with α = 1 - t. It knows nothing of `pitools.mixture`, and is what roll-outs are timed against.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from pitools.policies import GMPolicy


@dataclass(frozen=True)
class Elementwise:
    """means `[B, K, C, H, W]`, log_weights `[B, K, 1, H, W]`, variance `[B, 1, 1, 1, 1]`, x_src `[B, 1, C, H, W]`."""

    means: Tensor
    log_weights: Tensor
    variance: Tensor
    x_src: Tensor
    t_src: float

    @classmethod
    def of(cls, policy: GMPolicy, height: int, width: int) -> Self:
        """The same policy, of factors that are the pixels of `height` x `width`, with one variance a sample."""
        q = policy.mixture
        batch = len(q.means)
        return cls(
            q.means.permute(0, 2, 3, 1).unflatten(-1, (height, width)).contiguous(),
            q.log_weights.permute(0, 2, 1).unflatten(-1, (height, width)).unsqueeze(2).contiguous(),
            q.variance.expand(batch, 1, 1).reshape(batch, 1, 1, 1, 1),
            image(policy.x_src, height, width),
            float(torch.as_tensor(policy.t_src)),
        )

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """`[B, 1, C, H, W]` at (x, t), 0 < t <= t_src."""
        source, alpha, alpha_src = self.t_src, 1 - t, 1 - self.t_src
        nu = (source**2 * alpha) * x - (t**2 * alpha_src) * self.x_src
        zeta = (source * alpha) ** 2 - (t * alpha_src) ** 2
        denominator = self.variance * zeta + (source * t) ** 2
        posterior = (self.variance * nu + (source * t) ** 2 * self.means) / denominator
        logits = self.log_weights
        if zeta > 0:
            distance = ((nu - zeta * self.means) ** 2).sum(2, keepdim=True)
            logits = logits - 0.5 * distance / (zeta * denominator)
        x_0 = (torch.softmax(logits, 1) * posterior).sum(1, keepdim=True)
        return (x - x_0) / t

    def rollout(self, x: Tensor, t_from: float, t_to: float, substeps: int) -> Tensor:
        """`[B, 1, C, H, W]` at `t_to`, in Euler steps from (x, t_from)."""
        times: list[float] = torch.linspace(t_from, t_to, substeps + 1, dtype=torch.float64).tolist()
        for t, t_next in pairwise(times):
            x = x + (t_next - t) * self.velocity(x, t)
        return x


def image(x: Tensor, height: int, width: int) -> Tensor:
    """A packed state `[B, L, C]` as `[B, 1, C, H, W]`."""
    pixels: Tensor = x.mT.unflatten(-1, (height, width))
    return pixels.unsqueeze(1).contiguous()


def packed(x: Tensor) -> Tensor:
    """`[B, 1, C, H, W]` as `[B, L, C]`."""
    return x.squeeze(1).flatten(2).mT
