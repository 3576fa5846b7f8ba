"""A roll-out written out as rows, which is what the kernels run. One row is one evaluation of a policy.

Between two evaluations a solver does nothing but add: with D = x̂_0(X, t) = X - t u(X, t) all that moves is

    D_r = x̂_0(X, t_r)
    base = X   or   base = a'_r base + Σ_j b'_rj D_{r-j}   or base as it is          (the commit)
    X = a_r base + Σ_{j<H} b_rj D_{r-j}                                             (the move)

from X = base = x, with numbers that depend on times alone. An Euler step from t to t' is a = t'/t, b_0 = 1 - t'/t;
it is finite where t' = 0, and so is a step of a Runge-Kutta method, whose k_i = (X_i - D_i)/t_i. A velocity is a
row, too: a = 1/t, b_0 = -1/t. Times are `[T]`, where T is 1 or, if samples differ, B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pitools.solvers import Rows, RungeKutta
from pitools.solvers.fixed import LANDING

KEEP, STATE, COMBINE = 0, 1, 2
"""What becomes of base in a row."""


@dataclass(frozen=True)
class Programme:
    """times: `[R, T]`, of the evaluations, positive.  commits: `[R]`, int32.  move: `[R, 1 + H, T]`, a and the b_j.
    commit: likewise a' and the b'_j, or None where no row combines.  stops: `[M, T]`, int32, the number of rows
    after which X is asked for."""

    times: Tensor
    commits: Tensor
    move: Tensor
    commit: Tensor | None
    stops: Tensor

    @property
    def history(self) -> int:
        """H: how many D's a row looks at, its own included."""
        return self.move.shape[1] - 1


class Arguments(NamedTuple):
    """What a kernel is given: the programme of N factors.

    means: `[N, K, C]`, of any strides.  log_weights: `[N, K]`.  variance: `[N, 1]` or `[N, K]`.  x_src, x: `[N, C]`.
    coefficients: `[R, F, T]`, of `numbers`.  commits: `[R]`, stops: `[M, T]`, int32.  factors: those of a time.
    All floating numbers are float32, or float64.
    """

    means: Tensor
    log_weights: Tensor
    variance: Tensor
    x_src: Tensor
    x: Tensor
    coefficients: Tensor
    commits: Tensor
    stops: Tensor
    factors: int

    @property
    def history(self) -> int:
        """H, of rows of 3 + (1 + H) numbers, or 3 + 2 (1 + H) with a commit; H is 1 or 4.

        Raises `ValueError` for another F.
        """
        kinds = {5: 1, 7: 1, 8: 4, 13: 4}
        if self.coefficients.shape[1] not in kinds:
            raise ValueError(
                f"coefficients must be [R, F, T] with F of 5, 7, 8 or 13, got {tuple(self.coefficients.shape)}"
            )
        return kinds[self.coefficients.shape[1]]


def rows_of(method: RungeKutta, times: Tensor, stops: Tensor) -> Programme:
    """The programme of a fixed-step roll-out along `times`, `[S + 1]` or `[S + 1, B]`, stopping at the rows `stops`,
    `[M]` or `[M, B]`."""
    times, stops = times.reshape(len(times), -1), stops.reshape(len(stops), -1)
    now, to = times[:-1], times[1:]
    moves, lands = to != now, to < LANDING * now
    now = torch.where(moves, now, times[0])
    h = torch.where(moves, to - now, 0.0)
    stages = len(method.b)
    if stages == 1:
        commits = torch.full((len(now),), STATE, dtype=torch.int32, device=times.device)
        return Programme(now, commits, torch.stack([(now + h) / now, -h / now], dim=1), None, stops.int())

    # X_i and k_i as numbers of base and of the D's of the stages: `[1 + stages, S, T]`.
    end = torch.where(moves & ~lands, to, now)
    inside = end - now
    base = times.new_zeros(1 + stages, *now.shape)
    base[0] = 1
    state, slopes, met, asked = base, [], [base], []
    for i in range(stages):
        t = now if i == 0 else (1 - method.c[i - 1]) * now + method.c[i - 1] * end
        asked.append(t)
        slope = state.clone()
        slope[1 + i] -= 1
        slopes.append(slope / t)
        if i + 1 < stages:
            state = base + inside * sum(weight * k for weight, k in zip(method.a[i], slopes, strict=True) if weight)
            met.append(state)
    full = sum(weight * k for weight, k in zip(method.b, slopes, strict=True) if weight)
    met.append(base + h * torch.where(lands, slopes[0], full))

    history = 4
    move = times.new_zeros(len(now), stages, 1 + history, now.shape[1])
    for i, reached in enumerate(met[1:]):
        move[:, i, 0] = reached[0]
        for j in range(i + 1):
            move[:, i, 1 + j] = reached[1 + i - j]
    commits = torch.tensor([STATE] + [KEEP] * (stages - 1), dtype=torch.int32, device=times.device).repeat(len(now))
    return Programme(torch.stack(asked, dim=1).flatten(0, 1), commits, move.flatten(0, 1), None, stops.int() * stages)


def multistep_rows(rows: Rows) -> Programme:
    """The programme of an exponential roll-out, which stops after its last row."""
    times = rows.times if rows.times.ndim > 1 else rows.times.unsqueeze(1)
    commits = torch.full((len(times),), COMBINE, dtype=torch.int32, device=times.device)
    commits[:1] = STATE
    move, commit = (v if v.ndim > 2 else v.unsqueeze(2) for v in (rows.move, rows.commit))
    return Programme(times, commits, move, commit, commits.new_full((1, 1), len(times)))


def velocity_rows(t: Tensor) -> Programme:
    """A row for each of the times `[M, T]`, of which one alone turns the X of its time into its velocity."""
    s = 1 / t
    one = torch.ones(1, 1, dtype=torch.int32, device=t.device)
    return Programme(t, one[0] * STATE, torch.stack([s, -s], dim=1), None, one)


def numbers(programme: Programme, t_src: Tensor, dtype: torch.dtype) -> Tensor:
    """`[R, F, T]`: λ, α, β of each evaluation as seen from `t_src` (see `mixture.py`), then move and commit.

    With s = 1/t and s_src = 1/t_src: λ = (s - s_src)(s + s_src - 2), α = s (s - 1), β = -s_src (s_src - 1).
    """
    first = 1 / t_src.double()
    s = torch.maximum(1 / programme.times.double(), first)  # below it by rounding
    seen = [(s - first) * (s + (first - 2)), s * (s - 1), (first - first.square()).expand_as(s)]
    parts = [torch.stack(seen, dim=1), programme.move] + ([] if programme.commit is None else [programme.commit])
    times = s.shape[1]
    return torch.cat([part.expand(-1, -1, times) for part in parts], dim=1).to(dtype)
