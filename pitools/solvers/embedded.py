"""Steps chosen per factor: exponential multistep of variable step, with an embedded error estimate.

As in `exponential.py`, D = x - t u is all that is guessed, by the polynomial in w(t) through its last `order` values:

    x(t') = (t'/t) x(t) + t' ∫_{t'}^{t} P(w(τ))/τ² dτ,        1 = noise >= t > t' >= 0 = data

Each factor has its own times. A step foresees its error before it asks f anything, as what the oldest of the D's
changes in it, and is shortened if that is too much. Then one evaluation at its end corrects it (P gains a node), and
the correction is the second estimate: a step that was corrected too much is repeated, shorter. The last step needs no
evaluation, so that f is never asked at t_dst and a t_dst of 0 is nothing special.

Predictor, corrector and the first steps at a lower order are those of Shampine and Gordon (1975), in the form PEC.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self, TypeAlias

import torch
from torch import Tensor

from pitools.solvers.exponential import SCALE, Clock, interval_weights
from pitools.solvers.tableaus import PerFactor

FactorField: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The velocity f(x, t, index) of the states `[n, C]` at the times `[n]` of the factors `index` `[n]`, a part of all."""

SAFETY, SHRINK, GROW, LONGEST = 0.8, 0.2, 1.5, 0.28  # the last in w: no estimate means anything over longer steps
CORRECTION = 0.3  # of a correction that is an error: it mends most of what it finds
LATE, EARLY = 0.5, 0.07  # an error at t counts LATE / (t + EARLY) times; chosen where `Clock`'s numbers were


@dataclass(frozen=True)
class Arrival:
    """x_end: `[N, C]`.  evaluations: `[N]`, of the field, those of repeated steps included."""

    x_end: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class _UnderWay:
    """What is known of the n factors that have not arrived. Of `seen`, the newest first, `known` count."""

    index: Tensor  # [n]
    t_src: Tensor  # [n], as all that follow
    R: Tensor
    delta: Tensor
    t_dst: Tensor
    t: Tensor
    step: Tensor  # in w
    known: Tensor
    base: Tensor  # [n, C], the state at t
    seen: Tensor  # [n, order, C], D's
    nodes: Tensor  # [n, order], their w

    @property
    def clock(self) -> Clock:
        return Clock(self.t_src, self.R, self.delta)

    def where(self, chosen: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def advance(self, to: Tensor, seen: Tensor, nodes: Tensor, known: Tensor) -> Tensor:
        """The state `[n, C]` at `to` by the polynomial through the first `known` of the D's."""
        place = torch.arange(nodes.shape[1], device=nodes.device)
        # A node at infinity takes no part.
        nodes = torch.where(place < known.unsqueeze(1), nodes, 1e30 * (place + 1))
        weights = interval_weights(self.clock, self.t, to, nodes.unbind(1)).to(seen.dtype)
        return (to / self.t).to(seen.dtype).unsqueeze(1) * self.base + (weights.unsqueeze(2) * seen).sum(1)

    def with_newest(self, d: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """The D's and their nodes, with one more in front: `[n, order + 1, C]` and `[n, order + 1]`."""
        return torch.cat([d.unsqueeze(1), self.seen], 1), torch.cat([w.unsqueeze(1), self.nodes], 1)

    def after(self, taken: Tensor, to: Tensor, base: Tensor, seen: Tensor, nodes: Tensor, step: Tensor) -> Self:
        """The factors whose step was `taken` move to `to`, with the newest D; the others keep all but the step."""
        return replace(
            self,
            t=torch.where(taken, to, self.t),
            step=step,
            known=torch.where(taken, (self.known + 1).clamp(max=self.nodes.shape[1]), self.known),
            base=torch.where(taken[:, None], base, self.base),
            seen=torch.where(taken[:, None, None], seen[:, :-1], self.seen),
            nodes=torch.where(taken[:, None], nodes[:, :-1], self.nodes),
        )

    def error(self, difference: Tensor) -> Tensor:
        """`[n]`, the RMS over C. Late errors count most: by then D follows x, and what was wrong stays wrong."""
        size = difference.detach().double().square().mean(1).sqrt() * LATE / (self.t + EARLY)
        if not bool(size.isfinite().all()):
            i = int((~size.isfinite()).nonzero()[0])
            raise ValueError(
                f"the error estimate of factor {int(self.index[i])} is not finite at t = {float(self.t[i]):g}: "
                "the state or the velocity is NaN or infinite, or too large"
            )
        return size


def solve_per_factor(
    f: FactorField, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor, scale: Tensor | float = SCALE
) -> Arrival:
    """The states at `t_dst`, and what each cost; differentiable wherever f is.

    x: `[N, C]`.  Times 0-d or `[N]`, 0 <= t_dst <= t_src <= 1, t_src > 0.  scale: the standard deviation of the
    components of what f leads to, a number, 0-d or `[N]`; it only saves evaluations.
    Raises `ValueError` for a factor that needs more than `method.max_evaluations`, or whose error is not finite.
    """
    n, tol = len(x), method.tol
    start, end = (t.detach().double().to(x.device).expand(n) for t in (t_src, t_dst))
    clock = Clock.of(start, torch.as_tensor(scale, dtype=torch.float64, device=x.device).detach().expand(n))
    evaluations = torch.zeros(n, dtype=torch.long, device=x.device)
    everyone = torch.arange(n, device=x.device)

    def denoised(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        time = t.to(x.dtype)
        evaluations[index] += 1
        return x - time.unsqueeze(1) * f(x, time, index)

    moves = end < start
    ends, arrived = [x[~moves]], [everyone[~moves]]
    seen, nodes = x.new_zeros(n, method.order, x.shape[1]), start.new_zeros(n, method.order)
    first = torch.full_like(start, min((40 * tol) ** 0.5, LONGEST))
    now = _UnderWay(
        everyone, start, clock.R, clock.delta, end, start, first, torch.zeros_like(everyone), x, seen, nodes
    )
    now = now.where(moves)
    if len(now.index):
        d = denoised(now.base, now.t, now.index)
        now = now.after(now.step > 0, now.t, now.base, *now.with_newest(d, now.clock.w(now.t)), now.step)

    while len(now.index):
        w, rest = now.clock.w(now.t), now.clock.w(now.t) - now.clock.w(now.t_dst)
        several, lands = now.known > 1, now.step > 0.99 * rest
        to = torch.where(lands, now.t_dst, now.clock.t(w - now.step))
        x_to = now.advance(to, now.seen, now.nodes, now.known)
        foreseen = now.error(x_to - now.advance(to, now.seen, now.nodes, now.known - 1))
        done = lands & several & (foreseen <= tol)
        ends.append(x_to[done])
        arrived.append(now.index[done])

        shorter = several & (foreseen > tol)
        shrunk = (SAFETY * (tol / foreseen) ** (1 / now.known)).clamp(SHRINK, 0.9)
        step = torch.where(shorter, torch.minimum(now.step, rest) * shrunk, now.step)
        step = torch.minimum(step, rest * torch.where(several, 0.9, 0.5))[~done]
        now, w = now.where(~done), w[~done]
        if bool((evaluations[now.index] >= method.max_evaluations).any()):
            late = int(now.index[evaluations[now.index] >= method.max_evaluations][0])
            raise ValueError(
                f"factor {late} needs more than max_evaluations = {method.max_evaluations} for tol = {tol:g}: "
                f"raise either, or give a state of more than {x.dtype} if tol is near its rounding"
            )
        to = now.clock.t(w - step)
        x_to = now.advance(to, now.seen, now.nodes, now.known)
        seen, nodes = now.with_newest(denoised(x_to, to, now.index), w - step)
        corrected = now.advance(to, seen, nodes, now.known + 1)
        error = CORRECTION * now.error(corrected - x_to)
        step = step * (SAFETY * (tol / error) ** (1 / (now.known + 1))).clamp(SHRINK, GROW)
        now = now.after(error <= tol, to, corrected, seen, nodes, step.clamp(max=LONGEST))

    order = torch.cat(arrived).argsort()
    return Arrival(torch.cat(ends)[order], evaluations)
