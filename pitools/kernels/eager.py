"""Roll-outs of Gaussian-mixture policies in PyTorch's own operations, for where there is no compiler.

`rollout` follows native.cpp: of a few thousand factors at a time, whose parameters stay in the second-level cache,
the means are kept about a centre c that follows the posterior. With μ' = μ - c, η' = η - λc and one variance v

    log p_k = Σ_c (ρη'_c) μ'_kc - ρλ ‖μ'_k‖²/2 + log A_k,     D = c + ρ Σ_k p_k μ'_k + ρ v η'

so that ‖μ'‖²/2 and log A are two more channels of the means, and a row is two sums of products with a table
`[C + 2, K, n]`. The factors lie innermost, where sums over small C and K run along vectors.

Where K is small beside C, Euler steps go on in the span of what the state is made of, which they never leave:

    X = Σ_k c_k μ'_k + e x + f x_src + g c,
    η'·μ'_j = α Σ_k c_k μ'_k·μ'_j + αe x·μ'_j + (αf + β) x_src·μ'_j + (αg - λ) c·μ'_j

A row is one sum of products with a table of inner products, `[K + 4, K, n]`, and the numbers c, e, f, g are its state.

`reference` is the same in differentiable form, with a centre of its own in each row; `gradients` differentiates it,
and so has derivatives of every order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pitools.kernels.programme import COMBINE, STATE, Arguments

CHUNK = 2**19
"""Numbers of a table that one thread's cache holds, next to a product of a part of its size."""

SETUP = 6
"""Rows that take as long as a table of inner products."""

EULER = 5
"""Numbers of a row of Euler's method: λ, α, β, a, b."""

LEAST = 64.0
"""Logarithm of the greatest weight over the least: less is lost beside it, and arithmetic is slow near underflow."""

PARTS = 4
"""In how many parts a sum of products is taken: all but the first add to its products, and the last sum is shorter."""


class Rollout(torch.autograd.Function):
    """`rollout`, whose derivatives are those of `reference`."""

    @staticmethod
    def forward(ctx: FunctionCtx, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:-1])
        ctx.factors = arguments[-1]  # type: ignore[attr-defined]
        return rollout(Arguments._make(arguments))

    @staticmethod
    def backward(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradients(out_bar, Arguments._make((*ctx.saved_tensors, ctx.factors))), None, None, None, None)


@torch.no_grad()
def rollout(given: Arguments) -> Tensor:
    """The states `[M, N, C]` at the stops."""
    count, components, channels = given.means.shape
    out = given.x.new_empty(len(given.stops), count, channels)
    most = max(256, torch.get_num_threads() * CHUNK // (components * (channels + 2)))
    size = -(-count // max(1, -(-count // most)))  # of one size, as a small chunk costs as many calls
    sample = torch.arange(count, device=given.x.device) // given.factors
    for start in range(0, count, max(1, size)):
        part = slice(start, start + size)
        own = sample[part] if given.coefficients.shape[2] > 1 else slice(None)
        chunk = given._replace(
            means=given.means[part],
            log_weights=given.log_weights[part],
            variance=given.variance[part],
            x_src=given.x_src[part],
            x=given.x[part],
            coefficients=given.coefficients[:, :, own],
            stops=given.stops[:, own],
        )
        with torch.autocast(out.device.type, enabled=False):  # exact inside it too, which rounds products of matrices
            _roll(chunk, out[:, part])
    return out


def _roll(given: Arguments, out: Tensor) -> None:
    """One chunk, into `out` `[M, n, C]`; each factor has its column of coefficients and stops, or all have one."""
    means, log_weights, variance, x_src, x, coefficients, _, stops, _ = given
    (count, components, channels), history, commits = means.shape, given.history, given.commits.tolist()
    own, done = variance.shape[1] > 1, 0
    stop_rows = set(stops.unique().tolist())

    def put(row: int, x: Tensor) -> None:
        for m, here in _reached(stops, row) if row in stop_rows else ():
            out[m] = torch.where(here.unsqueeze(1), x, out[m])

    put(0, x)
    variance = variance[:1] if variance.stride(0) == 0 else variance  # one for all: what follows from it is small, too
    if not own and components + 4 < 2 * channels and coefficients.shape[1] == EULER and len(commits) >= SETUP:
        for done, reached in _in_span(given._replace(variance=variance), stop_rows):
            put(done, reached)
            x = reached
    if done == len(commits):
        return
    mean, width = (value.T.contiguous() for value in _widest(means, variance))
    means, log_weights, variance, x_src, x = (
        value.permute(*reversed(range(value.ndim))).clone(memory_format=torch.contiguous_format)
        for value in (means, log_weights, variance, x_src, x)
    )
    bound = width * channels / (16 + 2 * channels) ** 2
    rho = torch.ones_like(variance[:1]) if own else 1 / (1 + coefficients[:, :1] * variance)
    seen_from = coefficients[:, :3] * rho
    alive = coefficients.ne(0).any(-1).tolist()

    table = x.new_empty(channels + (1 if own else 2), components, count)
    shifted, square = table[:channels], table[channels]
    multiplier = x.new_ones(len(table), count)
    slope, drop = multiplier[:channels], multiplier[channels]
    squares, logits, p = torch.empty_like(slope), torch.empty_like(log_weights), torch.empty_like(log_weights)
    greatest = x.new_empty(1, count)
    over_channels, over_components = _Sum(table, multiplier.unsqueeze(1), 0), _Sum(shifted, p.unsqueeze(0), 1)
    if not own:
        table[-1] = log_weights

    def recentre(centre: Tensor) -> Tensor:
        torch.sub(means, centre.unsqueeze(1), out=shifted)
        torch.sum(shifted.square(), 0, out=square)
        square.mul_(-0.5)
        return centre

    centre = recentre(mean)
    base, seen = x.clone(), [torch.zeros_like(x) for _ in range(history)]
    for r in range(done, len(commits)):
        number, scaled = coefficients[r], seen_from[r]
        (precision, alpha, beta, *mixing), (drop_r, alpha_r, beta_r) = number.unbind(), scaled.unbind()
        torch.mul(x, alpha_r, out=slope).addcmul_(x_src, beta_r).addcmul_(centre, drop_r, value=-1)
        drop.copy_(drop_r)
        torch.mul(slope, slope, out=squares)
        if float((squares.sum(0, keepdim=True).mul_(bound)).max()) > 1:
            share = 1 / (1 + precision * width)
            eta = alpha * x + beta * x_src
            centre = recentre((mean + width * eta) * share)
            torch.mul(eta - precision * mean, share if own else share * rho[r], out=slope)

        over_channels.into(logits)
        d = seen.pop()
        if own:
            shrink = 1 / (1 + precision * variance)
            logits.addcmul_(variance, slope.square().sum(0), value=0.5).mul_(shrink)
            logits.add_(log_weights).add_(shrink.log(), alpha=channels / 2)
            _weigh(logits, torch.amax(logits, 0, keepdim=True, out=greatest), p).mul_(shrink)
            lift = (p * variance).sum(0)
        else:
            _weigh(logits, torch.amax(logits, 0, keepdim=True, out=greatest), p)
            lift = variance
        over_components.into(d)
        if not own:
            d.mul_(rho[r])
        d.addcmul_(slope, lift).add_(centre)
        seen.insert(0, d)

        if commits[r] == STATE:
            base, x = x, base
        elif commits[r] == COMBINE:
            base.mul_(mixing[1 + history])
            for j in range(history):
                base.addcmul_(seen[j], mixing[2 + history + j])
        torch.mul(base, mixing[0], out=x)
        for j in range(history):
            if alive[r][4 + j]:
                x.addcmul_(seen[j], mixing[1 + j])
        put(r + 1, x.T)


def _in_span(given: Arguments, stop_rows: set[int]) -> Iterator[tuple[int, Tensor]]:
    """How many Euler steps have been taken, and the state `[n, C]` then: at each stop, and before rows that are too few
    for a table."""
    means, log_weights, variance, x_src, x, coefficients, *_ = given
    count, components, channels = means.shape
    log_weights, variance, rows = log_weights.T.contiguous(), variance.T, len(coefficients)
    precision, alpha, beta, keep, add = coefficients.unsqueeze(2).unbind(1)  # each [R, 1, n or 1]
    rho = 1 / (1 + precision * variance)
    seen, zero = rho * alpha, torch.zeros_like(rho)
    kept, added = keep + add * variance * seen, add * rho
    # What a row adds to e, f, g; and what stands before the last four of the table where these are 0.
    gained = torch.cat([zero, added * variance * beta, added], 1)
    before = torch.cat([zero, rho * beta, -rho * precision, -rho * precision / 2], 1)
    multiplier, state = x.new_empty(2, components + 4, count)
    weights, scalars = state[:components], state[components:-1]
    logits, p, greatest = torch.empty_like(log_weights), torch.empty_like(log_weights), x.new_empty(1, count)
    mean, width = _widest(means, variance.T)
    done, centre, first = 0, mean, 0

    while rows - done >= SETUP and done >= first:
        if done:
            eta = alpha[done].T * x + beta[done].T * x_src
            centre = (mean + width * eta) / (1 + precision[done].T * width)
        shifted = means - centre.unsqueeze(1)
        made_of = torch.cat([shifted, torch.stack([x, x_src, centre], 1)], 1)
        table = x.new_empty(components + 4, components, count)
        table[:-1] = torch.bmm(made_of, shifted.mT).permute(1, 2, 0)
        table[-1] = table.diagonal().T
        state.zero_()[components] = 1
        product = _Sum(table, multiplier.unsqueeze(1), 0)
        first = done + SETUP
        while done < rows:
            torch.mul(state, seen[done], out=multiplier)[components:].add_(before[done])
            product.into(logits)
            torch.amax(logits.add_(log_weights), 0, keepdim=True, out=greatest)
            # Rounding of the logits grows with those that matter; then another centre is needed.
            if float(greatest.abs().max()) > 16 + 2 * channels:
                break
            _weigh(logits, greatest, p)
            state.mul_(kept[done])
            weights.addcmul_(p, added[done])
            scalars.add_(gained[done])
            done += 1
            if done in stop_rows:
                yield done, (made_of.mT @ state[:-1].T.unsqueeze(2)).squeeze(2)
        x = (made_of.mT @ state[:-1].T.unsqueeze(2)).squeeze(2)
        yield done, x


def _weigh(logits: Tensor, greatest: Tensor, p: Tensor) -> Tensor:
    """p = softmax of the logits `[K, n]`, which are lost; none of it is near underflow."""
    return torch.softmax(torch.maximum(logits, greatest.sub_(LEAST), out=logits), 0, out=p)


class _Sum:
    """Σ a b over dimension `dim` of a `[C, K, n]`; b broadcasts to it."""

    def __init__(self, a: Tensor, b: Tensor, dim: int) -> None:
        width = -(-a.shape[dim] // PARTS)
        parts = list(zip(a.split(width, dim), b.split(width, dim), strict=True))
        self.dim, self.room = dim, torch.empty_like(parts[0][0], memory_format=torch.contiguous_format)
        self.parts = [(self.room.narrow(dim, 0, part.shape[dim]), part, other) for part, other in parts]

    def into(self, out: Tensor) -> None:
        (products, a, b), *others = self.parts
        torch.mul(a, b, out=products)
        for sums, a, b in others:
            sums.addcmul_(a, b)
        torch.sum(self.room, self.dim, out=out)


def reference(given: Arguments) -> Tensor:
    """`rollout`, differentiable in the first five of its arguments."""
    means, log_weights, variance, x_src, x, coefficients, commits, stops, factors = given
    own = torch.arange(len(x), device=x.device) // factors * (coefficients.shape[2] > 1)
    channels, history = x.shape[1], given.history
    mean, width = _widest(means.detach(), variance.detach())
    base, seen = x, [torch.zeros_like(x)] * history
    visited = [x] * len(stops)
    for r, (row, commit) in enumerate(zip(coefficients, commits.tolist(), strict=True)):
        precision, alpha, beta, *mixing = row[:, own].unsqueeze(-1)
        eta = alpha * x + beta * x_src
        share = 1 / (1 + precision * width)
        shifted = means - (share * (mean + width * eta)).unsqueeze(1)
        slope = share * (eta - precision * mean)
        rho = 1 / (1 + precision * variance)
        inner = (shifted * (slope.unsqueeze(1) - (precision / 2).unsqueeze(1) * shifted)).sum(-1)
        length = slope.square().sum(-1, keepdim=True)
        logits = log_weights + rho * (inner + variance * length / 2) + channels / 2 * rho.log()
        p = torch.softmax(logits, -1) * rho
        d = (p.unsqueeze(-1) * means).sum(1) + (p * variance).sum(-1, keepdim=True) * eta
        seen = [d, *seen[:-1]]
        if commit == STATE:
            base = x
        elif commit == COMBINE:
            base = _combine(mixing[1 + history :], base, seen)
        x = _combine(mixing, base, seen)
        for m, here in _reached(stops, r + 1):
            visited[m] = torch.where(here[own].unsqueeze(1), x, visited[m])
    return torch.stack(visited)


def gradients(out_bar: Tensor, given: Arguments) -> tuple[Tensor | None, ...]:
    """The derivatives of `out_bar`·`reference` for the first five of its arguments, None where none is asked for.

    In grad mode they have derivatives themselves.
    """
    again = torch.is_grad_enabled()
    inputs = [value if again else value.detach().requires_grad_(value.requires_grad) for value in given[:5]]
    wanted = [value for value in inputs if value.requires_grad]
    with torch.enable_grad():
        out = reference(Arguments._make((*inputs, *given[5:])))
        found = iter(torch.autograd.grad(out, wanted, out_bar, create_graph=again, materialize_grads=True))
    return tuple(next(found) if value.requires_grad else None for value in inputs)


def _combine(numbers: list[Tensor], base: Tensor, seen: list[Tensor]) -> Tensor:
    """a base + Σ_j b_j D_{r-j}."""
    return numbers[0] * base + sum(b * d for b, d in zip(numbers[1:], seen, strict=False))


def _reached(stops: Tensor, row: int) -> list[tuple[int, Tensor]]:
    """The stops m that someone reaches after `row` rows, and who, `[T]`."""
    reached = stops == row
    return [(m, reached[m]) for m in reached.any(1).nonzero().flatten().tolist()]


def _widest(means: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Centre `[N, C]` and variance `[N, 1]` of a Gaussian as wide as the mixture (see mixture.py)."""
    mean = means.mean(1)
    spread = (means - mean.unsqueeze(1)).square().sum(-1).amax(-1, keepdim=True) / means.shape[-1]
    return mean, spread + variance.amax(-1, keepdim=True)
