"""Few-step sampling: one look of the network and one roll-out of its policy for each segment.

    x ← x + ∫_{t_i}^{t_{i+1}} π_i(x_t, t) dt,    π_i = G(x, t_i, c),    t_0 = 1 > ... > t_n = 0   (section 3)

Every step but the last may be tempered (paper, B.1).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pitools.path import segments, shift_time
from pitools.rollout import integrate
from pitools.solvers import Solver
from pitools.types import Conditions, Schedule, Student, Tempered


@torch.no_grad()
def sample(
    student: Student,
    noise: Tensor,
    nfe: int | None = None,
    conditions: Conditions | None = None,
    shift: float | None = None,
    final_step_scale: float | None = None,
    temperature: float | Literal["auto"] | None = None,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
) -> Tensor:
    """Latents at t = 0 from `noise` at t = 1, in `nfe` network evaluations; float32 or better.

    noise: latents `[B, ...]` of the student's shape.  nfe, shift, final_step_scale, temperature: what is not
    given is taken from `student.schedule`; temperature "auto" is clamp(0.1*(nfe - 1), 0, 1).
    method, step_size: as in `integrate`.
    Raises `ValueError` for an nfe below 1, a shift, scale or temperature that is not positive, and a
    temperature other than 1 for a policy that has none.
    """
    own = student.schedule
    schedule = Schedule(
        nfe=own.nfe if nfe is None else nfe,
        shift=own.shift if shift is None else shift,
        final_step_scale=own.final_step_scale if final_step_scale is None else final_step_scale,
        temperature=own.temperature if temperature is None else temperature,
    )
    warmth = schedule.temperature if schedule.temperature != "auto" else auto_temperature(schedule.nfe)
    factorisation = student.factorisation
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for raw_src, raw_dst in pairwise(segments(schedule.nfe, schedule.final_step_scale)):
        t_src, t_dst = shift_time(raw_src, schedule.shift), shift_time(raw_dst, schedule.shift)
        policy = student(x, t_src, conditions)
        if warmth != 1 and raw_dst > 0:
            if not isinstance(policy, Tempered):
                raise ValueError(f"a {type(policy).__name__} has no temperature; leave it at 1, not {warmth}")
            policy = policy.tempered(warmth)
        packed = integrate(policy, factorisation.pack(x), t_src, t_dst, method, step_size, schedule.shift)
        x = factorisation.unpack(packed, x.shape)
    return x


def auto_temperature(nfe: int) -> float:
    """The published rule, clamp(0.1*(nfe - 1), 0, 1): 0.3 at 4 NFE, 0.7 at 8; 1 where there is one step."""
    return min(0.1 * (nfe - 1), 1.0) if nfe > 1 else 1.0
