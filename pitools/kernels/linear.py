"""Roll-outs of policies whose denoised state depends on time alone, x̂_0(t) = Σ_n φ_n(t) p_n (DX, polynomial, shortcut).

What a programme adds up is then linear in x and in the N parameters p, so that its rows run on the numbers of these

    X = A x + Σ_n W_n p_n,    D_r = Σ_n φ_n(t_r) p_n

`[1 + N]` for each time, in float64, and each state at a stop is one weighted sum, which reads the tensors once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pitools.kernels.programme import COMBINE, STATE, Programme, velocity_rows
from pitools.policies import DXPolicy, PolynomialPolicy, ShortcutPolicy

Linear = DXPolicy | PolynomialPolicy | ShortcutPolicy

BLOCK = 2**18
"""Values of φ that are held at a time."""


def run(policy: Linear, x: Tensor, programme: Programme) -> Tensor:
    """The states `[M, B, L, C]` at the stops of any programme, from x `[B, L, C]`.

    Differentiable in x and in the policy's parameters, to every order.
    """
    parameters = points(policy)
    dtype = torch.promote_types(x.dtype, parameters.dtype)
    parameters, x = parameters.to(dtype).flatten(2), x.to(dtype)
    weights = _weights(policy, programme).to(dtype).transpose(0, 1).expand(len(x), -1, -1)  # [B, M, 1 + N]
    with torch.autocast(x.device.type, enabled=False):  # exact inside autocast too, which rounds products of matrices
        moved = weights[..., 1:] @ parameters
    kept = weights[..., :1].unsqueeze(-1)
    return torch.addcmul(moved.unflatten(-1, x.shape[1:]), kept, x.unsqueeze(1)).transpose(0, 1)


def velocities(policy: Linear, x: Tensor, t: Tensor) -> Tensor:
    """`[M, B, L, C]` at the states x `[M, B, L, C]` and the times t `[M, T]`."""
    return torch.cat([run(policy, *each) for each in zip(x, map(velocity_rows, t.split(1)), strict=True)])


def _weights(policy: Linear, programme: Programme) -> Tensor:
    """A and the W_n at the stops, `[M, T, 1 + N]`, where T is 1 or B."""
    times = programme.times.shape[1]
    for own in (policy.t_src, policy.t_dst if isinstance(policy, DXPolicy) else 0.0):
        times = max(times, torch.as_tensor(own).numel())
    state = torch.zeros(times, 1 + points(policy).shape[1], dtype=torch.float64, device=programme.times.device)
    state[:, 0] = 1
    base, seen = state, [torch.zeros_like(state)] * programme.history
    out = state.expand(len(programme.stops), -1, -1).clone()
    move = programme.move.double().unsqueeze(-1)
    commit = move if programme.commit is None else programme.commit.double().unsqueeze(-1)
    stop_rows = set(programme.stops.unique().tolist())
    for r, (kind, phi) in enumerate(zip(programme.commits.tolist(), _basis(policy, programme, times), strict=True)):
        seen = [phi, *seen[:-1]]
        if kind == STATE:
            base = state
        elif kind == COMBINE:
            base = _combine(commit[r], base, seen)
        state = _combine(move[r], base, seen)
        if r + 1 in stop_rows:
            reached = programme.stops == r + 1
            for m in reached.any(1).nonzero().flatten().tolist():
                out[m] = torch.where(reached[m].unsqueeze(-1), state, out[m])
    return out


def _basis(policy: Linear, programme: Programme, times: int) -> Iterator[Tensor]:
    """φ at each row's times, `[T, 1 + N]`, the first number being that of x, which is 0."""
    for block in programme.times.double().split(max(1, BLOCK // (times * points(policy).shape[1]))):
        yield from torch.nn.functional.pad(policy.basis(block), (1, 0)).unbind()


def _combine(numbers: Tensor, base: Tensor, seen: list[Tensor]) -> Tensor:
    """a base + Σ_j b_j D_{r-j}."""
    a, *b = numbers.unbind()
    state = a * base
    for number, d in zip(b, seen, strict=True):
        state.addcmul_(number, d)
    return state


def points(policy: Linear) -> Tensor:
    """The parameters p `[B, N, L, C]`."""
    if isinstance(policy, DXPolicy):
        return policy.x0_grid
    return policy.coefficients if isinstance(policy, PolynomialPolicy) else policy.x0.unsqueeze(1)
