"""Roll-outs: x_dst = x_src + ∫_{t_src}^{t_dst} π(x_t, t) dt (paper, section 3), in substeps even in raw time.

`integrate` gives the end point, `trajectory` the whole path, `visit` the states at chosen times of one
roll-out, `mean_velocity` the average that Eqs. 5 and 6 compare with the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from pitools import kernels
from pitools.mixture import GaussianMixture
from pitools.path import ROUNDING, align, as_time, substep_grid
from pitools.policies import GMPolicy
from pitools.solvers import (
    SCALE,
    Adaptive,
    Clock,
    Exponential,
    PerFactor,
    Solver,
    exponential_grid,
    exponential_rows,
    follow,
    solve_adaptive,
    solve_per_factor,
    solver,
    steps,
)
from pitools.types import Time


class AnyField(Protocol):
    """Whatever has a velocity: a policy, a teacher, a Gaussian mixture that is a prior."""

    def velocity(self, x_t: Tensor, t: Tensor, /) -> Tensor:
        """The velocity at a state `[B, ...]`; t is 0-d or `[B]`."""
        ...


@dataclass(frozen=True)
class Trajectory:
    """A roll-out with all its substeps: `times` `[S + 1]` or `[S + 1, B]`, `states` `[S + 1, B, ...]`."""

    times: Tensor
    states: Tensor


def integrate(
    field: AnyField,
    x: Tensor,
    t_src: Time,
    t_dst: Time,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
) -> Tensor:
    """The state at `t_dst` of the ODE through (x, t_src); float32 or better.

    x: `[B, ...]`.  t_src in (0, 1], t_dst in [0, t_src]: float, 0-d or `[B]`, so that every sample may
    have its own interval.  step_size: raw length of a substep; the number of substeps is
    ceil(raw span / step_size - 1e-4), for each sample.  method: a name from `pitools.solvers.SOLVERS`
    or a solver; `auto`, `adaptive` and `dopri5` take no step size.
    Raises `ValueError` for an unknown method, times out of range or t_dst > t_src.
    """
    return visit(field, x, t_src, _one_stop(t_dst), method, step_size, shift)[0]


def visit(
    field: AnyField,
    x: Tensor,
    t_src: Time,
    t_stops: Tensor,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
) -> Tensor:
    """The states `[M, B, ...]` at each of the times `t_stops`, `[M]` or `[M, B]`, falling, of one roll-out.

    The other arguments and the errors are those of `integrate`.
    """
    x, source, stops = _prepare(x, t_src, t_stops)
    chosen = solver(method)
    if isinstance(chosen, Adaptive | Exponential | PerFactor):
        states = []
        for now, stop in pairwise((source, *stops)):
            # A sample that is already there stands still at t_src, where the field is defined.
            moves = stop < now
            leg = torch.where(moves, now, source), torch.where(moves, stop, source)
            if isinstance(chosen, Adaptive):
                x = solve_adaptive(field.velocity, x, *leg, chosen)
            elif isinstance(chosen, Exponential):
                x = _exponential(field, x, *leg, chosen)
            else:
                x = _per_factor(field, x, *leg, chosen)
            states.append(x)
        return torch.stack(states)
    grid = substep_grid(source, stops, step_size, shift)
    fused = kernels.states(field, x, grid.times, grid.stops, chosen)
    if isinstance(fused, Tensor):
        return fused
    visited = [x] * len(stops)
    for row, state in enumerate(steps(field.velocity, x, grid.times, chosen), start=1):
        for m, reached in enumerate(grid.stops == row):
            visited[m] = torch.where(align(reached, x), state, visited[m])
    return torch.stack(visited)


def _exponential(field: AnyField, x: Tensor, t_src: Tensor, t_dst: Tensor, method: Exponential) -> Tensor:
    """One interval by an exponential method."""
    clock = Clock.of(t_src, _scale(field))
    numbers = exponential_rows(clock, exponential_grid(clock, t_src, t_dst, method), method.order)
    fused = kernels.rows(field, x, numbers)
    return fused if isinstance(fused, Tensor) else follow(field.velocity, x, numbers)


def _per_factor(field: AnyField, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor) -> Tensor:
    """One interval with steps for each factor of a GM policy, or for each sample of any other field."""
    if type(field) is GMPolicy and x.shape == field.x_src.shape:
        std = field.mixture.variance.detach().sqrt()
        scale = std.mean() if std.numel() == 1 else std.mean(-1).expand(x.shape[:2]).flatten()
        fused = kernels.adaptive(field, x, t_src, t_dst, method, scale)
        if not isinstance(fused, str):
            return fused.x_end.reshape(x.shape)
        each = field.factors()
        source, end = (t.expand(len(x)).repeat_interleave(x.shape[1]) for t in (t_src, t_dst))

        def of_factors(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
            return velocity(each[index], x.unsqueeze(1), t).squeeze(1)

        return solve_per_factor(of_factors, x.flatten(0, 1), source, end, method, scale).x_end.reshape(x.shape)

    source, end = (t.expand(len(x)) for t in (t_src, t_dst))

    def of_samples(part: Tensor, t: Tensor, index: Tensor) -> Tensor:
        # The others stay where they were, and their answers are not used.
        whole = x.index_put((index,), part.unflatten(1, x.shape[1:]))
        u: Tensor = field.velocity(whole, source.index_put((index,), t))[index].flatten(1)
        return u

    return solve_per_factor(of_samples, x.flatten(1), source, end, method, _scale(field)).x_end.reshape(x.shape)


def _scale(field: object) -> Tensor | float:
    """The standard deviation of a mixture's components, 0-d or `[B]`, which places times."""
    mixture = field.mixture if isinstance(field, GMPolicy) else field
    if not isinstance(mixture, GaussianMixture):
        return SCALE
    std = mixture.variance.detach().sqrt()
    if std.numel() == 1 or not isinstance(field, GMPolicy):
        return std.mean()
    return std.expand(*field.x_src.shape[:2], std.shape[-1]).flatten(1).mean(1)


def velocity(field: AnyField, x: Tensor, t: Time) -> Tensor:
    """The field's velocity at (x, t), which is what the field itself answers, in one kernel where there is one.

    x: `[B, ...]`.  t: float, 0-d or `[B]`.  Raises what the field raises.
    """
    return velocities(field, x.unsqueeze(0), as_time("t", t, x).unsqueeze(0))[0]


def velocities(field: AnyField, x: Tensor, t: Tensor) -> Tensor:
    """The field's velocities `[M, B, ...]` at the states x `[M, B, ...]` and the times t `[M]` or `[M, B]`, falling.

    Raises what the field raises.
    """
    fused = kernels.velocities(field, x, t) if bool((t > 0).all()) else "the field tells what is wrong"
    if isinstance(fused, Tensor):
        return fused
    return torch.stack([field.velocity(*each) for each in zip(x, t, strict=True)])


def trajectory(
    field: AnyField,
    x: Tensor,
    t_src: Time,
    t_dst: Time,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
) -> Trajectory:
    """The roll-out from (x, t_src) to `t_dst` with every substep; arguments and errors as in `integrate`.

    Raises `ValueError` for an adaptive method, whose steps are its own.
    """
    x, source, stops = _prepare(x, t_src, _one_stop(t_dst))
    chosen = solver(method)
    if isinstance(chosen, Adaptive | Exponential | PerFactor):
        raise ValueError(
            "a trajectory needs a method with a step size; auto, adaptive and dopri5 choose their own steps"
        )
    times = substep_grid(source, stops, step_size, shift).times
    rows = torch.arange(len(times), device=x.device).reshape(-1, *(1 for _ in times.shape[1:])).expand(times.shape)
    states = kernels.states(field, x, times, rows, chosen)
    if isinstance(states, str):
        states = torch.stack([x, *steps(field.velocity, x, times, chosen)])
    return Trajectory(times, states)


def mean_velocity(
    field: AnyField,
    x: Tensor,
    t_from: Time,
    t_to: Time,
    method: str | Solver = "euler",
    step_size: float = 1 / 128,
    shift: float = 1.0,
) -> Tensor:
    """1/(t_to - t_from) ∫ π(x_t, t) dt over the window from (x, t_from) to t_to < t_from (Eqs. 5-6).

    Arguments and errors as in `integrate`; also `ValueError` for an empty window.
    """
    x, source, stops = _prepare(x, t_from, _one_stop(t_to))
    width = stops[0] - source
    if not bool((width < 0).all()):
        raise ValueError("the window of a mean velocity must not be empty: t_to must lie below t_from")
    return (integrate(field, x, source, stops[0], method, step_size, shift) - x) / align(width, x)


def _one_stop(t: Time) -> Tensor:
    """`[1]` or `[1, B]`; a number keeps all its digits until it meets the state's dtype."""
    return (t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)).unsqueeze(0)


def _prepare(x: Tensor, t_src: Time, t_stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.ndim < 2:
        raise ValueError(f"a state must be [B, ...] with at least two dimensions, got shape {tuple(x.shape)}")
    source = as_time("t_src", t_src, x)
    stops = t_stops.to(source)
    if stops.ndim == 1 and source.ndim:
        stops = stops.unsqueeze(1)
    fits = t_stops.ndim == 1 or t_stops.shape[1:] == x.shape[:1]
    if fits and bool(((stops >= 0) & (stops <= source * (1 + ROUNDING))).all()):
        return x, source, torch.minimum(stops, source)
    # One of them is off; it is named.
    each = [as_time("t_dst", stop, x, maximum=source, zero=True) for stop in t_stops]
    return x, source, torch.stack(torch.broadcast_tensors(*each))
