"""Solvers as data: Butcher tableaus, the two-step multistep form, and the adaptive choice.

An explicit Runge-Kutta step of length h (negative, since time falls) from (x, t) is

    k_1 = f(x, t),   k_i = f(x + h Σ_j a_ij k_j, t + c_i h),   c_i = Σ_j a_ij,   x' = x + h Σ_i b_i k_i

and the two-step Adams-Bashforth step with r = h_n / h_{n-1}, started by an Euler step (r = 0), is

    x' = x + h_n ((1 + r/2) k_n - (r/2) k_{n-1})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias


@dataclass(frozen=True)
class RungeKutta:
    """An explicit tableau: `a` holds the rows below the first stage, `b` the weights, and `order`."""

    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]

    @property
    def c(self) -> tuple[float, ...]:
        """The nodes of the stages after the first."""
        return tuple(sum(row) for row in self.a)


@dataclass(frozen=True)
class TwoStep:
    """Adams-Bashforth with the velocity of the step before: one evaluation a step."""

    order: int = 2


@dataclass(frozen=True)
class Adaptive:
    """torchdiffeq's dopri5; the tolerances hold for every sample on its own, and step_size is not used."""

    rtol: float = 1e-5
    atol: float = 1e-6
    order: int = 5


@dataclass(frozen=True)
class Exponential:
    """Exponential multistep (see `exponential.py`): no step size, at most `evaluations` velocities an interval.

    step: the longest step in the grid's variable w, which spares short intervals some of the evaluations; whole ones
    reach the limit.  order: of convergence, 1 to 3.
    """

    evaluations: int = 16
    order: int = 3
    step: float = 0.15

    def __post_init__(self) -> None:
        if self.evaluations < 1:
            raise ValueError(f"evaluations must be at least 1, got {self.evaluations}")
        if self.order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {self.order}")
        if not self.step > 0:
            raise ValueError(f"step must be positive, got {self.step}")


@dataclass(frozen=True)
class PerFactor:
    """Steps chosen for each factor on its own (see `embedded.py`): no step size, and evaluations where they count.

    tol: the error of a factor at the end, RMS over its channels, that the steps aim for.  order: of convergence, and
    the number of evaluations remembered, 2 to 6.  max_evaluations: of the field, for one factor.
    """

    tol: float = 1e-3
    order: int = 4
    max_evaluations: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.tol < float("inf"):
            raise ValueError(f"tol must be positive and finite, got {self.tol}")
        if not 2 <= self.order <= 6:
            raise ValueError(f"order must be 2 to 6, got {self.order}")
        if self.max_evaluations < 2:
            raise ValueError(f"max_evaluations must be at least 2, got {self.max_evaluations}")


Solver: TypeAlias = RungeKutta | TwoStep | Adaptive | Exponential | PerFactor

SOLVERS: Mapping[str, Solver] = MappingProxyType(
    {
        "euler": RungeKutta(order=1, a=(), b=(1.0,)),
        "midpoint": RungeKutta(order=2, a=((0.5,),), b=(0.0, 1.0)),
        "heun": RungeKutta(order=2, a=((1.0,),), b=(0.5, 0.5)),
        "rk4": RungeKutta(order=4, a=((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6)),
        "ab2": TwoStep(),
        "dopri5": Adaptive(),
        "auto": Exponential(),
        "adaptive": PerFactor(),
    }
)


def solver(method: str | Solver) -> Solver:
    """The solver of that name, or the solver itself. `ValueError` for an unknown name."""
    if isinstance(method, RungeKutta | TwoStep | Adaptive | Exponential | PerFactor):
        return method
    if method not in SOLVERS:
        raise ValueError(f"unknown method {method!r}; the methods are {', '.join(SOLVERS)}")
    return SOLVERS[method]
