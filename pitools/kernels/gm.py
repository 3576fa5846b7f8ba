"""Roll-outs of Gaussian-mixture policies in one kernel, with their gradients.

Every factor has an ODE of its own, of K·C parameters, so that a whole roll-out can go on in a processor's cache
(native.cpp). The backward recomputes the states instead of keeping them. `adaptive` rolls out with steps of each
factor's own, without gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pitools.kernels import eager
from pitools.kernels.native import ADAPTIVE, BACKWARD, FORWARD, Job, call, fill
from pitools.kernels.programme import Arguments, Programme, numbers, velocity_rows
from pitools.mixture import GaussianMixture
from pitools.policies import GMPolicy
from pitools.solvers import Arrival, Clock, PerFactor
from pitools.solvers.embedded import Ruler, first_step, not_finite, too_many

ROW_WORK = 200_000
"""Numbers handled below which a second thread is not worth its start."""

TYPICAL_EVALUATIONS = 20
"""Of a factor that chooses its steps."""


@dataclass(frozen=True)
class Factors:
    """The factors of a field, in rows, and what rolls them out.

    means: `[N, K, C]`.  log_weights: `[N, K]`.  variance: `[N, 1]` or `[N, K]`.  x_src: `[N, C]`.  t_src: `[1]` or
    `[B]`.  rollout: `Native.apply`, `OnGPU.apply` or `eager.Rollout.apply`.
    """

    means: Tensor
    log_weights: Tensor
    variance: Tensor
    x_src: Tensor
    t_src: Tensor
    rollout: Callable[..., Tensor]

    def run(self, x: Tensor, programme: Programme) -> Tensor:
        """The states `[M, B, ..., C]` at the stops of `programme`, from x `[B, ..., C]`."""
        return self._run(x, numbers(programme, self.t_src, self.means.dtype), programme)

    def velocities(self, x: Tensor, t: Tensor) -> Tensor:
        """`[M, B, ..., C]` at the states x `[M, B, ..., C]` and the times t `[M, T]`."""
        programme = velocity_rows(t)
        rows = numbers(programme, self.t_src, self.means.dtype).split(1)
        return torch.cat([self._run(state, row, programme) for state, row in zip(x, rows, strict=True)])

    def adaptive(self, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor, scale: Tensor | float) -> Arrival:
        """What `solve_per_factor` gives for the factors from x `[B, L, C]`, in its order, with its errors.

        Times 0-d or `[B]`.  scale: a number, 0-d or `[B L]`.
        """
        flat = x.to(self.means.dtype).reshape(-1, x.shape[-1]).contiguous()
        count = len(flat)

        def of_factors(t: Tensor) -> Tensor:
            each = t.detach().double().expand(len(x))
            return each.repeat_interleave(x.shape[1])

        start, end, source = (of_factors(t) for t in (t_src, t_dst, self.t_src))
        ruler = Ruler.of(Clock.of(start, torch.as_tensor(scale, dtype=torch.float64).detach().expand(count)))
        first = torch.full_like(start, first_step(method))
        travels = torch.stack([ruler.a, ruler.b, ruler.c, ruler.d, end, start, first, source])
        out, failed_at = torch.empty_like(flat), torch.zeros_like(start)
        evaluations, stage = torch.zeros(2, count, dtype=torch.int32)
        job = _job(self.means, self.log_weights, self.variance, self.x_src, flat, TYPICAL_EVALUATIONS)
        fill(job, history=method.order, most=method.max_evaluations, tol=method.tol, travels=travels, out=out)
        call(fill(job, evaluations=evaluations, stage=stage, failed_at=failed_at), flat.dtype, ADAPTIVE)
        if bool(stage.any()):
            # All have set out together: what failed first is what PyTorch would have met first.
            stages = torch.where(stage > 0, stage, stage.max() + 1)
            i = int(stages.argmin())
            raise too_many(i, method, x.dtype) if int(stage[i]) % 3 == 1 else not_finite(i, float(failed_at[i]))
        return Arrival(out, evaluations.long())

    def _run(self, x: Tensor, coefficients: Tensor, programme: Programme) -> Tensor:
        # Here, so that a gradient's own gradient finds its way.
        flat = x.to(self.means.dtype).reshape(-1, x.shape[-1]).contiguous()
        times = coefficients.shape[2]
        if times not in (1, len(x)):
            raise ValueError(f"times must be those of all samples or of each of the {len(x)}, got {times}")
        out = self.rollout(
            self.means,
            self.log_weights,
            self.variance,
            self.x_src,
            flat,
            coefficients,
            programme.commits,
            programme.stops.expand(-1, times).contiguous(),
            len(flat) // len(x) if times > 1 else len(flat),
        )
        return out.reshape(len(out), *x.shape)


def factors_of(field: GMPolicy | GaussianMixture, rollout: Callable[..., Tensor], x: Tensor) -> Factors:
    """Those of a policy, or of one mixture that is a prior over data, shared by as many as there are in x."""
    mixture = field.mixture if isinstance(field, GMPolicy) else field
    dtype = torch.promote_types(x.dtype, mixture.means.dtype)
    if isinstance(field, GMPolicy):
        dtype = torch.promote_types(dtype, field.x_src.dtype)
    count = x.shape[:-1].numel()
    if isinstance(field, GMPolicy):
        x_src, source = (
            field.x_src.to(dtype).reshape(count, x.shape[-1]).contiguous(),
            torch.as_tensor(field.t_src).reshape(-1),
        )
    else:
        x_src, source = x.new_zeros(count, x.shape[-1], dtype=dtype), x.new_ones(1)
    means, weights, variance = mixture.means.to(dtype), mixture.log_weights.to(dtype), mixture.variance.to(dtype)
    own = variance.ndim > 0 and variance.shape[-1] > 1
    variance = variance.expand(*weights.shape[:-1], weights.shape[-1] if own else 1)

    def rows(values: Tensor, inner: int) -> Tensor:
        shared = values.ndim == inner
        return values.expand(count, *values.shape) if shared else values.flatten(0, -inner - 1)

    return Factors(rows(means, 2), rows(weights, 1), rows(variance, 1), x_src, source, rollout)


class Native(torch.autograd.Function):
    """means `[N, K, C]`, log_weights `[N, K]`, variance `[N, 1 or K]`, x_src, x `[N, C]` to states `[M, N, C]`."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        given = Arguments._make(arguments)
        ctx.save_for_backward(*given[:-1])
        ctx.factors = given.factors
        out = given.x.new_empty(len(given.stops), *given.x.shape)
        call(fill(_follow(given), out=out), out.dtype, FORWARD)
        return out

    @staticmethod
    def backward(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        given = Arguments._make((*ctx.saved_tensors, ctx.factors))
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            return (*eager.gradients(out_bar, given), None, None, None, None)
        out_bar, x, variance = out_bar.contiguous(), given.x, given.variance
        count, components, channels = given.means.shape
        means_bar = x.new_empty(count, channels, components) if ctx.needs_input_grad[0] else None
        weights_bar, variance_bar = x.new_empty(count, components), x.new_empty(count, components)
        x_src_bar, x_bar = torch.empty_like(x), torch.empty_like(x)
        job = fill(_follow(given), out_bar=out_bar, means_bar=means_bar, log_weights_bar=weights_bar)
        fill(job, variance_bar=variance_bar, x_src_bar=x_src_bar, x_bar=x_bar)
        call(job, x.dtype, BACKWARD)
        if variance.shape[1] == 1:
            variance_bar = variance_bar.sum(1, keepdim=True)
        return (
            None if means_bar is None else means_bar.mT,
            weights_bar,
            variance_bar,
            x_src_bar,
            x_bar,
            None,
            None,
            None,
            None,
        )


class OnGPU(torch.autograd.Function):
    """The same, by the kernel in Triton."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        from pitools.kernels import triton_gm

        ctx.save_for_backward(*arguments[:-1])
        ctx.factors = arguments[-1]
        return triton_gm.forward(Arguments._make(arguments))

    @staticmethod
    def backward(ctx: Any, out_bar: Tensor) -> tuple[Tensor | None, ...]:
        from pitools.kernels import triton_gm

        given = Arguments._make((*ctx.saved_tensors, ctx.factors))
        if torch.is_grad_enabled():
            return (*eager.gradients(out_bar, given), None, None, None, None)
        return (*triton_gm.backward(given, out_bar), None, None, None, None)


def _follow(given: Arguments) -> Job:
    """The job of a programme."""
    rows, per_row, times = given.coefficients.shape
    return fill(
        _job(*given[:5], rows),
        rows=rows,
        history=given.history,
        times=times,
        stops=len(given.stops),
        factors_per_time=given.factors,
        numbers=per_row,
        coefficients=given.coefficients,
        commits=given.commits,
        stop_rows=given.stops,
    )


def _job(means: Tensor, log_weights: Tensor, variance: Tensor, x_src: Tensor, x: Tensor, evaluations: int) -> Job:
    """A job of about so many evaluations for each factor, without what it is to do."""
    count, components, channels = means.shape
    work = evaluations * count * components * (channels + 4)
    return fill(
        Job(),
        factors=count,
        components=components,
        channels=channels,
        own_variance=int(variance.shape[1] > 1),
        threads=min(torch.get_num_threads(), max(1, work // ROW_WORK)),
        means_n=means.stride(0),
        means_k=means.stride(1),
        means_c=means.stride(2),
        weights_n=log_weights.stride(0),
        weights_k=log_weights.stride(1),
        variance_n=variance.stride(0),
        variance_k=variance.stride(1),
        means=means,
        log_weights=log_weights,
        variance=variance,
        x_src=x_src,
        x=x,
    )
