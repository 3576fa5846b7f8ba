"""Random programmes of roll-outs, and an executor of them in plain PyTorch, for the tests of the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from mixtures import rand, randn, random
from torch import Tensor

from pitools.kernels.programme import Arguments


@dataclass(frozen=True)
class Run:
    """What a kernel is given; `history` is H."""

    means: Tensor  # [N, K, C]
    log_weights: Tensor  # [N, K]
    variance: Tensor  # [N, 1] or [N, K]
    x_src: Tensor  # [N, C]
    x: Tensor  # [N, C]
    coefficients: Tensor  # [R, F, T]
    commits: Tensor  # [R]
    stops: Tensor  # [M, T]
    factors_per_time: int
    history: int

    @property
    def arguments(self) -> Arguments:
        return Arguments._make(tuple(vars(self).values())[:-1])

    def to(self, where: torch.dtype | torch.device | str) -> Run:
        """A copy, on another device or with numbers of another dtype; the means keep their strides."""
        numbers = isinstance(where, torch.dtype)
        moved = {
            name: value.to(where)
            for name, value in vars(self).items()
            if isinstance(value, Tensor) and (value.is_floating_point() or not numbers)
        }
        return replace(self, **moved)


FLAGS = {"own times", "own variances", "points", "dropped", "combine", "history", "moves", "far off", "close"}


def random_run(seed: int, batch: int, factors: int, components: int, channels: int, rows: int, *flags: str) -> Run:
    """Euler steps; with "combine", "history" or "moves" random commits, for an H of 1, of 4, or of 4 and none that
    combines. "far off" and "close" are scales of the data; the other flags say what each sample or component has."""
    assert FLAGS.issuperset(flags)
    own_times, own_variance = "own times" in flags, "own variances" in flags
    scale = 30.0 if "far off" in flags else 0.03 if "close" in flags else 1.0
    kind = next((flag for flag in flags if flag in ("combine", "history", "moves")), "euler")
    g = random(seed)
    count, times = batch * factors, batch if own_times else 1
    means = scale * randn(g, count, channels, components).mT
    log_weights = randn(g, count, components)
    if "dropped" in flags:
        log_weights[rand(g, count, components) < 0.4] = -math.inf
        log_weights[:, -1] = 0.3
    variance = scale**2 * 10 ** (-2 * rand(g, count, components if own_variance else 1))
    variance = torch.zeros_like(variance) if "points" in flags else variance
    t_src = 0.6 + 0.4 * rand(g, times)
    grid = t_src * torch.linspace(1, 0.05, rows + 1, dtype=torch.float64)[:, None]
    t, to = grid[:-1], grid[1:]
    precision = (t_src - t) * (t_src + t - 2 * t * t_src) / (t_src * t).square()
    alpha = (1 - t) / t.square()
    beta = (t_src - t) * (t_src + t - t * t_src) / (t_src * t).square() - alpha
    parts, history = [precision, alpha, beta, to / t, 1 - to / t], 1
    commits = torch.ones(rows, dtype=torch.int32)
    if kind != "euler":
        history = 1 if kind == "combine" else 4
        parts += [0.2 * (rand(g, rows, times) - 0.5) for _ in range(history - 1)]
        parts += [0.5 * rand(g, rows, times) for _ in range(1 + history)] if kind != "moves" else []
        commits = torch.randint(0, 2 if kind == "moves" else 3, (rows,), generator=g).int()
    source = scale * randn(g, count, channels)
    x = source + 0.1 * scale * randn(g, count, channels)
    stops = torch.randint(0, rows + 1, (3, times), generator=g).sort(0).values.int()
    stops[-1], stops[0, 0] = rows, 0
    return Run(means, log_weights, variance, source, x, torch.stack(parts, 1), commits, stops, factors, history)


def executed(run: Run) -> Tensor:
    """`[M, N, C]`, by the formulas as they stand: no reference point, one row after the other."""
    own = torch.arange(len(run.x)) // run.factors_per_time * (run.coefficients.shape[2] > 1)
    channels = run.x.shape[1]
    x = base = run.x
    seen, out = [torch.zeros_like(x)] * 4, [x] * len(run.stops)
    for r, (row, kind) in enumerate(zip(run.coefficients, run.commits.tolist(), strict=True)):
        precision, alpha, beta, *rest = row[:, own].unsqueeze(-1)
        a, b, commit = rest[0], rest[1 : 1 + run.history], rest[1 + run.history :]
        eta = alpha * x + beta * run.x_src
        shrink = 1 / (1 + precision * run.variance)
        energy = 2 * (run.means * eta[:, None]).sum(-1) - precision * run.means.square().sum(-1)
        logits = run.log_weights + channels / 2 * shrink.log()
        logits = logits + shrink * (energy + run.variance * eta.square().sum(-1, keepdim=True)) / 2
        posterior = shrink.unsqueeze(-1) * (run.means + run.variance.unsqueeze(-1) * eta[:, None])
        seen = [(torch.softmax(logits, -1).unsqueeze(-1) * posterior).sum(1), *seen[:3]]
        if kind == 1:
            base = x
        elif kind == 2:
            base = commit[0] * base + sum(number * d for number, d in zip(commit[1:], seen, strict=False))
        x = a * base + sum(number * d for number, d in zip(b, seen, strict=False))
        for m, stop in enumerate(run.stops[:, own]):
            out[m] = torch.where((stop == r + 1)[:, None], x, out[m])
    return torch.stack(out)


def gradients(run: Run, out_bar: Tensor) -> tuple[Tensor, ...]:
    """Those of means, log_weights, variance, x_src and x, by autograd."""
    names = list(vars(run))[:5]
    leaves = [getattr(run, name).clone().requires_grad_() for name in names]
    out = executed(replace(run, **dict(zip(names, leaves, strict=True))))
    return torch.autograd.grad(out, leaves, out_bar, materialize_grads=True)
