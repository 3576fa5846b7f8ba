"""Scheduled trajectory mixing (paper, B.2): where the teacher steps and where the student's own policy rolls.

    τ_src ─ student ─ a_1 ═ teacher ═ b_1 ─ student ─ a_2 ═ teacher ═ b_2 ─ student ─ window ─ τ_dst

The M teacher intervals [b_m, a_m] are `ratio` of the room, which is the raw segment less one window (and less
what lies below a floor); the M + 1 student intervals are the rest of it. Both are spacings of sorted uniforms, so
that at ratio 0 the a_m are sorted uniforms over the room, and at ratio 1 the teacher's intervals tile it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform


@dataclass(frozen=True)
class Intervals:
    """The teacher's intervals in raw time: starts a and ends b, both `[M, B]`, a_1 >= b_1 >= a_2 >= ... >= b_M."""

    starts: Tensor
    ends: Tensor


def teacher_ratio(step: int, start: float, decay_steps: int) -> float:
    """The teacher's share of the path at `step`: from `start` at step 0 along a line to 0 at `decay_steps`, then 0.

    With `decay_steps` 0 there is no schedule, and the share is 0 from the first step on.
    Raises `ValueError` for a start outside [0, 1] or negative steps.
    """
    check_ratio("start", start)
    if step < 0 or decay_steps < 0:
        raise ValueError(f"step and decay_steps must not be negative, got {step} and {decay_steps}")
    return start * (1 - step / decay_steps) if step < decay_steps else 0.0


def mixed_intervals(
    raw_src: Tensor,
    raw_dst: Tensor,
    states: int,
    ratio: float,
    window: float,
    floor: float,
    randomness: Randomness,
) -> Intervals:
    """`states` teacher intervals for each sample of the raw segments from `raw_src` down to `raw_dst`, both `[B]`.

    ratio: the teacher's share of the room raw_src - max(raw_dst + window, floor).  window: raw length that is kept
    free below every interval, so that [b - window, a] lies in the segment; it may reach below the floor.  floor:
    raw time below which no interval reaches.  No start is 0.
    Raises `ValueError` for fewer than one state, a ratio outside [0, 1], a window that is negative or not shorter
    than every segment, and a floor that leaves no room.
    """
    if states < 1:
        raise ValueError(f"states must be at least 1, got {states}")
    check_ratio("ratio", ratio)
    if not window >= 0:
        raise ValueError(f"window must not be negative, got {window}")
    if raw_src.ndim != 1 or raw_dst.shape != raw_src.shape:
        raise ValueError(f"raw_src and raw_dst must both be [B], got {tuple(raw_src.shape)} and {tuple(raw_dst.shape)}")
    if not bool((raw_src - raw_dst > window).all()):
        shortest = float((raw_src - raw_dst).min())
        raise ValueError(
            f"window {window:g} must be shorter than the segment, here {shortest:g} in raw time; shrink it"
        )
    lowest = (_lowest_end(raw_dst, window) if window else raw_dst).clamp(min=floor)
    room = raw_src - lowest
    if not bool((room > 0).all()):
        raise ValueError(f"floor {floor:g} leaves no room below t_src (raw {float(raw_src.min()):g})")

    # Shares of the room above each boundary, [M, B]; the draws lie in [0, 1).
    student = uniform([len(raw_src), states], randomness, like=raw_src).sort(dim=1).values.T
    if ratio == 0:
        raw = raw_src - room * student
        return Intervals(raw, raw)
    cuts = uniform([len(raw_src), states - 1], randomness, like=raw_src).sort(dim=1).values.T
    before = torch.cat([torch.zeros_like(raw_src)[None], cuts])
    after = torch.cat([cuts, torch.ones_like(raw_src)[None]])
    starts = (1 - ratio) * student + ratio * before
    ends = (1 - ratio) * student + ratio * after
    shares = torch.stack([starts, ends], dim=1).flatten(0, 1)  # [2M, B]: a_1, b_1, a_2, ..., never falling
    # Draws below 1 keep all shares below it, but for the last at ratio 1; so no start is 0, and none passes `lowest`.
    raw = torch.where(shares < 1, raw_src - room * shares, lowest)
    return Intervals(raw[0::2], raw[1::2])


def check_ratio(name: str, value: float) -> None:
    """`ValueError` unless the share lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def _lowest_end(raw_dst: Tensor, window: float) -> Tensor:
    """raw_dst + window, rounded such that the window below it does not pass raw_dst."""
    lowest = raw_dst + window
    return torch.where(lowest - window < raw_dst, torch.nextafter(lowest, torch.ones_like(lowest)), lowest)
