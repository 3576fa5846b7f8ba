"""One optimiser step of FreeFlow (Tong et al. 2025, section 5.1 and A.3): prediction and correction on one batch.

    L = E_predict + λ E_correct,    λ = α E‖Δ_G‖/(E‖Δ_N‖ + ε),
    α = α_ref clip((n - T_delay)/T_warmup, 0, 1) / √max(n/T_decay, 1)

The batch is split between the two, by the place of a sample in it; both terms are means over the whole of it, so that
at α = 0.3 and a split of 75 : 25 the correction's gradient is a tenth of the prediction's. The auxiliary network is
trained on the samples of those that correct. Guidance strengths are drawn from an interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform
from pitools.objectives.flow_map import Prediction, Times, balance, correct, noising_loss, predict
from pitools.types import Conditions, FlowMap, VelocityField, rows_of


@dataclass(frozen=True)
class FreeFlow:
    """A recipe's [objective] (FreeFlow, Table 6).

    share: of the batch that predicts; at 1 there is no correction, at 0 nothing else (VSD, or distribution matching).
    r: the law of the correction's times, and of its auxiliary network's.  alpha: α_ref.  delay, correction_warmup,
    decay: T_delay, T_warmup and T_decay in steps; a decay of 0 is none.  guidance: the ends of the interval that γ is
    drawn from, None for no such condition.  guided_until: the largest t at which guidance acts in the correction (the
    paper's guidance interval, Table 1c), whatever the teacher's own; None for that.
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
    guided_until: float | None = None

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
        if self.guided_until is not None and not 0 <= self.guided_until <= 1:
            raise ValueError(f"guided_until must lie in [0, 1], got {self.guided_until}")

    def split(self, rows: range) -> tuple[list[int], list[int]]:
        """Which of these rows of a step's batch predict, and which correct, as positions among them.

        A row's part depends on its place in the batch alone, and any few rows in succession have about the share.
        """
        # Rows 0, 1, 2, ... bring the count of those that predict to the whole part of share, 2 share, 3 share, ...
        whole = [math.floor(self.share * count + 1e-9) for count in range(rows.start, rows.stop + 1)]
        steps = [after > before for before, after in pairwise(whole)]
        return [i for i, each in enumerate(steps) if each], [i for i, each in enumerate(steps) if not each]

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
class FreeFlowLoss:
    """loss: 0-d, with the student's graph.  predicted, corrected: 0-d, ½ Δ_G² and ½ Δ_N² without a graph, sums over
    their parts of these samples over how many those should be, so that the mean over processes is the mean over the
    batch; NaN for a part that there is not."""

    loss: Tensor
    predicted: Tensor
    corrected: Tensor


def free_flow_loss(
    objective: FreeFlow,
    flow_map: FlowMap,
    auxiliary: VelocityField | None,
    teacher: VelocityField,
    noise: Tensor,
    step: int,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
    corrector: VelocityField | None = None,
    rows: range | None = None,
    mean: Callable[[Tensor], Tensor] = lambda values: values,
) -> FreeFlowLoss:
    """The student's loss of optimiser step `step` on noise `[B, ...]`.

    corrector: the teacher of the correction, where guidance acts in an interval of its own; else `teacher`.
    rows: which of the batch these samples are, 0 to B - 1 unless told.  mean: over all processes, for λ.
    Raises `ValueError` where the correction has no auxiliary network.
    """
    batch = len(noise)
    predicting, correcting = objective.split(rows or range(batch))
    alpha = objective.alpha_at(step) if predicting else 1.0
    if correcting and auxiliary is None:
        raise ValueError("the correction needs an auxiliary network")
    conditions = _with_strengths(objective, noise, conditions, randomness)
    loss, missing = noise.new_zeros(()), noise.new_full((), math.nan)
    first, second = None, None
    if predicting:
        given, its = rows_of(conditions, predicting, batch), _own(randomness, predicting)
        confident = objective.confident_at(step)
        first = predict(flow_map, teacher, noise[predicting], objective.prediction, given, confident, its)
        loss = loss + first.loss.sum() / batch
    if correcting and auxiliary is not None and alpha > 0:
        given, its = rows_of(conditions, correcting, batch), _own(randomness, correcting)
        second = correct(flow_map, auxiliary, corrector or teacher, noise[correcting], objective.r, given, its)
        weight = balance(alpha, first.difference, second.difference, mean) if first is not None else 1.0
        loss = loss + weight * second.loss.sum() / batch
    expected = batch * objective.share, batch * (1 - objective.share)
    errors = [
        missing if part is None else part.error.square().sum() / (2 * count)
        for part, count in zip((first, second), expected, strict=True)
    ]
    return FreeFlowLoss(loss, *errors)


def auxiliary_loss(
    objective: FreeFlow,
    auxiliary: VelocityField,
    flow_map: FlowMap,
    noise: Tensor,
    conditions: Conditions | None = None,
    randomness: Randomness = None,
    rows: range | None = None,
) -> Tensor:
    """The auxiliary network's loss, 0-d, on the student's samples from those of noise `[B, ...]` that correct."""
    batch = len(noise)
    _, correcting = objective.split(rows or range(batch))
    conditions = rows_of(_with_strengths(objective, noise, conditions, randomness), correcting, batch)
    its = _own(randomness, correcting)
    found = noising_loss(auxiliary, flow_map, noise[correcting], objective.r, conditions, its)
    return found.sum() / (batch * (1 - objective.share))


def _with_strengths(
    objective: FreeFlow, noise: Tensor, conditions: Conditions | None, randomness: Randomness
) -> Conditions:
    """The conditions with γ drawn, where the objective has an interval of it."""
    if objective.guidance is None:
        return conditions or {}
    low, high = objective.guidance
    return {**(conditions or {}), "guidance": low + (high - low) * uniform([len(noise)], randomness, like=noise)}


def _own(randomness: Randomness, rows: list[int]) -> Randomness:
    if randomness is None or isinstance(randomness, torch.Generator):
        return randomness
    return [randomness[row] for row in rows]
