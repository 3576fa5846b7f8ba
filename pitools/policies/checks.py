"""What the policies share: the shape of a state, and u = (x_t - x̂_0(t)) / t for those that know x̂_0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pitools.mixture import all_finite
from pitools.path import align, as_time
from pitools.types import Time


def check_state(name: str, x: Tensor, like: Tensor | None = None) -> None:
    """`ValueError` unless `x` is `[B, L, C]` (and of `like`'s shape)."""
    if x.ndim != 3 or (like is not None and x.shape != like.shape):
        expected = "[B, L, C]" + (f" = {list(like.shape)}" if like is not None else "")
        raise ValueError(f"{name} must be {expected}, got shape {tuple(x.shape)}")


def denoised_from_velocity(name: str, u: Tensor, x_src: Tensor, t_src: Time) -> Tensor:
    """x_0 = x_src - t_src u for each of N velocities `[B, N, L, C]`, in float32 or better."""
    check_state("x_src", x_src)
    batch, factors, channels = x_src.shape
    if u.ndim != 4 or (u.shape[0], *u.shape[2:]) != (batch, factors, channels):
        raise ValueError(f"{name} must be [B, N, L, C] = [{batch}, N, {factors}, {channels}], got {tuple(u.shape)}")
    dtype = torch.promote_types(torch.promote_types(u.dtype, x_src.dtype), torch.float32)
    u, x_src = u.to(dtype), x_src.to(dtype)
    return x_src.unsqueeze(1) - align(as_time("t_src", t_src, x_src), u) * u


def policy_velocity(x_t: Tensor, t: Time, t_src: Time, denoised: Callable[[Tensor], Tensor]) -> Tensor:
    """(x_t - x̂_0(t)) / t for a policy whose x̂_0 depends on the checked time alone."""
    x_t = x_t.to(torch.promote_types(x_t.dtype, torch.float32))
    time = as_time("t", t, x_t, maximum=t_src)
    x_0 = denoised(time)
    return (x_t - x_0) / align(time, x_t)


def parameters(name: str, values: Tensor) -> Tensor:
    """A policy's own numbers in float32 or better. `ValueError` for NaN or infinite ones."""
    if not all_finite(values):
        raise ValueError(f"{name} holds a NaN or an infinite value")
    return values.to(torch.promote_types(values.dtype, torch.float32))
