"""`pitools bench --explain`: which path each kind of request takes, and why.

Each request is put to `pitools.kernels` as `pitools.rollout` does, on next to no data.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pitools import kernels
from pitools.kernels import native
from pitools.mixture import GaussianMixture
from pitools.policies import DXPolicy, GMPolicy, PolynomialPolicy, ShortcutPolicy
from pitools.solvers import SOLVERS, Clock, Exponential, PerFactor, exponential_grid, exponential_rows

B, L, K, C, N = 2, 3, 4, 2, 3


@dataclass(frozen=True)
class Answer:
    """path: what gives the roll-out.  reason: why that is not the fused one, or nothing where it is."""

    request: str
    path: str
    reason: str

    @property
    def fused(self) -> bool:
        return not self.reason


class _Own(GMPolicy):
    """A subclass, which may answer otherwise than its parent."""


def explain(device: torch.device) -> list[Answer]:
    """The answers to all requests on this device. Where the machine has a compiler, also what it did without."""
    return [_answer(name, ask) for name, ask in _requests(device)]


def _answer(name: str, ask: Callable[[], kernels.Kernel | str]) -> Answer:
    told = ask()
    if isinstance(told, str):
        return Answer(name, "plain", told)
    path, _, reason = told.name.partition("; ")
    return Answer(name, path, reason)


def _requests(device: torch.device) -> Iterator[tuple[str, Callable[[], kernels.Kernel | str]]]:
    x = torch.ones(B, L, C, device=device)
    policy, grid = _policy(x), torch.ones(B, N, L, C, device=device)
    yield "GM, float32", partial(_ask, policy, x)
    yield "GM, float64", partial(_ask, _policy(x.double()), x.double())
    yield "GM, bfloat16 state", partial(_ask, policy, x.bfloat16())
    yield "GM, bfloat16 mixture", partial(_ask, _policy(x, torch.bfloat16), x)
    yield "GM, variance of its own for each component", partial(_ask, _policy(x, own=True), x)
    yield "GM, parameters with gradient", partial(_ask, _policy(x, grad=True), x)
    yield "GM, heun", partial(_ask, policy, x, "heun")
    yield "GM, ab2", partial(_ask, policy, x, "ab2")
    yield "GM, dopri5", partial(_ask, policy, x, "dopri5")
    for name in [name for name in SOLVERS if name not in ("euler", "midpoint", "heun", "rk4", "ab2", "dopri5")]:
        yield f"GM, {name}", partial(_ask, policy, x, name)
    yield "GM, adaptive, parameters with gradient", partial(_ask, _policy(x, grad=True), x, "adaptive")
    yield "GM, times with gradient", partial(_ask, policy, x, grad=True)
    yield "GM, inside torch.vmap", partial(_inside_vmap, policy, x)
    yield "GM, forward-mode derivative", partial(_forward_mode, policy, x)
    yield "GM, within kernels.plain()", partial(_within_plain, policy, x)
    yield "subclass of GMPolicy", partial(_ask, _Own(policy.mixture, policy.x_src, 1.0), x)
    yield "prior, one mixture for all states", partial(_ask, _prior(K, device), x[:, 0])
    yield "prior of 4,096 points", partial(_ask, _prior(4096, device), x[:, 0])
    yield "DX", partial(_ask, DXPolicy(grid, 1.0, 0.0), x)
    yield "polynomial", partial(_ask, PolynomialPolicy.from_velocity(grid, x, 1.0), x)
    yield "shortcut", partial(_ask, ShortcutPolicy.from_velocity(x, x, 1.0), x)
    if device.type == "cpu":
        yield "GM, no compiler", partial(_without_compiler, policy, x)
    yield "GM, GPU without Triton", partial(_without_triton, policy)


def _ask(field: object, x: Tensor, method: str = "euler", grad: bool = False) -> kernels.Kernel | str:
    """The kernel for a roll-out from 1 to 0, in two steps or the method's own, which it makes, or a reason."""
    times = torch.tensor([1.0, 0.5, 0.0], device=x.device, requires_grad=grad)
    solver, ends = SOLVERS[method], (times[0], times[-1])
    if isinstance(solver, PerFactor):
        told: object = kernels.adaptive(field, x, *ends, solver)
    elif isinstance(solver, Exponential):
        clock = Clock.of(ends[0])
        told = kernels.rows(field, x, exponential_rows(clock, exponential_grid(clock, *ends, solver), solver.order))
    else:
        told = kernels.states(field, x, times, torch.tensor([2], device=x.device), solver)
    return told if isinstance(told, str) else kernels.choose(field, x, times)


def _inside_vmap(policy: GMPolicy, x: Tensor) -> kernels.Kernel | str:
    told: list[kernels.Kernel | str] = []

    def one(state: Tensor) -> Tensor:
        told.append(_ask(policy, state))
        return state

    torch.vmap(one)(x.unsqueeze(0))
    return told[0]


def _forward_mode(policy: GMPolicy, x: Tensor) -> kernels.Kernel | str:
    with forward_ad.dual_level():
        return _ask(policy, x)


def _within_plain(policy: GMPolicy, x: Tensor) -> kernels.Kernel | str:
    with kernels.plain():
        return _ask(policy, x)


def _without_compiler(policy: GMPolicy, x: Tensor) -> kernels.Kernel | str:
    # Without its cache, it looks for a compiler anew.
    with patch.dict(os.environ, {"CXX": ""}), patch.object(native, "library", native.library.__wrapped__):
        return _ask(policy, x)


def _without_triton(policy: GMPolicy) -> kernels.Kernel | str:
    with patch.object(importlib.util, "find_spec", return_value=None):
        told = kernels._rollout(torch.device("cuda"), policy.mixture)
    assert isinstance(told, str)
    return told


def _policy(x: Tensor, dtype: torch.dtype | None = None, own: bool = False, grad: bool = False) -> GMPolicy:
    dtype = dtype or x.dtype
    means = torch.arange(B * L * K * C, device=x.device, dtype=dtype).reshape(B, L, K, C).requires_grad_(grad)
    variance = torch.full((B, L, K) if own else (B, 1, 1), 0.5, device=x.device, dtype=dtype)
    return GMPolicy(GaussianMixture(means, means[..., 0].detach() * 0, variance), x, 1.0)


def _prior(components: int, device: torch.device) -> GaussianMixture:
    means = torch.arange(components * C, device=device, dtype=torch.float32).reshape(components, C)
    return GaussianMixture(means, means[:, 0] * 0, means.new_full((1,), 0.5))
