"""The fixed-step loop: x_{n+1} = x_n + h_n · increment, along one grid of times for each sample.

A step that ends at t = 0, where no field is evaluated, is an Euler step whatever the method: from
(x, t) it gives x - t u(x, t), the denoised state. So every method lands there and none divides by 0. The
same goes for a step to under `LANDING` times its start: a velocity (x - x_0)/t there is rounding, magnified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from pitools.path import align
from pitools.solvers.tableaus import RungeKutta, TwoStep

LANDING = 1e-3

Field: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The velocity f(x, t) of a state `[B, ...]` at t, 0-d or `[B]`."""


def steps(f: Field, x: Tensor, times: Tensor, method: RungeKutta | TwoStep) -> Iterator[Tensor]:
    """The states after each step of `times`, `[S + 1]` or `[S + 1, B]`, never rising.

    A sample whose time stands still in a step keeps its state; f is then asked at the sample's first
    time, where it is defined, and the answer is not used.
    """
    h = times.diff(dim=0)
    moves, lands = h != 0, times[1:] < LANDING * times[:-1]
    start = torch.where(moves, times[:-1], times[0])
    # The stages of a step that lands, or does not move, stay at its start, where f is defined.
    end = torch.where(moves & ~lands, times[1:], start)
    previous: tuple[Tensor, Tensor] | None = None
    for n in range(len(h)):
        k = f(x, start[n])
        if isinstance(method, RungeKutta):
            increment = _runge_kutta(f, x, start[n], end[n], k, method)
        else:
            increment = _adams_bashforth(h[n], k, previous)
        if increment is not k:
            increment = torch.where(align(lands[n], x), k, increment)
        previous = (h[n], k)
        x = torch.where(align(moves[n], x), x + align(h[n], x) * increment, x)
        yield x


def _runge_kutta(f: Field, x: Tensor, t: Tensor, t_next: Tensor, k: Tensor, method: RungeKutta) -> Tensor:
    if not method.a:  # Euler's increment is k itself
        return k
    stages, h = [k], t_next - t
    for row, c in zip(method.a, method.c, strict=True):
        stages.append(f(x + align(h, x) * _combine(row, stages), (1 - c) * t + c * t_next))
    return _combine(method.b, stages)


def _combine(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    terms = [weight * k for weight, k in zip(weights, stages, strict=True) if weight != 0]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _adams_bashforth(h: Tensor, k: Tensor, previous: tuple[Tensor, Tensor] | None) -> Tensor:
    if previous is None:
        return k
    h_before, k_before = previous
    ratio = align(torch.where(h_before != 0, h / h_before, 0.0), k)
    return k + ratio / 2 * (k - k_before)
