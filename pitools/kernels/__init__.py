"""Fused roll-outs: each equal to the plain one, and taken where it applies.

    states(field, x, times, stops, method)  ->  the states at the stops of a roll-out, or why no kernel gives them
    rows(field, x, numbers)                 ->  the state after the rows of an exponential one, or why
    velocities(field, x, t)                 ->  the velocities at several states, or why no kernel gives them
    adaptive(field, x, t_src, t_dst, ...)   ->  where each factor arrives with steps of its own, or why

A reason sends the caller down the plain path. `with plain():`, or PITOOLS_KERNELS=plain in the environment, forces it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pitools.kernels.programme import Programme, multistep_rows, rows_of
from pitools.mixture import GaussianMixture
from pitools.path import ROUNDING
from pitools.policies import DXPolicy, GMPolicy, PolynomialPolicy, ShortcutPolicy
from pitools.solvers import SCALE, Arrival, PerFactor, Rows, RungeKutta, Solver
from pitools.types import Time


@dataclass(frozen=True)
class Kernel:
    """name: what it is built with.  run: takes a programme from x `[B, ..., C]` to the states `[M, B, ..., C]` at its
    stops.  velocities: at states `[M, B, ..., C]` and times `[M, T]`."""

    name: str
    run: Callable[[Tensor, Programme], Tensor]
    velocities: Callable[[Tensor, Tensor], Tensor]


MOST_SHARED = 4096
"""Numbers in the means of a prior above which one product of matrices for all factors is faster."""

MOST_OF_A_FACTOR = 2**16
"""Numbers in the means of one factor above which nothing is gained."""

MOST_ON_GPU = 64
"""Components, and channels, that the kernel for a GPU was compiled for."""

_PLAIN = ContextVar("plain", default=os.environ.get("PITOOLS_KERNELS") == "plain")


@contextmanager
def plain() -> Iterator[None]:
    """Within it, all roll-outs take the plain path, the reference that kernels are compared with."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def states(field: object, x: Tensor, times: Tensor, stops: Tensor, method: Solver) -> Tensor | str:
    """The states `[M, B, ..., C]` of the roll-out from x `[B, ..., C]` along `times`, or why no kernel gives them.

    times: `[S + 1]` or `[S + 1, B]`, never rising.  stops: `[M]` or `[M, B]`, rows of `times`.
    """
    if not (isinstance(method, RungeKutta) and len(method.b) <= 4):
        return f"no kernel takes the steps of {method}"
    kernel = choose(field, x, times)
    return kernel if isinstance(kernel, str) else kernel.run(x, rows_of(method, times, stops))


def velocities(field: object, x: Tensor, t: Tensor) -> Tensor | str:
    """The velocities at x `[M, B, ..., C]` and t `[M]` or `[M, B]`, falling, or why no kernel gives them."""
    kernel = choose(field, x[0], t)
    return kernel if isinstance(kernel, str) else kernel.velocities(x, t.reshape(len(t), -1))


def rows(field: object, x: Tensor, numbers: Rows) -> Tensor | str:
    """The state `[B, ..., C]` after the rows of an exponential roll-out from x, or why no kernel gives it."""
    kernel = choose(field, x, numbers.times)
    return kernel if isinstance(kernel, str) else kernel.run(x, multistep_rows(numbers))[0]


def adaptive(
    field: object, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor, scale: Tensor | float = SCALE
) -> Arrival | str:
    """What `solve_per_factor` gives for the L factors of each sample, `[B L]`, or why no kernel gives it.

    x: `[B, L, C]`.  Times 0-d or `[B]`.  scale: a number, 0-d or `[B L]`.  The errors are its own, too.
    """
    if type(field) is not GMPolicy:
        return "only the factors of a Gaussian-mixture policy choose their steps in a kernel"
    kernel = choose(field, x, t_src.unsqueeze(0))
    if isinstance(kernel, str):
        return kernel
    if kernel.name != "C++":
        return f"the kernel that chooses its steps is in C++, and not in {kernel.name}"
    q = field.mixture
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, field.x_src, q.means, q.log_weights, q.variance)):
        return "the kernel that chooses its steps has no gradient"

    from pitools.kernels import gm

    return gm.factors_of(field, gm.Native.apply, x).adaptive(x, t_src, t_dst, method, scale)


def choose(field: object, x: Tensor, times: Tensor) -> Kernel | str:
    """The kernel for a field and a state, along `times` `[S + 1]` or `[S + 1, B]`, or why there is none."""
    if _PLAIN.get():
        return "the plain path was asked for"
    if type(field) in (DXPolicy, PolynomialPolicy, ShortcutPolicy):
        assert isinstance(field, DXPolicy | PolynomialPolicy | ShortcutPolicy)
        from pitools.kernels import linear

        points = linear.points(field)
        return _refused(x, points.shape[::2] + points.shape[3:], field.t_src, times, points) or Kernel(
            "one sum", partial(linear.run, field), partial(linear.velocities, field)
        )
    if type(field) is GMPolicy:
        mixture, t_src, shape = field.mixture, field.t_src, tuple(field.x_src.shape)
    elif type(field) is GaussianMixture:
        mixture, t_src, shape = field, 1.0, (*x.shape[:-1], field.channels)
        if mixture.log_weights.ndim > 1 or mixture.means.numel() > MOST_SHARED:
            return "of the mixtures that are priors, kernels take one at a time, of few numbers"
    else:
        return f"there is no kernel for a {type(field).__name__}"
    if mixture.components * mixture.channels > MOST_OF_A_FACTOR:
        return f"a factor of {mixture.components} components in {mixture.channels} channels has no place in a cache"
    like = field.x_src if isinstance(field, GMPolicy) else mixture.means
    if why := _refused(x, shape, t_src, times, mixture.means, mixture.log_weights, mixture.variance, like):
        return why
    rollout = _rollout(x.device, mixture)
    if isinstance(rollout, str):
        return rollout

    from pitools.kernels import gm

    factors = gm.factors_of(field, rollout[1], x)
    return Kernel(rollout[0], factors.run, factors.velocities)


def _rollout(device: torch.device, mixture: GaussianMixture) -> tuple[str, Callable[..., Tensor]] | str:
    """The name of what rolls a mixture out on a device, and the function itself."""
    if device.type == "cpu":
        from pitools.kernels import eager, gm, native

        built = native.library()
        return (f"PyTorch; {built}", eager.Rollout.apply) if isinstance(built, str) else ("C++", gm.Native.apply)
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the kernel for a GPU needs Triton, which is not installed"
        if max(mixture.components, mixture.channels) > MOST_ON_GPU:
            return f"the kernel for a GPU takes up to {MOST_ON_GPU} components and channels"

        from pitools.kernels import gm

        return "Triton", gm.OnGPU.apply
    return f"there is no kernel for {device.type}"


def _refused(x: Tensor, shape: Sequence[int], t_src: Time, times: Tensor, *parameters: Tensor) -> str | None:
    """Why no kernel takes a state, times and parameters, if none does."""
    if tuple(x.shape) != tuple(shape):
        return f"the state is {tuple(x.shape)}, and not {tuple(shape)}"
    if why := _unfit(x, *parameters):
        return why
    if times.ndim > 1 and times.shape[1] != len(x):
        return f"times are those of {times.shape[1]} samples, and the state has {len(x)}"
    if times.requires_grad or (isinstance(t_src, Tensor) and t_src.requires_grad):
        return "kernels have no gradient for times"
    if len(times) and bool((times[0] > t_src * (1 + ROUNDING)).any()):
        return "the roll-out starts above t_src, which is an error of its own"
    return None


def _unfit(*tensors: Tensor) -> str | None:
    """Why kernels cannot read these tensors, if they cannot."""
    if torch.compiler.is_compiling():
        return "torch.compile traces the plain path"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "function transforms and forward-mode derivatives take the plain path"
    for x in tensors:
        if type(x) not in (Tensor, torch.nn.Parameter):
            return f"a {type(x).__name__} is no ordinary tensor"
        if x.dtype not in (torch.float32, torch.float64):
            return f"kernels know float32 and float64, not {x.dtype}"
        if x.layout != torch.strided or x.is_neg():
            return "a tensor is not laid out in memory with strides alone"
        if x.device != tensors[0].device:
            return f"tensors are on {x.device} and on {tensors[0].device}"
    return None
