"""π-ID: match the policy's velocity to the teacher's at the states that the policy itself visits.

    L = E_t ½ ‖ G(x_t, t) - π(x_t, t) ‖²,    x_t = x_src + ∫_{t_src}^{t} π_D(x_s, s) ds    (Algorithms 1 and 3)

over one segment [t_dst, t_src], with raw time τ ~ U(τ_dst, τ_src) and π_D the policy without a graph,
with GM dropout where it is asked for. The norm is the mean over the elements of a latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.path import as_time, shift_time, unshift_time
from pitools.rollout import visit
from pitools.solvers import Solver
from pitools.types import Conditions, Dropped, Factorisation, Policy, Time, VelocityField


@dataclass(frozen=True)
class Imitation:
    """loss: `[B]`, with the student's graph.  x_dst: latents at t_dst on the detached roll-out, where the
    next segment of data-free training starts (Algorithm 3, line 14)."""

    loss: Tensor
    x_dst: Tensor


def imitation_loss(
    teacher: VelocityField,
    policy: Policy,
    x_src: Tensor,
    t_src: Time,
    t_dst: Time,
    *,
    factorisation: Factorisation,
    conditions: Conditions | None = None,
    states: int = 2,
    dropout: float = 0.0,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
    floor: float = 0.0,
    generator: torch.Generator | None = None,
) -> Imitation:
    """One segment of on-policy imitation (Algorithm 1): one roll-out, `states` teacher queries.

    teacher: asked without a graph, on latents.  policy: the student's answer at (x_src, t_src), with its
    graph.  x_src: latents `[B, ...]`.  t_src in (0, 1], t_dst in [0, t_src): float, 0-d or `[B]`.
    factorisation: the student's.  states: intermediate states M for each sample.  dropout: the rate of GM
    dropout in the detached roll-out (section 5.1).  step_size: raw length of a substep.  floor: raw time
    below which no state is drawn; a sampler asks for no velocity below its last substep, where a teacher
    that is sharp in x (a point set's) would outweigh all the rest, its error growing as 1/t².
    Raises `ValueError` for fewer than one state, an empty segment, a floor above it, dropout on a policy that
    has none, a teacher's answer of another shape, and what the roll-out refuses.
    """
    if states < 1:
        raise ValueError(f"states must be at least 1, got {states}")
    batch, shape = len(x_src), x_src.shape
    with torch.no_grad():
        detached = policy.detach()
        if dropout:
            if not isinstance(detached, Dropped):
                raise ValueError(f"dropout {dropout} was asked for, but a {type(policy).__name__} has no components")
            detached = detached.dropped(dropout, generator)
        source = as_time("t_src", t_src, x_src)
        end = as_time("t_dst", t_dst, x_src, maximum=source, zero=True)
        if not bool((end < source).all()):
            raise ValueError("a segment must not be empty: t_dst must lie below t_src")
        t = _intermediate_times(source, end, states, batch, shift, floor, generator)
        visited = visit(
            detached, factorisation.pack(x_src), source, torch.cat([t, end.expand(1, batch)]), method, step_size, shift
        )
        x_t, x_dst = visited[:-1], factorisation.unpack(visited[-1], shape)
        targets = [_ask(teacher, factorisation, x, time, shape, conditions) for x, time in zip(x_t, t, strict=True)]
    errors = [
        (policy.velocity(x, time) - target).square().flatten(1).mean(1)
        for x, time, target in zip(x_t, t, targets, strict=True)
    ]
    return Imitation(torch.stack(errors).mean(0) / 2, x_dst)


def _ask(
    teacher: VelocityField,
    factorisation: Factorisation,
    x_t: Tensor,
    t: Tensor,
    shape: torch.Size,
    conditions: Conditions | None,
) -> Tensor:
    """The teacher's velocity at a packed state, packed."""
    u = teacher.velocity(factorisation.unpack(x_t, shape), t, conditions)
    if u.shape != shape:
        raise ValueError(f"the teacher answered {tuple(u.shape)} for latents {tuple(shape)}")
    return factorisation.pack(u)


def _intermediate_times(
    t_src: Tensor,
    t_dst: Tensor,
    states: int,
    batch: int,
    shift: float,
    floor: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Times `[M, B]`, falling, even in distribution over the raw segment above `floor`."""
    draws = torch.rand(batch, states, generator=generator, device=t_src.device, dtype=t_src.dtype)
    share = draws.sort(dim=1).values.T  # rising, in [0, 1): short of 1, so that no t is 0
    raw_src = unshift_time(t_src, shift)
    raw_dst = unshift_time(t_dst, shift).clamp(min=floor)
    if not bool((raw_dst < raw_src).all()):
        raise ValueError(f"floor {floor:g} leaves no room below t_src (raw {float(raw_src.min()):g})")
    t = shift_time(raw_src - (raw_src - raw_dst) * share, shift)
    return torch.maximum(torch.minimum(t, t_src), t_dst)
