"""Steps chosen per factor: exponential multistep of variable step, with an embedded error estimate.

As in `exponential.py`, D = x - t u is all that is guessed, by a polynomial through its last values D_0, D_1, ..., the
newest first, at v_0, v_1, .... It is Newton's, in divided differences, so that every new D adds one term:

    x(t') = (t'/t) x(t) + Σ_{j<k} m_j [D_0 ... D_j],    m_j = t' ∫_{t'}^{t} Π_{i<j} (v(τ) - v_i)/τ² dτ,
    [D_0] = D_0,    [D_0 ... D_j] = ([D_0 ... D_{j-1}] - [D_1 ... D_j])/(v_0 - v_j),    1 = noise >= t > t' >= 0 = data

in a variable that is close to w of `exponential.py`, but costs a division and no logarithm:

    v = 2 tanh((w - w_m)/2) = 2 (E - E_m)/(E + E_m),    E = e^w = (s + R - 1)/(s - s_src + δ),    s = 1/t,

with w_m half of w(t_src). Each factor has its own times. A step foresees its error before it asks f anything, as the
last term of the sum, and is shortened if that is too much. Then one evaluation at its end adds a term, which corrects
it, and the correction is the second estimate: a step that was corrected too much is repeated, shorter. The last step
needs no evaluation, so that f is never asked at t_dst and a t_dst of 0 is nothing special.

Predictor, corrector and the first steps at a lower order are those of Shampine and Gordon (1975), in the form PEC.
`kernels/native.cpp` has the same for Gaussian mixtures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from pitools.solvers.exponential import SCALE, Clock
from pitools.solvers.tableaus import PerFactor

FactorField: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The velocity f(x, t, index) of the states `[n, C]` at the times `[n]` of the factors `index` `[n]`, a part of all."""

SAFETY, SHRINK, GROW, LONGEST = 0.8, 0.2, 1.5, 0.28  # the last in w: no estimate means anything over longer steps
CORRECTION = 0.3  # of a correction that is an error: it mends most of what it finds
LATE, EARLY = 0.5, 0.07  # an error at t counts LATE / (t + EARLY) times; chosen where `Clock`'s numbers were

_NODES, _WEIGHTS = (torch.from_numpy(values).unsqueeze(1) / 2 for values in np.polynomial.legendre.leggauss(4))
_NODES = _NODES + 0.5


@dataclass(frozen=True)
class Arrival:
    """x_end: `[N, C]`.  evaluations: `[N]`, of the field, those of repeated steps included."""

    x_end: Tensor
    evaluations: Tensor


@dataclass(frozen=True)
class Ruler:
    """v(t) = (a + b t)/(c + d t), each `[n]`, float64. It grows with t, and dv/dw = 1 - v²/4."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor

    @classmethod
    def of(cls, clock: Clock) -> Ruler:
        s_src = 1 / clock.t_src
        middle = ((s_src + clock.R - 1) / clock.delta).sqrt()
        near, far = middle * (clock.delta - s_src), clock.R - 1
        return cls(2 * (1 - middle), 2 * (far - near), 1 + middle, far + near)

    def v(self, t: Tensor) -> Tensor:
        """v(t), for t in [0, t_src], `[..., n]`."""
        return (self.a + self.b * t) / (self.c + self.d * t)

    def t(self, v: Tensor) -> Tensor:
        """The inverse of v."""
        return (self.c * v - self.a) / (self.b - self.d * v)


@dataclass(frozen=True)
class _UnderWay:
    """What is known of the n factors that have not arrived. Of `seen`, the divided differences, `known` count."""

    index: Tensor  # [n], as all that follow
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    t_dst: Tensor
    t: Tensor
    step: Tensor  # 2 tanh of half of it in w
    known: Tensor
    base: Tensor  # [n, C], the state at t
    seen: Tensor  # [n, order, C]
    nodes: Tensor  # [n, order], the v_i

    @property
    def ruler(self) -> Ruler:
        return Ruler(self.a, self.b, self.c, self.d)

    def where(self, chosen: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def moments(self, to: Tensor) -> Tensor:
        """The m_j, `[n, order + 1]`."""
        v = self.ruler.v(self.t * to / (_NODES.to(to.device) * self.t + (1 - _NODES.to(to.device)) * to))
        product = _WEIGHTS.to(to.device) * (1 - to / self.t)  # even in 1/τ
        found = [product.sum(0)]
        for node in self.nodes.unbind(1):
            product = product * (v - node)
            found.append(product.sum(0))
        return torch.stack(found, 1)

    def predict(self, to: Tensor, moments: Tensor) -> Tensor:
        """The state `[n, C]` at `to` by all that is known."""
        place = torch.arange(self.nodes.shape[1], device=to.device)
        weights = torch.where(place < self.known.unsqueeze(1), moments[:, :-1], 0.0).to(self.base.dtype)
        return (to / self.t).to(self.base.dtype).unsqueeze(1) * self.base + (weights.unsqueeze(2) * self.seen).sum(1)

    def with_newest(self, d: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The divided differences and their nodes, with one more in front: `[n, order + 1, C]` and `[n, order + 1]`."""
        seen = [d]
        for older, node in zip(self.seen.unbind(1), self.nodes.unbind(1), strict=True):
            gap = torch.where(v == node, 1.0, v - node).to(d.dtype)
            seen.append((seen[-1] - older) / gap.unsqueeze(1))
        return torch.stack(seen, 1), torch.cat([v.unsqueeze(1), self.nodes], 1)

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
            raise not_finite(int(self.index[i]), float(self.t[i]))
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
    ruler = Ruler.of(Clock.of(start, torch.as_tensor(scale, dtype=torch.float64, device=x.device).detach().expand(n)))
    evaluations = torch.zeros(n, dtype=torch.long, device=x.device)
    everyone = torch.arange(n, device=x.device)

    def denoised(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        time = t.to(x.dtype)
        evaluations[index] += 1
        return x - time.unsqueeze(1) * f(x, time, index)

    moves = end < start
    ends, arrived = [x[~moves]], [everyone[~moves]]
    seen, nodes = x.new_zeros(n, method.order, x.shape[1]), start.new_zeros(n, method.order)
    numbers = (ruler.a, ruler.b, ruler.c, ruler.d, end, start, torch.full_like(start, first_step(method)))
    now = _UnderWay(everyone, *numbers, torch.zeros_like(everyone), x, seen, nodes).where(moves)
    if len(now.index):
        d = denoised(now.base, now.t, now.index)
        now = now.after(now.step > 0, now.t, now.base, *now.with_newest(d, now.ruler.v(now.t)), now.step)

    while len(now.index):
        v, last = now.nodes[:, 0], (now.known - 1).unsqueeze(1)
        rest = apart(v, now.ruler.v(now.t_dst))
        several, lands = now.known > 1, now.step > 0.99 * rest
        to = torch.where(lands, now.t_dst, now.ruler.t(apart(v, now.step)))
        moments = now.moments(to)
        foreseen = now.error(_term(moments, now.seen, last))
        done = lands & several & (foreseen <= tol)
        ends.append(now.predict(to, moments)[done])
        arrived.append(now.index[done])

        shorter = several & (foreseen > tol)
        shrunk = (SAFETY * (tol / foreseen) ** (1 / now.known)).clamp(SHRINK, 0.9)
        step = torch.where(shorter, torch.minimum(now.step, rest) * shrunk, now.step)
        step = torch.minimum(step, rest * torch.where(several, 0.9, 0.5))[~done]
        now, v = now.where(~done), v[~done]
        if bool((evaluations[now.index] >= method.max_evaluations).any()):
            raise too_many(int(now.index[evaluations[now.index] >= method.max_evaluations][0]), method, x.dtype)
        v_to = apart(v, step)
        to = now.ruler.t(v_to)
        moments = now.moments(to)
        x_to = now.predict(to, moments)
        seen, nodes = now.with_newest(denoised(x_to, to, now.index), v_to)
        correction = _term(moments, seen, now.known.unsqueeze(1))
        error = CORRECTION * now.error(correction)
        step = step * (SAFETY * (tol / error) ** (1 / (now.known + 1))).clamp(SHRINK, GROW)
        now = now.after(error <= tol, to, x_to + correction, seen, nodes, step.clamp(max=LONGEST))

    order = torch.cat(arrived).argsort()
    return Arrival(torch.cat(ends)[order], evaluations)


def apart(v: Tensor, u: Tensor) -> Tensor:
    """2 tanh((a - b)/2) for v = 2 tanh(a/2) and u = 2 tanh(b/2): a step between two v's, and a v after a step."""
    return (v - u) / (1 - v * u / 4)


def first_step(method: PerFactor) -> float:
    """In w."""
    return min(math.sqrt(40 * method.tol), LONGEST)


def not_finite(factor: int, t: float) -> ValueError:
    """The error of a factor whose error estimate at t is none."""
    return ValueError(
        f"the error estimate of factor {factor} is not finite at t = {t:g}: "
        "the state or the velocity is NaN or infinite, or too large, or tol is near its rounding"
    )


def too_many(factor: int, method: PerFactor, dtype: torch.dtype) -> ValueError:
    """The error of a factor that has had its evaluations."""
    return ValueError(
        f"factor {factor} needs more than max_evaluations = {method.max_evaluations} for tol = {method.tol:g}: "
        f"raise either, or give a state of more than {dtype} if tol is near its rounding"
    )


def _term(moments: Tensor, seen: Tensor, j: Tensor) -> Tensor:
    """m_j [D_0 ... D_j] `[n, C]` for j `[n, 1]`."""
    return moments.gather(1, j).to(seen.dtype) * seen.gather(1, j.unsqueeze(2).expand(-1, -1, seen.shape[2])).squeeze(1)
