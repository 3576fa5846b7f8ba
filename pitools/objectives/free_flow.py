"""One optimiser step of FreeFlow (Tong et al. 2025, section 5.1 and A.3): prediction and correction on one batch.

    L = E_predict + λ E_correct,    λ = α E‖Δ_G‖/(E‖Δ_N‖ + ε),
    α = α_ref clip((n - T_delay)/T_warmup, 0, 1) / √max(n/T_decay, 1)

The batch is split between the two; both terms are means over the whole of it, so that at α = 0.3 and a split of
75 : 25 the correction's gradient is a tenth of the prediction's. Guidance strengths are drawn from an interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform
from pitools.objectives.flow_map import Prediction, Times, balance, correct, noising_loss, predict
from pitools.types import Conditions, FlowMap, VelocityField


@dataclass(frozen=True)
class FreeFlow:
    """A recipe's [objective] (FreeFlow, Table 6).

    share: of the batch that predicts; at 1 there is no correction, at 0 nothing else (VSD, or distribution matching).
    r: the law of the correction's times, and of its auxiliary network's.  alpha: α_ref.  delay, correction_warmup,
    decay: T_delay, T_warmup and T_decay in steps; a decay of 0 is none.  guidance: the ends of the interval that γ is
    drawn from, None for no such condition.
    Raises `ValueError` for a value out of range.
    """

    prediction: Prediction = field(default_factory=Prediction)
    share: float = 0.75
    r: Times = field(default_factory=lambda: Times(0.8, 1.6))
    alpha: float = 0.3
    delay: int = 10_000
    correction_warmup: int = 10_000
    decay: int = 0
    guidance: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in [0, 1], got {self.share}")
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha must be a number of at least 0, got {self.alpha}")
        for name in ("delay", "correction_warmup", "decay"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be a whole number of at least 0, got {getattr(self, name)}")
        if self.guidance is not None and not 0 <= self.guidance[0] <= self.guidance[1] < math.inf:
            raise ValueError(f"guidance must be an interval of numbers of at least 0, got {self.guidance}")

    def alpha_at(self, step: int) -> float:
        """α at optimiser step `step`, from 0."""
        past = step - self.delay
        ramp = min(max(past / self.correction_warmup, 0.0), 1.0) if self.correction_warmup else float(past >= 0)
        falling = math.sqrt(max(step / self.decay, 1)) if self.decay else 1.0
        return self.alpha * ramp / falling

    def confident_at(self, step: int) -> float:
        """t_c at optimiser step `step`: from 1 along a line to 0."""
        return max(1 - step / self.prediction.warmup, 0.0) if self.prediction.warmup else 0.0


@dataclass(frozen=True)
class FreeFlowLosses:
    """student: 0-d, with the student's graph.  auxiliary: 0-d, with that of the auxiliary network, None where nothing
    corrects.  predicted, corrected: root mean squares of Δ_G and Δ_N, means over their parts of the batch, else NaN."""

    student: Tensor
    auxiliary: Tensor | None
    predicted: float
    corrected: float


def free_flow_losses(
    objective: FreeFlow,
    flow_map: FlowMap,
    auxiliary: VelocityField | None,
    teacher: VelocityField,
    noise: Tensor,
    step: int,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
    corrector: VelocityField | None = None,
) -> FreeFlowLosses:
    """The losses of optimiser step `step` on noise `[B, ...]`, whose first part predicts and whose rest corrects.

    corrector: the teacher of the correction, where guidance acts in an interval of its own; else `teacher`.
    Raises `ValueError` where the correction has no auxiliary network.
    """
    batch = len(noise)
    cut = round(objective.share * batch)
    if cut < batch and auxiliary is None:
        raise ValueError("the correction needs an auxiliary network")
    conditions = dict(conditions or {})
    if objective.guidance is not None:
        low, high = objective.guidance
        conditions["guidance"] = low + (high - low) * uniform([batch], randomness, like=noise)
    first, rest = (_part(conditions, part, batch) for part in (slice(0, cut), slice(cut, batch)))
    its, others = _split(randomness, cut)
    loss, missing = noise.new_zeros(()), math.nan
    predicted, corrected, weight = missing, missing, torch.as_tensor(1.0)
    alpha = objective.alpha_at(step) if cut else 1.0
    if cut:
        aligned = predict(
            flow_map, teacher, noise[:cut], objective.prediction, first, objective.confident_at(step), its
        )
        loss, predicted = aligned.loss.sum() / batch, float(aligned.error.mean())
    auxiliary_loss = None
    if cut < batch and auxiliary is not None:
        auxiliary_loss = noising_loss(auxiliary, flow_map, noise[cut:], objective.r, rest, others).mean()
        if alpha > 0:
            corrector = corrector or teacher
            found = correct(flow_map, auxiliary, corrector, noise[cut:], objective.r, rest, others)
            weight = balance(alpha, aligned.difference, found.difference) if cut else weight
            loss, corrected = loss + weight * found.loss.sum() / batch, float(found.error.mean())
    return FreeFlowLosses(loss, auxiliary_loss, predicted, corrected)


def _part(conditions: Conditions, part: slice, batch: int) -> Conditions:
    """The conditions of a part of the batch."""
    return {
        name: value[part] if isinstance(value, (Tensor, list)) and len(value) == batch else value
        for name, value in conditions.items()
    }


def _split(randomness: Randomness, cut: int) -> tuple[Randomness, Randomness]:
    if randomness is None or isinstance(randomness, torch.Generator):
        return randomness, randomness
    return randomness[:cut], randomness[cut:]
