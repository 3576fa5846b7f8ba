"""π-ID: match the policy's velocity to the teacher's at the states that the policy itself visits.

    L = E_t ½ ‖ G(x_t, t) - π(x_t, t) ‖²,    x_t = x_src + ∫_{t_src}^{t} π_D(x_s, s) ds    (Algorithms 1 and 3)

over one segment [t_dst, t_src], with raw time τ ~ U(τ_dst, τ_src) and π_D the policy without a graph,
with GM dropout where it is asked for. The norm is the mean over the elements of a latent.

    L = E ½ ‖ G(x_a, t_a) - 1/(t_c - t_a) ∫_{t_a}^{t_c} π(x_t, t) dt ‖²                      (Eqs. 5 and 6)

replaces the velocity at a state by its mean over a window below it, and with a teacher ratio above 0 the path to
the states alternates between π_D and steps of the teacher from t_a to t_b; then [t_c, t_a] is both together, the
teacher's step and the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.draws import Randomness
from pitools.objectives.mixing import mixed_intervals
from pitools.path import align, as_time, shift_time, unshift_time
from pitools.rollout import integrate, velocities, velocity, visit
from pitools.solvers import Solver
from pitools.types import Conditions, Dropped, Factorisation, Policy, Time, VelocityField


@dataclass(frozen=True)
class Imitation:
    """loss: `[B]`, with the student's graph.  x_dst: latents at t_dst on the detached roll-out, where the
    next segment of data-free training starts (Algorithm 3, line 14); on a mixed path, that path's end."""

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
    teacher_ratio: float = 0.0,
    window: float = 0.0,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
    floor: float = 0.0,
    generator: Randomness = None,
) -> Imitation:
    """One segment of imitation (Algorithm 1, B.2 and B.3): one path, `states` teacher queries along it.

    teacher: asked without a graph, on latents.  policy: the student's answer at (x_src, t_src), with its
    graph.  x_src: latents `[B, ...]`.  t_src in (0, 1], t_dst in [0, t_src): float, 0-d or `[B]`.
    factorisation: the student's.  states: intermediate states M for each sample.  dropout: the rate of GM
    dropout in the detached roll-out (section 5.1).  teacher_ratio: the share of the segment that the teacher's
    steps cover (B.2); 0 is on-policy.  window: raw length over which the policy's velocity is averaged (B.3);
    where the teacher's step and the window together are under 2 substeps, the velocity at the state is matched.
    step_size: raw length of a substep.  floor: raw time below which no state is drawn; a sampler asks for no
    velocity below its last substep, where a teacher that is sharp in x (a point set's) would outweigh all the
    rest, its error growing as 1/t².  generator: one, or one for each sample.
    Raises `ValueError` for fewer than one state, an empty segment, a floor above it, a window as long, a ratio
    outside [0, 1], dropout on a policy that has none, a teacher's answer of another shape, and what the roll-out
    refuses.
    """
    batch, shape = len(x_src), x_src.shape
    with torch.no_grad():
        detached = policy.detach()
        if dropout:
            if not isinstance(detached, Dropped):
                raise ValueError(f"dropout {dropout} was asked for, but a {type(policy).__name__} has no components")
            detached = detached.dropped(dropout, generator)
        source = as_time("t_src", t_src, x_src).expand(batch)
        end = as_time("t_dst", t_dst, x_src, maximum=source, zero=True).expand(batch)
        if not bool((end < source).all()):
            raise ValueError("a segment must not be empty: t_dst must lie below t_src")
        raw_src, raw_dst = unshift_time(source, shift), unshift_time(end, shift)
        drawn = mixed_intervals(raw_src, raw_dst, states, teacher_ratio, window, floor, generator)

        def shifted(raw: Tensor) -> Tensor:
            """t at raw times `[..., B]`, falling with them, inside the segment and exact at both its ends."""
            t = torch.minimum(torch.maximum(shift_time(raw, shift), end), source)
            t = torch.where(raw >= raw_src, source, torch.where(raw <= raw_dst, end, t))
            return t.cummin(dim=0).values

        local = (drawn.starts - drawn.ends + window) / step_size < 2 - 1e-4

        def ask(x: Tensor, time: Tensor) -> Tensor:
            return _ask(teacher, factorisation, x, time, shape, conditions)

        x = factorisation.pack(x_src.detach()).to(torch.promote_types(x_src.dtype, torch.float32))
        if teacher_ratio == 0:
            t = shifted(drawn.starts)
            visited = visit(detached, x, source, torch.cat([t, end[None]]), method, step_size, shift)
            x_t, x_dst = visited[:-1], visited[-1]
            targets = torch.stack([ask(x, time) for x, time in zip(x_t, t, strict=True)])
        else:
            bounds = shifted(torch.stack([drawn.starts, drawn.ends], dim=1).flatten(0, 1))
            t, t_step = bounds[0::2], bounds[1::2]
            states_met, answers, now = [], [], source
            for t_a, t_b in zip(t, t_step, strict=True):
                x = _roll(detached, x, source, now, t_a, method, step_size, shift)
                u = ask(x, t_a)
                states_met.append(x)
                answers.append(u)
                x, now = x + align(t_b - t_a, x) * u, t_b
            x_dst = _roll(detached, x, source, now, end, method, step_size, shift)
            x_t, targets = torch.stack(states_met), torch.stack(answers)
    if bool(local.all()):
        matched = velocities(policy, x_t, t)
    else:
        each = zip(x_t, t, torch.minimum(shifted(drawn.ends - window), t), local, strict=True)
        matched = torch.stack([_matched(policy, *at, method, step_size, shift) for at in each])
    errors = (matched - targets).square().flatten(2).mean((0, 2))
    return Imitation(errors / 2, factorisation.unpack(x_dst, shape))


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


def _roll(
    policy: Policy,
    x: Tensor,
    t_src: Tensor,
    now: Tensor,
    t_dst: Tensor,
    method: str | Solver,
    step_size: float,
    shift: float,
) -> Tensor:
    """The state at `t_dst` of the policy's roll-out through (x, now); all times `[B]`."""
    # A sample that is already there stands still at t_src, where the policy is defined; `now` may be 0.
    moves = t_dst < now
    if not bool(moves.any()):
        return x
    stop = torch.where(moves, t_dst, t_src)
    return integrate(policy, x, torch.where(moves, now, t_src), stop, method, step_size, shift)


def _matched(
    policy: Policy,
    x_t: Tensor,
    t: Tensor,
    t_window: Tensor,
    local: Tensor,
    method: str | Solver,
    step_size: float,
    shift: float,
) -> Tensor:
    """What meets the teacher's velocity, with a graph: the policy's at (x_t, t) where `local` `[B]`, else its mean
    velocity from there to `t_window`."""
    reached = visit(policy, x_t, t, t_window[None], method, step_size, shift)[0]
    # Where local, the window may be empty: with a width of 1 neither value nor gradient is divided by 0.
    mean = (reached - x_t) / align(torch.where(local, 1.0, t_window - t), x_t)
    return torch.where(align(local, x_t), velocity(policy, x_t, t), mean) if bool(local.any()) else mean
