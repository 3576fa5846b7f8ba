"""Random numbers from one generator for a batch, or from one for each of its samples.

One for each sample makes a draw a function of that sample's own key, whatever batch, process or accumulation
step it falls into; one for the batch is simpler where that does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Generator, Tensor

Randomness: TypeAlias = Generator | Sequence[Generator] | None
"""One generator, one for each sample of the leading dimension, or None for torch's global state."""


def uniform(shape: Sequence[int], randomness: Randomness, like: Tensor) -> Tensor:
    """Uniform on [0, 1), in `like`'s dtype and on its device; `ValueError` unless there are `shape[0]` generators."""
    return _draw(torch.rand, shape, randomness, like)


def normal(shape: Sequence[int], randomness: Randomness, like: Tensor) -> Tensor:
    """Standard normal, in `like`'s dtype and on its device; `ValueError` unless there are `shape[0]` generators."""
    return _draw(torch.randn, shape, randomness, like)


def _draw(kind: Callable[..., Tensor], shape: Sequence[int], randomness: Randomness, like: Tensor) -> Tensor:
    if randomness is None:
        return kind(shape, dtype=like.dtype, device=like.device)
    if isinstance(randomness, Generator):
        return kind(shape, generator=randomness, dtype=like.dtype, device=randomness.device).to(like.device)
    if len(randomness) != shape[0]:
        raise ValueError(f"{len(randomness)} generators do not serve {shape[0]} samples; pass one for each, or one")
    drawn = torch.empty(*shape, dtype=like.dtype, device=randomness[0].device if randomness else like.device)
    for sample, own in zip(drawn, randomness, strict=True):
        kind(shape[1:], generator=own, out=sample)
    return drawn.to(like.device)
