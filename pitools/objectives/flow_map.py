"""FreeFlow: a flow map distilled from noise alone (Tong et al. 2025, sections 4, 5 and A).

Its u is data - noise, ours noise - data. In our sign the map from t = 1 down to t = 1 - δ is f = z - δ F(z, δ), and

    F + δ ∂_δ F = u(f, 1 - δ)                                                                   (Eq. 7)

The left side is v_G = -∂_δ f, at which the student generates. What it has generated and noise n, drawn apart,
meet in x_r = (1 - r) f(z, 1) + r n, which moves at v_N(x_r, r) = E[n - f(z, 1) | x_r], the velocity of noising.
Both are brought to the teacher's by gradients that keep their form,

    ∇ E F(z, δ)·sg(w Δ_G),    Δ_G = v_G - u(f, 1 - δ),    w = (‖Δ_G‖²/d + ε)^-k     (Eqs. 9, 15; section 5.1: predict)
    ∇ E F(z, 1)·sg(λ Δ_N),    Δ_N = v_N - u(x_r, r)                                  (Eqs. 11, 17: correct)

and no data is seen. v_N is learned by an auxiliary network g, from min E ‖n - f(z, 1) - g(x_r, r)‖² (Eq. 12).
Norms are means over the elements of a latent. A guidance strength γ is one more condition, "guidance".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pitools.draws import Randomness, normal, uniform
from pitools.path import align, diffuse
from pitools.types import Conditions, FlowMap, VelocityField

WEIGHT_EPS, BALANCE_EPS = 1e-4, 1e-6
LEAST = 1e-4  # of r: fields live above 0


@dataclass(frozen=True)
class Times:
    """The law of a time: 0 with probability `at_zero`, else the logistic of a normal with this `mean` and `std`.

    Raises `ValueError` for a probability outside [0, 1] and a std that is negative or not finite.
    """

    mean: float = 0.0
    std: float = 1.0
    at_zero: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.at_zero <= 1:
            raise ValueError(f"at_zero must lie in [0, 1], got {self.at_zero}")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"mean and std must be finite and std not negative, got {self.mean} and {self.std}")

    def draw(self, count: int, randomness: Randomness, like: Tensor) -> Tensor:
        """`[count]` in [0, 1), in `like`'s dtype and on its device."""
        t = torch.sigmoid(self.mean + self.std * normal([count], randomness, like))
        t = t.clamp(max=1 - torch.finfo(t.dtype).eps)
        return torch.where(uniform([count], randomness, like) < self.at_zero, 0.0, t) if self.at_zero else t


@dataclass(frozen=True)
class Prediction:
    """How the student is led along the teacher's field (section 4.1 and A.1).

    steps: N of the discrete objective (Eq. 14), 0 for the continuous one by a forward-mode derivative.  solver: which
    velocity a discrete step takes.  delta: the law of δ, brought down to the grid of N steps.  power: k.
    warmup: steps over which u is asked about noisier states, at t_c from 1 down to 0, and once whatever the solver.
    Raises `ValueError` for a value out of range.
    """

    steps: int = 8
    solver: Literal["euler", "heun"] = "heun"
    delta: Times = field(default_factory=lambda: Times(at_zero=0.1))
    power: float = 1.0
    warmup: int = 10_000

    def __post_init__(self) -> None:
        for name in ("steps", "warmup"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {getattr(self, name)}")
        if self.solver not in ("euler", "heun"):
            raise ValueError(f"solver must be euler or heun, got {self.solver!r}")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise ValueError(f"power must be a number of at least 0, got {self.power}")


@dataclass(frozen=True)
class Alignment:
    """loss: `[B]`, ½ of the mean square of `difference`, with the graph of the gradients above.  difference: w Δ_G or
    Δ_N, of a latent's shape, without a graph.  error: `[B]`, the root mean square of Δ_G or Δ_N itself."""

    loss: Tensor
    difference: Tensor
    error: Tensor


def predict(
    flow_map: FlowMap,
    teacher: VelocityField,
    noise: Tensor,
    prediction: Prediction,
    conditions: Conditions | None = None,
    confident: float = 0.0,
    randomness: Randomness = None,
    delta: Tensor | None = None,
) -> Alignment:
    """The prediction objective (Eqs. 8, 13 and 14) from noise z `[B, ...]`.

    teacher: asked without a graph.  confident: t_c; where it is above t, u is asked about a state that noise has
    brought from t up to t_c.  delta: `[B]` in [0, 1), else drawn from the prediction's law.
    """
    d = prediction.delta.draw(len(noise), randomness, like=noise) if delta is None else delta
    if prediction.steps:
        index = (d * prediction.steps).floor()
        start, end = index / prediction.steps, (index + 1) / prediction.steps
        mean = flow_map(noise, end, conditions)
        with torch.no_grad():
            x = noise - align(start, noise) * flow_map(noise, start, conditions)
            v = (x - (noise - align(end, noise) * mean)) / align(end - start, noise)
    else:
        start = end = d
        with forward_ad.dual_level():
            answer = flow_map(noise, forward_ad.make_dual(d, torch.ones_like(d)), conditions)
            mean, slope = forward_ad.unpack_dual(answer)
        with torch.no_grad():
            x = noise - align(d, noise) * mean
            v = mean if slope is None else mean + align(d, noise) * slope
    with torch.no_grad():
        t = 1 - start
        if confident > 0:
            asked = t.clamp(min=confident)
            u = teacher.velocity(noised(x, t, asked, normal(x.shape, randomness, like=x)), asked, conditions)
        else:
            u = teacher.velocity(x, t, conditions)
            if prediction.steps and prediction.solver == "heun":
                u = _heun(teacher, x, u, t, end - start, conditions)
        difference = v - u
        square = difference.square().flatten(1).mean(1)
        weighted = difference * align((square + WEIGHT_EPS) ** -prediction.power, difference)
    return Alignment(_pulled(mean, weighted), weighted, square.sqrt())


def correct(
    flow_map: FlowMap,
    auxiliary: VelocityField,
    teacher: VelocityField,
    noise: Tensor,
    law: Times,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
) -> Alignment:
    """The correction objective (Eq. 17) from noise z `[B, ...]`; auxiliary and teacher are asked without a graph."""
    mean, _, x_r, r = _noised_samples(flow_map, noise, law, conditions, randomness)
    with torch.no_grad():
        difference = auxiliary.velocity(x_r, r, conditions) - teacher.velocity(x_r, r, conditions)
    return Alignment(_pulled(mean, difference), difference, difference.square().flatten(1).mean(1).sqrt())


def noising_loss(
    auxiliary: VelocityField,
    flow_map: FlowMap,
    noise: Tensor,
    law: Times,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
) -> Tensor:
    """The auxiliary network's loss `[B]` (Eq. 12) on samples of the student, which is asked without a graph."""
    with torch.no_grad():
        mean, n, x_r, r = _noised_samples(flow_map, noise, law, conditions, randomness)
    error = n - (noise - mean) - auxiliary.velocity(x_r, r, conditions)
    return error.square().flatten(1).mean(1) / 2


def balance(
    alpha: float,
    predicted: Tensor,
    corrected: Tensor,
    mean: Callable[[Tensor], Tensor] = lambda values: values,
) -> Tensor:
    """λ = α E‖Δ_G‖/(E‖Δ_N‖ + ε) (section 5.1) of the differences `[B, ...]`, weighted as they pull.

    mean: over all processes that have a part of the batch.
    """
    sizes = [value.square().flatten(1).mean(1).sqrt() for value in (predicted, corrected)]
    counts = [float(len(size)) for size in sizes]
    totals = mean(torch.stack([*(size.sum() for size in sizes), *sizes[0].new_tensor(counts)]))
    means = totals[:2] / totals[2:]
    return alpha * means[0] / (means[1] + BALANCE_EPS)


def noised(x_t: Tensor, t: Tensor, t_c: Tensor, n: Tensor) -> Tensor:
    """x_t `[B, ...]` brought from t up to t_c, both `[B]`, by noise n; as it is where t_c <= t (A.1)."""
    share = (1 - t_c) / (1 - t).clamp(min=torch.finfo(t.dtype).tiny)
    spread = (t_c.square() - (share * t).square()).clamp(min=0).sqrt()
    return torch.where(align(t_c > t, x_t), align(share, x_t) * x_t + align(spread, x_t) * n, x_t)


def _heun(
    teacher: VelocityField, x: Tensor, u: Tensor, t: Tensor, step: Tensor, conditions: Conditions | None
) -> Tensor:
    """The mean of u here and at the end of an Euler step; u itself where that ends at 0, where there is no field."""
    end = t - step
    inside = end > step / 2
    there = teacher.velocity(x - align(step, x) * u, torch.where(inside, end, t), conditions)
    return torch.where(align(inside, x), (u + there) / 2, u)


def _noised_samples(
    flow_map: FlowMap, noise: Tensor, law: Times, conditions: Conditions | None, randomness: Randomness
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F(z, 1) with its graph; and n, x_r, r without one."""
    mean = flow_map(noise, noise.new_ones(len(noise)), conditions)
    r = law.draw(len(noise), randomness, like=noise).clamp(min=LEAST)
    n = normal(noise.shape, randomness, like=noise)
    return mean, n, diffuse(noise - mean.detach(), n, r), r


def _pulled(mean: Tensor, difference: Tensor) -> Tensor:
    """½ ‖F - sg(F - Δ)‖² `[B]`: its gradient for F is Δ, over the number of elements."""
    return (mean - (mean.detach() - difference)).square().flatten(1).mean(1) / 2
