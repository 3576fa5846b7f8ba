"""The roll-out of Gaussian-mixture policies as one Triton kernel, and its gradient as another.

A row r of the programme (`programme.py`) is one evaluation, at λ, α, β of its time (`mixture.py`):

    η = α X + β x_src,   r = (m + w η)/(1 + λw),   g = η - λ r,   d_k = μ_k - r,   ρ_k = 1/(1 + λ v_k)
    ℓ_k = log A_k + (C/2) log ρ_k + ρ_k (d_k·(g - λ/2 d_k) + v_k ‖g‖²/2),   p = softmax ℓ
    D = Σ_k p_k ρ_k (μ_k + v_k η)

and then the commit and the move. Its gradient, given D's, D̄, with s_k = ρ_k D̄·(d_k + v_k g) and
ℓ̄_k = p_k (s_k - Σ_j p_j s_j), which need no gradient of r, as the result does not depend on r, is

    μ̄_k = p_k ρ_k D̄ + ℓ̄_k ρ_k (g - λ d_k)
    η̄   = Σ_k ρ_k (p_k v_k D̄ + ℓ̄_k (d_k + v_k g)),    X̄ = α η̄,    x̄_src = β η̄
    v̄_k = p_k ρ_k² D̄·(g - λ d_k) + ℓ̄_k (ρ_k² ‖g - λ d_k‖²/2 - (C/2) λ ρ_k)

(ρ is the same for all components that share a variance; log ρ is then left out, and the last term with it.)
The backward kernel walks the rows once to keep X of each row, R·C numbers a factor, and then back.

Tiles are `[K, C, N]`, components by channels by factors, padded to powers of two; a component of the padding has
log-weight -inf, a channel zeros. Triton deals the *last* axis to a warp's threads first, then the one before: with N
as small as leaves each thread `BYTES` of a factor, its other threads go along C, so that most of a sum over C or K
stays inside a thread. Strides are not specialised: were one known to be 1, Triton would deal that axis first.
Parameters are read once and stay in registers.
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pitools.kernels.programme import Arguments

BYTES = 256
"""Of a factor's means and states, K + `STATES` times C numbers, that a thread holds: what fits into 255 registers
with the gradients."""

STATES = 8

_RUN_TIME = ["count", "rows", "times", "stop_count", "factors_per_time", "means_n", "means_k", "means_c"]
_RUN_TIME += ["weights_n", "weights_k", "variance_n", "variance_k", "state_c"]


def forward(given: Arguments) -> Tensor:
    """The states `[M, N, C]` at the stops."""
    out = given.x.new_empty(len(given.stops), *given.x.shape)
    if out.numel():
        tensors, grid, shapes = _launch(given)
        with _on(out):
            _forward[grid](*tensors, out, **shapes)
    return out


def backward(given: Arguments, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of means, log_weights, variance, x_src and x, given that of the states, `[M, N, C]`.

    The gradient of the means has K innermost in memory.
    """
    (count, components, channels), x = given.means.shape, given.x
    d_means = x.new_empty(count, channels, components).mT
    d_log_weights, d_variance = x.new_empty(given.log_weights.shape), x.new_empty(given.variance.shape)
    d_x_src, d_x = x.new_empty(x.shape), x.new_empty(x.shape)
    grads = (d_means, d_log_weights, d_variance, d_x_src, d_x)
    if x.numel():
        tensors, grid, shapes = _launch(given)
        states = x.new_empty(len(given.commits), *x.shape)
        with _on(x):
            _backward[grid](*tensors, grad_out.contiguous(), states, *grads, **shapes)
    return grads


def _launch(given: Arguments) -> tuple[tuple[Tensor, ...], tuple[int], dict[str, Any]]:
    """The tensors, those after the mixture's own contiguous; the grid; and the arguments by name of both kernels."""
    means, log_weights, variance = given[:3]
    x_src, x, coefficients, commits, stops = (value.contiguous() for value in given[3:8])
    count, components, channels = means.shape
    rows, per_row, times = coefficients.shape
    block_k, block_c = triton.next_power_of_2(components), triton.next_power_of_2(channels)
    threads = triton.next_power_of_2(triton.cdiv((block_k + STATES) * block_c * x.element_size(), BYTES))
    block = max(32 // threads, 1)
    own = variance.shape[1] > 1
    shapes = {
        "count": count,
        "rows": rows,
        "times": times,
        "stop_count": len(stops),
        "factors_per_time": given.factors if times > 1 else count,
        **{f"means_{axis}": stride for axis, stride in zip("nkc", means.stride(), strict=True)},
        **{f"weights_{axis}": stride for axis, stride in zip("nk", log_weights.stride(), strict=True)},
        "variance_n": variance.stride(0),
        "variance_k": variance.stride(1) if own else 0,
        "state_c": 1,
        "K": components,
        "C": channels,
        "BLOCK_K": block_k,
        "BLOCK_C": block_c,
        "BLOCK_N": block,
        "OWN": own,
        "HISTORY": given.history,
        "COMBINES": per_row in (7, 13),
        "num_warps": min(max(threads // 32, 1), 8),
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    tensors = (means, log_weights, variance, x_src, x, coefficients, commits, stops)
    return tensors, (triton.cdiv(count, block),), shapes


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def _indices(
    count,
    times,
    factors_per_time,
    state_c,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """k `[K, 1]`, n `[1, N]`, the time of each factor `[1, N]`, and where its state lies `[C, N]`, if it is there."""
    k = tl.arange(0, BLOCK_K)[:, None]
    c = tl.arange(0, BLOCK_C)[:, None]
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    time = tl.where((n < count) & (times > 1), n // factors_per_time, 0)
    return k, n, time, n * C + c * state_c, (n < count) & (c < C)


@triton.jit
def _mixture(
    means,
    log_weights,
    variance,
    k,
    n,
    count,
    means_n,
    means_k,
    means_c,
    weights_n,
    weights_k,
    variance_n,
    variance_k,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OWN: tl.constexpr,
):
    """μ `[K, C, N]`, log A `[K, N]`, v `[K, N]` or `[1, N]`, and a Gaussian as wide: m `[C, N]`, w `[1, N]`."""
    c = tl.arange(0, BLOCK_C)[None, :, None]
    there = (n < count) & (k < K)
    mu_there = there[:, None, :] & (c < C)
    at = n[:, None, :] * means_n + k[:, None, :] * means_k + c * means_c
    mu = tl.load(means + at, mask=mu_there, other=0.0)
    # A component that is missing has no weight; in a factor that is missing they have any that make no NaN.
    log_w = tl.load(log_weights + n * weights_n + k * weights_k, mask=there, other=0.0)
    log_w = tl.where(k < K, log_w, float("-inf"))
    if OWN:
        v = tl.load(variance + n * variance_n + k * variance_k, mask=there, other=0.0)
        widest = tl.max(v, axis=0)[None, :]
    else:
        v = tl.load(variance + n * variance_n, mask=n < count, other=0.0)
        widest = v
    centre = tl.sum(mu, axis=0) / K
    away = tl.where(mu_there, mu - centre[None, :, :], 0.0)
    spread = tl.max(tl.sum(away * away, axis=1), axis=0)[None, :] / C
    return mu, log_w, v, centre, spread + widest


@triton.jit
def _posterior(mu, log_w, v, centre, spread, eta, lam, C: tl.constexpr, OWN: tl.constexpr):
    """g `[C, N]`, d `[K, C, N]`, ρ `[K, N]` or `[1, N]`, and p `[K, N]`, at η `[C, N]` and λ `[1, N]`."""
    scale = 1 / (1 + lam * spread)
    g = (eta - lam * centre) * scale
    d = mu - ((centre + spread * eta) * scale)[None, :, :]
    rho = 1 / (1 + lam * v)
    inner = tl.sum(d * (g[None, :, :] - (0.5 * lam)[None, :, :] * d), axis=1)
    logits = log_w + rho * (inner + v * (0.5 * tl.sum(g * g, axis=0)[None, :]))
    if OWN:
        logits += (0.5 * C) * tl.log(rho)
    p = tl.exp(logits - tl.max(logits, axis=0)[None, :])
    return g, d, rho, p * (1 / tl.sum(p, axis=0)[None, :])


@triton.jit
def _combined(at, times, base, d0, d1, d2, d3, HISTORY: tl.constexpr):
    """a base + Σ_j b_j D_j; `at` points to a."""
    total = tl.load(at).to(base.dtype) * base + tl.load(at + times).to(base.dtype) * d0
    if HISTORY > 1:
        total += tl.load(at + 2 * times).to(base.dtype) * d1
        total += tl.load(at + 3 * times).to(base.dtype) * d2
        total += tl.load(at + 4 * times).to(base.dtype) * d3
    return total


@triton.jit
def _row(
    mu,
    log_w,
    v,
    centre,
    spread,
    x_src,
    at,
    times,
    kind,
    x,
    base,
    d0,
    d1,
    d2,
    d3,
    C: tl.constexpr,
    OWN: tl.constexpr,
    HISTORY: tl.constexpr,
    COMBINES: tl.constexpr,
):
    """What a row makes of X, base and the D's."""
    lam = tl.load(at).to(x.dtype)
    eta = tl.load(at + times).to(x.dtype) * x + tl.load(at + 2 * times).to(x.dtype) * x_src
    _, _, rho, p = _posterior(mu, log_w, v, centre, spread, eta, lam, C, OWN)
    if HISTORY > 1:
        d3 = d2
        d2 = d1
        d1 = d0
    weights = p * rho
    d0 = tl.sum(weights[:, None, :] * mu, axis=0) + tl.sum(weights * v, axis=0)[None, :] * eta
    kept = base
    if COMBINES:
        kept = tl.where(kind == 2, _combined(at + (4 + HISTORY) * times, times, base, d0, d1, d2, d3, HISTORY), base)
    base = tl.where(kind == 1, x, kept)
    return _combined(at + 3 * times, times, base, d0, d1, d2, d3, HISTORY), base, d0, d1, d2, d3


@triton.jit(do_not_specialize=_RUN_TIME)
def _forward(
    means,
    log_weights,
    variance,
    x_src_at,
    x_at,
    coefficients,
    commits,
    stops,
    out,
    count,
    rows,
    times,
    stop_count,
    factors_per_time,
    means_n,
    means_k,
    means_c,
    weights_n,
    weights_k,
    variance_n,
    variance_k,
    state_c,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN: tl.constexpr,
    HISTORY: tl.constexpr,
    COMBINES: tl.constexpr,
):
    F: tl.constexpr = (4 + HISTORY) + (1 + HISTORY) * COMBINES
    k, n, time, state, there = _indices(count, times, factors_per_time, state_c, C, BLOCK_K, BLOCK_C, BLOCK_N)
    mu, log_w, v, centre, spread = _mixture(
        means,
        log_weights,
        variance,
        k,
        n,
        count,
        means_n,
        means_k,
        means_c,
        weights_n,
        weights_k,
        variance_n,
        variance_k,
        K,
        C,
        BLOCK_K,
        BLOCK_C,
        OWN,
    )
    x_src = tl.load(x_src_at + state, mask=there, other=0.0)
    x = tl.load(x_at + state, mask=there, other=0.0)
    size = count.to(tl.int64) * C
    for m in range(stop_count):
        reached = tl.load(stops + m * times + time) == 0
        tl.store(out + m * size + state, x, mask=there & reached)
    base = x
    d0 = tl.zeros_like(x)
    d1 = d0
    d2 = d0
    d3 = d0
    for r in range(rows):
        at = coefficients + r * F * times + time
        kind = tl.load(commits + r)
        x, base, d0, d1, d2, d3 = _row(
            mu, log_w, v, centre, spread, x_src, at, times, kind, x, base, d0, d1, d2, d3, C, OWN, HISTORY, COMBINES
        )
        for m in range(stop_count):
            reached = tl.load(stops + m * times + time) == r + 1
            tl.store(out + m * size + state, x, mask=there & reached)


@triton.jit
def _dealt(at, times, y, c0, c1, c2, c3, HISTORY: tl.constexpr):
    """The D̄'s with b_j y added; `at` points to b_0."""
    c0 += tl.load(at).to(y.dtype) * y
    if HISTORY > 1:
        c1 += tl.load(at + times).to(y.dtype) * y
        c2 += tl.load(at + 2 * times).to(y.dtype) * y
        c3 += tl.load(at + 3 * times).to(y.dtype) * y
    return c0, c1, c2, c3


@triton.jit(do_not_specialize=_RUN_TIME)
def _backward(
    means,
    log_weights,
    variance,
    x_src_at,
    x_at,
    coefficients,
    commits,
    stops,
    out_bar,
    states,
    means_bar,
    log_weights_bar,
    variance_bar,
    x_src_bar_at,
    x_bar_at,
    count,
    rows,
    times,
    stop_count,
    factors_per_time,
    means_n,
    means_k,
    means_c,
    weights_n,
    weights_k,
    variance_n,
    variance_k,
    state_c,
    K: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN: tl.constexpr,
    HISTORY: tl.constexpr,
    COMBINES: tl.constexpr,
):
    F: tl.constexpr = (4 + HISTORY) + (1 + HISTORY) * COMBINES
    k, n, time, state, there = _indices(count, times, factors_per_time, state_c, C, BLOCK_K, BLOCK_C, BLOCK_N)
    mu, log_w, v, centre, spread = _mixture(
        means,
        log_weights,
        variance,
        k,
        n,
        count,
        means_n,
        means_k,
        means_c,
        weights_n,
        weights_k,
        variance_n,
        variance_k,
        K,
        C,
        BLOCK_K,
        BLOCK_C,
        OWN,
    )
    x_src = tl.load(x_src_at + state, mask=there, other=0.0)
    x = tl.load(x_at + state, mask=there, other=0.0)
    size = count.to(tl.int64) * C
    zero = tl.zeros_like(x)

    base = x
    d0 = zero
    d1 = zero
    d2 = zero
    d3 = zero
    for r in range(rows):
        tl.store(states + r * size + state, x, mask=there)
        at = coefficients + r * F * times + time
        kind = tl.load(commits + r)
        x, base, d0, d1, d2, d3 = _row(
            mu, log_w, v, centre, spread, x_src, at, times, kind, x, base, d0, d1, d2, d3, C, OWN, HISTORY, COMBINES
        )
    tl.debug_barrier()  # what a thread reads of `states`, another may have written

    x_bar = zero
    base_bar = zero
    x_src_bar = zero
    c0 = zero
    c1 = zero
    c2 = zero
    c3 = zero
    mu_bar = tl.zeros_like(mu)
    log_w_bar = tl.zeros_like(log_w)
    v_bar = tl.zeros_like(v)
    for back in range(rows):
        r = rows - 1 - back
        for m in range(stop_count):
            reached = tl.load(stops + m * times + time) == r + 1
            x_bar += tl.load(out_bar + m * size + state, mask=there & reached, other=0.0)
        at = coefficients + r * F * times + time
        kind = tl.load(commits + r)
        # the move, and the commit
        base_bar += tl.load(at + 3 * times).to(x.dtype) * x_bar
        c0, c1, c2, c3 = _dealt(at + 4 * times, times, x_bar, c0, c1, c2, c3, HISTORY)
        x_bar = tl.where(kind == 1, base_bar, 0.0)
        kept = base_bar
        if COMBINES:
            y = tl.where(kind == 2, base_bar, 0.0)
            c0, c1, c2, c3 = _dealt(at + (5 + HISTORY) * times, times, y, c0, c1, c2, c3, HISTORY)
            kept = tl.where(kind == 2, tl.load(at + (4 + HISTORY) * times).to(x.dtype) * base_bar, base_bar)
        base_bar = tl.where(kind == 1, 0.0, kept)
        # the evaluation
        lam = tl.load(at).to(x.dtype)
        alpha = tl.load(at + times).to(x.dtype)
        beta = tl.load(at + 2 * times).to(x.dtype)
        eta = alpha * tl.load(states + r * size + state, mask=there, other=0.0) + beta * x_src
        g, d, rho, p = _posterior(mu, log_w, v, centre, spread, eta, lam, C, OWN)
        along = tl.sum(c0 * g, axis=0)[None, :]
        across = tl.sum(c0[None, :, :] * d, axis=1)
        s = rho * (across + v * along)
        logit_bar = p * (s - tl.sum(p * s, axis=0)[None, :])
        e = g[None, :, :] - lam[None, :, :] * d
        weight = p * rho
        weight_bar = logit_bar * rho
        log_w_bar += logit_bar
        mu_bar += weight[:, None, :] * c0[None, :, :] + weight_bar[:, None, :] * e
        own_bar = rho * (weight * (along - lam * across) + 0.5 * weight_bar * tl.sum(e * e, axis=1))
        if OWN:
            v_bar += own_bar - (0.5 * C) * lam * weight_bar
        else:
            v_bar += tl.sum(own_bar, axis=0)[None, :]
        eta_bar = tl.sum(weight * v, axis=0)[None, :] * c0 + tl.sum(weight_bar * v, axis=0)[None, :] * g
        eta_bar += tl.sum(weight_bar[:, None, :] * d, axis=0)
        x_bar += alpha * eta_bar
        x_src_bar += beta * eta_bar
        if HISTORY > 1:
            c0 = c1
            c1 = c2
            c2 = c3
            c3 = zero
        else:
            c0 = zero
    x_bar += base_bar
    for m in range(stop_count):
        reached = tl.load(stops + m * times + time) == 0
        x_bar += tl.load(out_bar + m * size + state, mask=there & reached, other=0.0)

    tl.store(x_bar_at + state, x_bar, mask=there)
    tl.store(x_src_bar_at + state, x_src_bar, mask=there)
    # The gradients of the mixture are contiguous, the means' as [N, C, K].
    k_there = (n < count) & (k < K)
    tl.store(log_weights_bar + n * K + k * state_c, log_w_bar, mask=k_there)
    if OWN:
        tl.store(variance_bar + n * K + k * state_c, v_bar, mask=k_there)
    else:
        tl.store(variance_bar + n * state_c, v_bar, mask=n < count)
    c = tl.arange(0, BLOCK_C)[None, :, None]
    at = n[:, None, :] * (K * C) + c * K + k[:, None, :] * state_c
    tl.store(means_bar + at, mu_bar, mask=k_there[:, None, :] & (c < C))
