"""What π-ID and FreeFlow are compared with: short objectives on the same networks and teachers.

A flow map with two times answers with the mean velocity F(x_t, t, s) from t down to s, so that s is reached at
f(x_t, t, s) = x_t - (t - s) F. Those that start from data see x_t = (1 - t) x_0 + t ε; the others start from noise z.

    regression     ‖f(z, 1, 0) - x̂_0‖²           x̂_0: where the teacher's solver takes z
    cloning        ‖π(x̂_t, t) - u(x̂_t, t)‖²      x̂_t: on the teacher's own path (π-ID asks on the policy's)
    MeanFlow       ‖F - sg(u - (t - s) dF/dt)‖²   dF/dt = ∂_x F u + ∂_t F                    (FreeFlow, Eqs. 4-5)
    consistency    ‖f(x_t, t, 0) - sg f⁻(x_t', t', 0)‖²      x_t': a step of the teacher's from t to t' < t
    progressive    ‖f(x_t, t, s) - sg f⁻(f⁻(x_t, t, m), m, s)‖²      m half-way, f⁻ the student of the stage before

f⁻ is not trained: a moving average of the student (Song et al. 2023), or the student of twice as many steps, at first
the teacher's own Euler step (Salimans & Ho 2022). All are ½ a mean square over the elements of a latent, `[B]`, in our
sign of u. Distribution matching is FreeFlow's correction alone (`flow_map.correct`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pitools.path import align
from pitools.rollout import velocities
from pitools.types import Conditions, Factorisation, Policy, VelocityField


class TwoTimes(Protocol):
    """A flow map between any two times."""

    def __call__(self, x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The mean velocity F `[B, ...]` from latents x_t `[B, ...]` at t down to s, both `[B]`, 0 <= s <= t <= 1."""
        ...


def jump(flow_map: TwoTimes, x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
    """The state f(x_t, t, s) at s."""
    return x_t - align(t - s, x_t) * flow_map(x_t, t, s, conditions)


@torch.no_grad()
def teacher_path(
    teacher: VelocityField, x: Tensor, times: Tensor, conditions: Conditions | None = None
) -> tuple[Tensor, Tensor]:
    """Euler's states `[S + 1, B, ...]` from x along `times` `[S + 1, B]`, falling, and the velocities `[S, B, ...]`."""
    states, slopes = [x], []
    for t, t_next in pairwise(times):
        slopes.append(teacher.velocity(states[-1], t, conditions))
        states.append(states[-1] + align(t_next - t, x) * slopes[-1])
    return torch.stack(states), torch.stack(slopes)


def regression_loss(
    flow_map: TwoTimes, teacher: VelocityField, noise: Tensor, steps: int, conditions: Conditions | None = None
) -> Tensor:
    """One jump from noise z to where `steps` Euler steps of the teacher's lead."""
    one = noise.new_ones(len(noise))
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device).unsqueeze(1).expand(-1, len(noise))
    states, _ = teacher_path(teacher, noise, times, conditions)
    return _half_square(jump(flow_map, noise, one, 0 * one, conditions) - states[-1])


def cloning_loss(policy: Policy, states: Tensor, slopes: Tensor, times: Tensor, factorisation: Factorisation) -> Tensor:
    """The policy of a path's first state, asked at all but the last of the states that `teacher_path` gave."""
    x = torch.stack([factorisation.pack(state) for state in states[:-1]])
    targets = torch.stack([factorisation.pack(slope) for slope in slopes])
    return (velocities(policy, x, times[:-1]) - targets).square().flatten(2).mean((0, 2)) / 2


def mean_flow_loss(
    flow_map: TwoTimes,
    teacher: VelocityField,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    conditions: Conditions | None = None,
) -> Tensor:
    """MeanFlow with the teacher's velocity (FreeFlow, Eqs. 4 and 5), by a forward-mode derivative."""
    with torch.no_grad():
        u = teacher.velocity(x_t, t, conditions)
    with forward_ad.dual_level():
        answer = flow_map(forward_ad.make_dual(x_t, u), forward_ad.make_dual(t, torch.ones_like(t)), s, conditions)
        mean, slope = forward_ad.unpack_dual(answer)
    change = torch.zeros_like(mean) if slope is None else slope.detach()
    return _half_square(mean - (u - align(t - s, x_t) * change))


def consistency_loss(
    flow_map: TwoTimes,
    average: TwoTimes,
    teacher: VelocityField,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    conditions: Conditions | None = None,
) -> Tensor:
    """Jumps to 0 from both ends of an Euler step of the teacher's; where it ends at 0, its end is the answer."""
    zero = torch.zeros_like(t)
    with torch.no_grad():
        x_next = x_t + align(t_next - t, x_t) * teacher.velocity(x_t, t, conditions)
        target = jump(average, x_next, t_next, zero, conditions)
    return _half_square(jump(flow_map, x_t, t, zero, conditions) - target)


def progressive_loss(
    flow_map: TwoTimes,
    before: TwoTimes,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    conditions: Conditions | None = None,
) -> Tensor:
    """One jump in place of two of the stage before, as a velocity, so that all jumps count alike."""
    middle = (t + s) / 2
    with torch.no_grad():
        target = jump(before, jump(before, x_t, t, middle, conditions), middle, s, conditions)
        velocity = (x_t - target) / align(t - s, x_t)
    return _half_square(flow_map(x_t, t, s, conditions) - velocity)


def _half_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1) / 2
