"""The bridge to torchdiffeq: dx/ds = (t_end - t_src) u(x, t_src + s (t_end - t_src)), s from 0 to 1.

Each sample has its own interval; the step is shared, and its error is the largest over the samples.
torchdiffeq evaluates the field at the end of a step, so an interval that ends at t = 0 is integrated
down to t_end = `LAST_TIME`·t_src and closed with one Euler step, as in the fixed-step loop.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pitools.path import align
from pitools.solvers.fixed import Field
from pitools.solvers.tableaus import Adaptive

LAST_TIME = 1e-4


def solve_adaptive(f: Field, x: Tensor, t_src: Tensor, t_dst: Tensor, method: Adaptive) -> Tensor:
    """The state at `t_dst`; times 0-d or `[B]` with t_dst <= t_src."""
    from torchdiffeq import odeint

    t_end = torch.maximum(t_dst, LAST_TIME * t_src)
    span = t_end - t_src

    def scaled(s: Tensor, x: Tensor) -> Tensor:
        t = torch.minimum(t_src, torch.maximum(t_end, t_src + s.to(t_src.dtype) * span))
        return align(span, x) * f(x, t)

    def worst_sample(error: Tensor) -> Tensor:
        return error.reshape(x.shape).flatten(1).square().mean(1).sqrt().max()

    unit = torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
    x_end: Tensor = odeint(
        scaled, x, unit, rtol=method.rtol, atol=method.atol, method="dopri5", options={"norm": worst_sample}
    )[-1]
    rest = t_dst - t_end
    if not bool((rest < 0).any()):
        return x_end
    last = x_end + align(rest, x) * f(x_end, t_end)
    return torch.where(align(rest < 0, x), last, x_end)
