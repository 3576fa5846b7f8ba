"""The power-function moving average of weights (Karras et al. 2024, section 3.1).

    θ̂ ← β θ̂ + (1 - β) θ,    β_n = (1 - 1/n)^(γ + 1)

at step n = 1, 2, ...: the average weights step i by i^γ, so that it forgets the start without a warm-up.
"""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Averages the floating-point parameters of a module; buffers are copied.

    module: whose weights are followed.  gamma: γ >= 0; the larger, the shorter the memory.
    """

    def __init__(self, module: M, gamma: float = 7.0) -> None:
        if gamma < 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        self.gamma = gamma
        self.steps = 0
        self.module: M = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: M) -> None:
        """Take in the weights of `module` after an optimiser step."""
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.gamma + 1)
        for average, value in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(value, 1 - beta)
        for copied, current in zip(self.module.buffers(), module.buffers(), strict=True):
            copied.copy_(current)
