"""Exponential multistep: what is known of the velocity is integrated exactly, what is not is a polynomial.

With D(x, t) = x - t u(x, t), the denoised state, the ODE dx/dt = (x - D)/t has the solution

    x(t') = (t'/t) x(t) + t' ∫_{t'}^{t} D/τ² dτ,        1 = noise >= t > t' >= 0 = data

D is bounded and smooth, and is all that has to be guessed: by the polynomial, in a variable w(t), through its last
values D_r, D_{r-1}, .... An evaluation serves twice: it first corrects the step that led to it (base, as by Adams and
Moulton), then predicts the next one (X, as by Adams and Bashforth):

    base_r = (t_r/t_{r-1}) base_{r-1} + Σ_j c_rj D_{r-j},       X_{r+1} = (t_{r+1}/t_r) base_r + Σ_j b_rj D_{r-j}

At t' = 0 the prediction is D extrapolated to 0, so no field is asked there. The steps are even in

    w(t) = log((s + R - 1) / (s - s_src + δ)),  s = 1/t,        w(0) = 0

which is dense where a mixture changes: near t_src, where its components part, on the scale δ of s, and near t = 0,
where each of them shrinks, at t of about its standard deviation, to which R is inverse.

Predictor and corrector in the manner of UniPC (Zhao et al. 2023); D and exponential steps as in DPM-Solver++ (Lu et
al. 2022). The variable w is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pitools.path import align
from pitools.solvers.fixed import Field
from pitools.solvers.tableaus import Exponential

HISTORY = 4
"""How many D's a row may look at: three of the polynomial, and one more to repeat the step that came before."""

SCALE = 0.1
"""The components' standard deviation where none is given."""

_NODES, _WEIGHTS = (torch.from_numpy(values) / 2 for values in np.polynomial.legendre.leggauss(8))
_NODES = _NODES + 0.5


@dataclass(frozen=True)
class Clock:
    """The variable w of a roll-out from `t_src`, 0-d or `[B]`, float64: 0 at t = 0, and growing with t."""

    t_src: Tensor
    R: Tensor
    delta: Tensor

    @classmethod
    def of(cls, t_src: Tensor, scale: Tensor | float = SCALE) -> Clock:
        """scale: the components' standard deviation, a number, 0-d or `[B]`; 0 for points."""
        t_src = t_src.double()
        s_src = 1 / t_src
        std = torch.as_tensor(scale, dtype=torch.float64, device=t_src.device)
        # Chosen for mixtures of 8 in 16 channels, with means 0.3 to 0.7 apart and components 0.05 to 0.3 wide.
        # No step is shorter than some 1e-4 of t_src, so that times stay apart in float32.
        return cls(t_src, 3 / (std + 0.05).clamp(max=1), torch.maximum(1 / (2 + 3 * (s_src - 1)), s_src / 1000))

    def w(self, t: Tensor) -> Tensor:
        """w(t), for t in [0, t_src], `[..., B]`."""
        return ((1 + (self.R - 1) * t) / ((self.t_src - t) / self.t_src + self.delta * t)).log()

    def t(self, w: Tensor) -> Tensor:
        """The inverse of w."""
        return w.expm1() / (self.R - 1 + (1 / self.t_src - self.delta) * w.exp())


@dataclass(frozen=True)
class Rows:
    """A roll-out as numbers that depend on times alone, float64; T is nothing, or `[B]` if samples differ.

    times: `[S, T]`, of the evaluations, all in (0, t_src].  commit: `[S, 1 + H, T]`, of base_{r-1} and of D_r,
    D_{r-1}, ..., which give base_r.  move: likewise of base_r and the D's, which give X_{r+1}. Row 0 keeps base.
    """

    times: Tensor
    commit: Tensor
    move: Tensor


def exponential_grid(clock: Clock, t_src: Tensor, t_dst: Tensor, method: Exponential) -> Tensor:
    """Times `[S + 1]` or `[S + 1, B]`, float64, from `t_src` to `t_dst`, both 0-d or `[B]` and met exactly.

    A sample takes ceil((w(t_src) - w(t_dst)) / method.step) + order - 1 steps (its history fills first), at most
    `method.evaluations`; then it repeats its last time. An interval of no length takes none.
    """
    start, end = torch.broadcast_tensors(t_src.double(), t_dst.double())
    w_start, w_end = clock.w(start), clock.w(end)
    counts = ((w_start - w_end) / method.step - 1e-4).ceil() + method.order - 1
    counts = counts.clamp(1, method.evaluations) * (end < start)
    row = torch.arange(int(counts.max()) + 1, device=start.device, dtype=torch.float64)
    row = row.reshape(-1, *(1 for _ in w_start.shape))
    start, end = start.expand_as(w_start), end.expand_as(w_start)
    times = clock.t(w_start + (w_end - w_start) * row / counts.clamp(min=1))
    return torch.where(row == 0, start, torch.where(row >= counts, end, times))


def exponential_rows(clock: Clock, times: Tensor, order: int) -> Rows:
    """The rows of a roll-out along `times`, `[S + 1]` or `[S + 1, B]`, falling until they stand still.

    A sample that has arrived is asked about at its first time, and repeats the step that brought it.
    """
    times = times.double()
    moves = times[1:] != times[:-1]
    now = torch.where(moves, times[:-1], times[0])
    to = torch.where(moves, times[1:], times[0])
    w = clock.w(now)
    commit = times.new_zeros(len(now), 1 + HISTORY, *now.shape[1:])
    commit[:1, 0] = 1
    move = commit.clone()
    # Rows before the history is full look at what there is.
    for first in range(min(order, len(now))):
        stop = len(now) if first == order - 1 else first + 1
        rows, late = slice(first, stop), slice(max(first, 1), stop)
        move[rows, 0] = to[rows] / now[rows]
        move[rows, 1 : 2 + first] = interval_weights(clock, now[rows], to[rows], _lagged(w, rows, first))
        before, after = now[late.start - 1 : stop - 1], now[late]
        commit[late, 0] = after / before
        commit[late, 1 : 2 + first] = interval_weights(clock, before, after, _lagged(w, late, first))
    still = times.new_zeros(move.shape[1:])
    still[0] = 1
    move = torch.where(moves.unsqueeze(1), move, still)
    repeated = torch.cat([move[:-1, :1], torch.zeros_like(move[:-1, :1]), move[:-1, 1:-1]], dim=1)
    commit[1:] = torch.where(moves[1:].unsqueeze(1), commit[1:], repeated)
    return Rows(now, commit, move)


def _lagged(w: Tensor, rows: slice, back: int) -> list[Tensor]:
    return [w[rows.start - j : rows.stop - j] for j in range(back + 1)]


def interval_weights(clock: Clock, t: Tensor, to: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """to ∫_{to}^{t} l_j(w(τ))/τ² dτ for the Lagrange polynomials l_j of the nodes: `[S, k, T]`."""
    xi, weight = (v.to(t.device).reshape(-1, *(1 for _ in t.shape)) for v in (_NODES, _WEIGHTS))
    w = clock.w(t * to / (xi * t + (1 - xi) * to))  # even in 1/τ
    found = []
    for j, own in enumerate(nodes):
        basis = weight.expand_as(w)
        for i, other in enumerate(nodes):
            if i != j:
                gap = own - other
                basis = basis * (w - other) / torch.where(gap == 0, 1.0, gap)
        found.append((1 - to / t) * basis.sum(0))
    return torch.stack(found, dim=1)


def follow(f: Field, x: Tensor, rows: Rows) -> Tensor:
    """The state `[B, ...]` after the rows, from x; differentiable wherever f is."""
    times, commit, move = (numbers.to(x.dtype) for numbers in (rows.times, rows.commit, rows.move))
    base, seen = x, list[Tensor]()
    for r, t in enumerate(times):
        seen = [x - align(t, x) * f(x, t), *seen[: HISTORY - 1]]
        base = _combine(commit[r], base, seen)
        x = _combine(move[r], base, seen)
    return x


def _combine(numbers: Tensor, base: Tensor, seen: list[Tensor]) -> Tensor:
    total = align(numbers[0], base) * base
    for number, d in zip(numbers[1:], seen, strict=False):
        total = total + align(number, base) * d
    return total


def solve_exponential(
    f: Field, x: Tensor, t_src: Tensor, t_dst: Tensor, method: Exponential, scale: Tensor | float = SCALE
) -> Tensor:
    """The state at `t_dst`; times 0-d or `[B]` with t_dst <= t_src.

    scale: the standard deviation of the components of what f leads to, a number, 0-d or `[B]`: it places the times.
    """
    clock = Clock.of(t_src, scale)
    return follow(f, x, exponential_rows(clock, exponential_grid(clock, t_src, t_dst, method), method.order))
