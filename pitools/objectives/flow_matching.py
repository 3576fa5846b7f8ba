"""Flow matching, by which a teacher itself is trained (paper, Eq. 2).

    L = E ½ ‖ u - G(x_t, t) ‖²,    x_t = (1 - t) x_0 + t ε,    u = (x_t - x_0)/t = ε - x_0

with raw time τ ~ U(0, 1], shifted to t. Its minimiser is the marginal velocity E[u | x_t] (Eq. 1). The norm is the
mean over the elements of a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pitools.draws import Randomness, normal, uniform
from pitools.path import check_shift, diffuse, shift_time
from pitools.types import Conditions, VelocityField


def flow_matching_loss(
    field: VelocityField,
    x_0: Tensor,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
    shift: float = 1.0,
) -> Tensor:
    """The loss `[B]` of `field`, which answers with a graph, on data latents `x_0` `[B, ...]`.

    Raises `ValueError` for a shift that is not positive and an answer of another shape.
    """
    check_shift(shift)
    x_0 = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
    t = shift_time(1 - uniform([len(x_0)], randomness, like=x_0), shift)
    noise = normal(x_0.shape, randomness, like=x_0)
    answer = field.velocity(diffuse(x_0, noise, t), t, conditions)
    if answer.shape != x_0.shape:
        raise ValueError(f"the field answered {tuple(answer.shape)} for latents {tuple(x_0.shape)}")
    return (noise - x_0 - answer).square().flatten(1).mean(1) / 2
