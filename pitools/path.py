"""The linear path, its conversions, and the grids of time along it.

    x_t = alpha x_0 + sigma eps,   alpha = 1 - t,  sigma = t,   u = eps - x_0 = (x_t - x_0) / t

t = 1 is noise and t = 0 is data. Raw time tau and time t are tied by the shift
t = m tau / (1 + (m - 1) tau) (paper, B.4). Segments, substeps and windows are uniform in raw time;
networks and policies see t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pitools.types import Schedule, Time

T = TypeVar("T", float, Tensor)

ROUNDING = 4 * torch.finfo(torch.float32).eps


def as_time(name: str, t: Time, like: Tensor, *, maximum: Time = 1.0, zero: bool = False) -> Tensor:
    """`t` as a 0-d tensor or `[B]` on `like`'s device, in its dtype (float32 at least), checked.

    Raises `ValueError` unless t is a float, a 0-d tensor or `[B]` with B = `like.shape[0]`, and every
    value lies in (0, maximum], or [0, maximum] where `zero` is set. A maximum that is a tensor is
    one time for each sample. What exceeds it by no more than float32 rounding, as the same number does
    after a trip through another dtype, is taken to be the maximum.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    time = torch.as_tensor(t, dtype=dtype, device=like.device)
    if time.ndim > 1 or (time.ndim == 1 and (like.ndim < 2 or time.shape[0] != like.shape[0])):
        raise ValueError(
            f"{name} must be a number, a 0-d tensor or one value for each of the {like.shape[0]} samples, "
            f"got shape {tuple(time.shape)} for a state {tuple(like.shape)}"
        )
    if isinstance(maximum, float):
        if not time.numel():
            return time
        low, high = (float(end) for end in time.detach().aminmax())
        if not ((low >= 0 if zero else low > 0) and high <= maximum * (1 + ROUNDING)):
            bound = "1]" if maximum == 1.0 else f"t_src]: it may not exceed t_src, here {maximum:g}"
            raise ValueError(f"{name} must lie in {'[' if zero else '('}0, {bound}, got {_range(time)}")
        return time if high <= maximum else time.clamp(max=maximum)
    limit = torch.as_tensor(maximum, dtype=dtype, device=like.device)
    inside = ((time >= 0) if zero else (time > 0)) & (time <= limit * (1 + ROUNDING))
    if not bool(inside.all()):
        bound = f"t_src]: it may not exceed t_src, here {_range(limit)}"
        raise ValueError(f"{name} must lie in {'[' if zero else '('}0, {bound}, got {_range(time)}")
    return torch.minimum(time, limit)


def _range(values: Tensor) -> str:
    low, high = float(values.min()), float(values.max())
    return f"{low:g}" if low == high else f"values from {low:g} to {high:g}"


def align(t: Tensor, like: Tensor) -> Tensor:
    """A 0-d or `[B]` time reshaped to `[B, 1, ..., 1]`, so that it meets `like`'s leading dimension."""
    return t.reshape(t.shape + (1,) * (like.ndim - t.ndim)) if t.ndim else t


def shift_time(raw: T, m: float) -> T:
    """t = m raw / (1 + (m - 1) raw) (paper, B.4); `raw` in [0, 1], any shape."""
    return raw if m == 1 else m * raw / (m * raw + (1 - raw))  # in this form exactly 0 at 0 and 1 at 1


def unshift_time(t: T, m: float) -> T:
    """raw = t / (m - (m - 1) t), the inverse of `shift_time`; `t` in [0, 1], any shape."""
    return t if m == 1 else t / (t + m * (1 - t))


def diffuse(x_0: Tensor, noise: Tensor, t: Time) -> Tensor:
    """x_t = (1 - t) x_0 + t noise, for t in [0, 1]. `ValueError` for shapes that differ."""
    _alike(x_0=x_0, noise=noise)
    time = align(as_time("t", t, x_0, zero=True), x_0)
    return (1 - time) * x_0 + time * noise


def velocity_from_x0(x_0: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """u = (x_t - x_0) / t, for t in (0, 1] (paper, Eq. 2). `ValueError` for shapes that differ."""
    _alike(x_0=x_0, x_t=x_t)
    return (x_t - x_0) / align(as_time("t", t, x_t), x_t)


def x0_from_velocity(u: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """x_0 = x_t - t u, for t in [0, 1]. `ValueError` for shapes that differ."""
    _alike(u=u, x_t=x_t)
    return x_t - align(as_time("t", t, x_t, zero=True), x_t) * u


def noise_from_velocity(u: Tensor, x_t: Tensor, t: Time) -> Tensor:
    """eps = x_t + (1 - t) u, for t in [0, 1]. `ValueError` for shapes that differ."""
    _alike(u=u, x_t=x_t)
    return x_t + (1 - align(as_time("t", t, x_t, zero=True), x_t)) * u


def _alike(**states: Tensor) -> None:
    if len({x.shape for x in states.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in states.items())
        raise ValueError(f"states must have one shape, got {shapes}")


def check_shift(shift: float) -> None:
    """`ValueError` unless the shift m is a positive number."""
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be a positive number, got {shift}")


def segments(nfe: int, final_step_scale: float = 1.0) -> tuple[float, ...]:
    """Raw boundaries 1 = b_0 > ... > b_nfe = 0 of an `nfe`-step schedule (paper, B.4).

    All segments are 1 / (nfe - 1 + final_step_scale) long, but for the last, which is
    `final_step_scale` times that. `ValueError` for nfe < 1 or a scale that is not positive.
    """
    schedule = Schedule(nfe=nfe, final_step_scale=final_step_scale)
    return (*(1 - i * schedule.segment for i in range(nfe)), 0.0)


@dataclass(frozen=True)
class SubstepGrid:
    """The times of a rollout that visits one or more stops.

    times: `[S + 1]` or `[S + 1, B]`, never rising; a sample that is done repeats its last time.
    stops: `[M]` or `[M, B]`, the row of `times` at which each stop is reached.
    """

    times: Tensor
    stops: Tensor


def substep_grid(t_src: Tensor, t_stops: Tensor, step_size: float, shift: float = 1.0) -> SubstepGrid:
    """The grid from `t_src` through each of `t_stops` in turn, even in raw time between stops.

    Each leg takes ceil(raw span / step_size - 1e-4) substeps, for each sample on its own: the 1e-4
    keeps rounding from adding a substep to an interval that is a multiple of the step.

    t_src: 0-d or `[B]`.  t_stops: `[M]` or `[M, B]`, falling, in [0, t_src].
    Raises `ValueError` for a step size that is not positive, or stops that rise.
    """
    check_shift(shift)
    if not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}")
    t_points = torch.stack(torch.broadcast_tensors(t_src, *t_stops))  # [M + 1] or [M + 1, B]
    raw = unshift_time(t_points.double(), shift)
    spans = raw[:-1] - raw[1:]
    if bool((spans < 0).any()):
        raise ValueError("an interval must run from a later time to an earlier one (t_dst <= t_src, stops falling)")
    counts = torch.ceil(spans / step_size - 1e-4).clamp(min=1) * (spans > 0)
    stops = counts.cumsum(0)

    row = torch.arange(int(stops[-1].max()) + 1, device=raw.device, dtype=raw.dtype)
    row = row.reshape(-1, 1, *(1 for _ in raw.shape[1:]))
    covered = ((row - (stops - counts)) / counts.clamp(min=1)).clamp(0, 1)  # of each leg, [S + 1, M, ...]
    row = row.squeeze(1)
    times = shift_time(raw[0] - (spans * covered).sum(1), shift).to(t_src.dtype)
    # The given times are exact: rounding must not miss t = 0, nor start above t_src, where no policy is defined.
    times = times.scatter(0, torch.cat([torch.zeros_like(stops[:1]), stops]).long(), t_points)
    times = torch.where(row >= stops[-1], t_points[-1], times)
    return SubstepGrid(times, stops.long())
