"""Few-step sampling: one look of the network and one roll-out of its policy for each segment.

    x ← x + ∫_{t_i}^{t_{i+1}} π_i(x_t, t) dt,    π_i = G(x, t_i, c),    t_0 = 1 > ... > t_n = 0   (section 3)

Every step but the last may be tempered (paper, B.1). With re-noising of strength h, as in the official
stochastic sampler, a segment is integrated further down, to t_end, and noised again up to t_{i+1}:

    m = (σ_{i+1} α_i / (σ_i α_{i+1}))^(h²),    t_end = σ_{i+1} m / c,    c = α_{i+1} + σ_{i+1} m
    x_{i+1} = c x_end + σ_{i+1} sqrt(1 - m²) n,    n ~ N(0, I)

which keeps the marginals: h = 0 is the ODE, h = ∞ draws all the noise anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pitools.draws import Randomness, normal
from pitools.path import segments, shift_time
from pitools.rollout import integrate
from pitools.solvers import Solver
from pitools.types import Conditions, Policy, Schedule, Student, Tempered


@dataclass(frozen=True)
class Look:
    """One network evaluation while sampling: the `policy` seen at latents `x`, `t_src`, and used down to `t_dst`."""

    x: Tensor
    t_src: float
    t_dst: float
    policy: Policy


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
    generator: Randomness = None,
    renoise: float = 0.0,
    callback: Callable[[Look], None] | None = None,
) -> Tensor:
    """Latents at t = 0 from `noise` at t = 1, in `nfe` network evaluations; float32 or better.

    noise: latents `[B, ...]` of the student's shape.  nfe, shift, final_step_scale, temperature: what is not
    given is taken from `student.schedule`; temperature "auto" is clamp(0.1*(nfe - 1), 0, 1) for policies that
    have one.  method, step_size: as in `integrate`.  generator: of the noise that `renoise` > 0 (the strength
    h) draws, one, or one for each sample.  callback: told each network evaluation, before its segment is integrated.
    Raises `ValueError` for an nfe below 1, a shift, scale or temperature that is not positive, a negative
    strength, and a temperature other than 1 asked of a policy that has none.
    """
    own = student.schedule
    schedule = Schedule(
        nfe=own.nfe if nfe is None else nfe,
        shift=own.shift if shift is None else shift,
        final_step_scale=own.final_step_scale if final_step_scale is None else final_step_scale,
        temperature=own.temperature if temperature is None else temperature,
    )
    if not renoise >= 0:
        raise ValueError(f"renoise must not be negative, got {renoise}")
    pack, unpack = student.factorisation.pack, student.factorisation.unpack
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    times = [shift_time(raw, schedule.shift) for raw in segments(schedule.nfe, schedule.final_step_scale)]
    for t_src, t_next in pairwise(times):
        policy = student(x, t_src, conditions)
        if t_next > 0:
            policy = _tempered(policy, schedule)
        kept = _kept(t_src, t_next, renoise)
        scale = (1 - t_next) + t_next * kept
        t_dst = t_next * kept / scale
        if callback is not None:
            callback(Look(x, t_src, t_dst, policy))
        x = unpack(integrate(policy, pack(x), t_src, t_dst, method, step_size, schedule.shift), x.shape)
        if kept < 1:
            fresh = normal(x.shape, generator, like=x)
            x = scale * x + t_next * math.sqrt(1 - kept**2) * fresh
    return x


def auto_temperature(nfe: int) -> float:
    """The published rule, clamp(0.1*(nfe - 1), 0, 1): 0.3 at 4 NFE, 0.7 at 8; 1 where there is one step."""
    return min(0.1 * (nfe - 1), 1.0) if nfe > 1 else 1.0


def _tempered(policy: Policy, schedule: Schedule) -> Policy:
    wanted, has_one = schedule.temperature, isinstance(policy, Tempered)
    if wanted == "auto":
        wanted = auto_temperature(schedule.nfe) if has_one else 1.0
    if wanted == 1:
        return policy
    if not isinstance(policy, Tempered):
        raise ValueError(f"a {type(policy).__name__} has no temperature; leave it at 1, not {wanted}")
    return policy.tempered(wanted)


def _kept(t_src: float, t_next: float, renoise: float) -> float:
    """m: the share of the old noise that stays; 1 without re-noising, and at the end."""
    if renoise == 0 or t_next == 0:
        return 1.0
    ratio = t_next * (1 - t_src) / (t_src * (1 - t_next))
    return float(ratio ** (renoise**2)) if math.isfinite(renoise) else 0.0
