"""Few-step sampling: one look of the network and one roll-out of its policy for each segment.

    x ← x + ∫_{t_i}^{t_{i+1}} π_i(x_t, t) dt,    π_i = G(x, t_i, c),    t_0 = 1 > ... > t_n = 0   (section 3)

Every step but the last may be tempered (paper, B.1). With re-noising of strength h, as in the official
stochastic sampler, a segment is integrated further down, to t_end, and noised again up to t_{i+1}:

    m = (σ_{i+1} α_i / (σ_i α_{i+1}))^(h²),    t_end = σ_{i+1} m / c,    c = α_{i+1} + σ_{i+1} m
    x_{i+1} = c x_end + σ_{i+1} sqrt(1 - m²) n,    n ~ N(0, I)

which keeps the marginals: h = 0 is the ODE, h = ∞ draws all the noise anew.

Best-of-N searches among noises ε_1 ... ε_N for each sample (FreeFlow, section 5.2):

    n* = argmax_n score(sample(ε_n), c)

A student that keeps its teacher's map from noise to data chooses for the teacher, too, at a fraction of the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from pitools.draws import Randomness, normal
from pitools.path import align, segments, shift_time
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


class Scorer(Protocol):
    """What best-of-N maximises; any function of this form is one."""

    def __call__(self, latents: Tensor, conditions: Conditions | None) -> Tensor:
        """A score `[B]` of each of the samples `[B, ...]` at t = 0: the higher, the better; NaN for none."""
        ...


@dataclass(frozen=True, eq=False)
class Best:
    """What scored highest for each sample: `noise` and `sample` `[B, ...]`, `score` and `index`, in 0..N-1, `[B]`."""

    noise: Tensor
    sample: Tensor
    score: Tensor
    index: Tensor


@torch.no_grad()
def best_of(
    student: Student,
    noises: Iterable[Tensor],
    scorer: Scorer,
    conditions: Conditions | None = None,
    nfe: int | None = None,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
) -> Best:
    """The best of N candidates for each of B samples, by the student's own samples (FreeFlow, section 5.2 and Fig. 8).

    noises: N latents `[B, ...]`; a tensor `[N, B, ...]`, or a generator, of which one at a time is in memory.
    nfe, method, step_size: as in `sample`.  Among equal scores the first wins.
    Raises `ValueError` for no candidates, candidates or scores of another shape, and a sample whose scores are all NaN.

    The noise that won is the teacher's start, too:

        best = best_of(student, (torch.randn(8, 4, 32, 32) for _ in range(16)), scorer, conditions)
        x = integrate(Conditioned(teacher, conditions), best.noise, 1.0, 0.0)
    """
    best: Best | None = None
    for n, noise in enumerate(noises):
        x = sample(student, noise, nfe, conditions, method=method, step_size=step_size)
        score = scorer(x, conditions)
        if not isinstance(score, Tensor) or score.shape != x.shape[:1]:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(f"the scorer must return a tensor [{len(x)}], a score for each sample, got {got}")
        found = Best(noise, x, score, torch.full_like(score, n, dtype=torch.long))
        best = found if best is None else _better(best, found)
    if best is None:
        raise ValueError("noises must hold at least one candidate, got none")
    unscored = best.score.isnan().nonzero().flatten().tolist()
    if unscored:
        raise ValueError(f"all scores of sample {unscored[0]} are NaN, so that none of its noises is the best")
    return best


def improves(score: Tensor, best: Tensor) -> Tensor:
    """Where a later score beats the best so far: it is higher, or the first that is not NaN."""
    return (score > best) | (best.isnan() & ~score.isnan())


def _better(best: Best, found: Best) -> Best:
    if found.noise.shape != best.noise.shape:
        raise ValueError(
            f"noises must be of one shape, got {tuple(best.noise.shape)} and then {tuple(found.noise.shape)}"
        )
    better = improves(found.score, best.score)

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(align(better, new), new, old)

    return Best(
        chosen(found.noise, best.noise),
        chosen(found.sample, best.sample),
        chosen(found.score, best.score),
        chosen(found.index, best.index),
    )


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
