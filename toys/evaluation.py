"""How a toy student compares with the exact teacher, from the same noises and on the same raw-time grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.guidance import Conditioned
from pitools.metrics import (
    class_diversity,
    diversity,
    endpoint_rmse,
    energy_distance,
    mode_report,
    same_mode_rate,
    sliced_wasserstein,
)
from pitools.objectives.rivals import TwoTimes, jump
from pitools.path import segments, shift_time, substep_grid
from pitools.rollout import visit
from pitools.sampling import sample
from pitools.training import keyed_generator
from pitools.types import Conditions, Schedule
from toys.network import ToyFlowMap, ToyStudent, one_step
from toys.targets import Target

ENERGY_POINTS = 4000
PATH_POINTS = 1000
EVALUATION_SEED = 2026


@dataclass
class Evaluation:
    """Fixed noises, data and conditions, and the teacher's answers to them on each grid it was asked for.

    Nothing here depends on the seed of a run, so that runs compare; `seed` is that of the noises and data themselves.
    """

    target: Target
    noise: Tensor
    data: Tensor
    conditions: Conditions | None
    seed: int = EVALUATION_SEED

    def __post_init__(self) -> None:
        self._answers: dict[tuple[float | str, ...], Tensor] = {}

    @classmethod
    def prepare(cls, target: Target, count: int, device: torch.device, seed: int = EVALUATION_SEED) -> Evaluation:
        """`count` noises and as many data points, class by class in turn where the target has classes."""
        # Drawn on the CPU: the same on every device.
        noise = torch.randn(count, *target.shape, generator=keyed_generator(seed, "noise"))
        host = target.to(torch.device("cpu"))
        data = host.sample(count, keyed_generator(seed, "data"), host.labels(count, noise.device))
        return cls(target, noise.to(device), data.to(device), target.labels(count, device), seed)

    @torch.no_grad()
    def teacher(self, schedule: Schedule, nfe: int) -> Tensor:
        """The teacher's end points, Euler on the substeps that a student of `nfe` segments takes."""
        stops = self._stops(schedule, nfe)
        key = tuple(substep_grid(torch.tensor(1.0), stops, 1 / 128, schedule.shift).times.tolist())
        if key not in self._answers:
            field = Conditioned(self.target, self.conditions)
            self._answers[key] = visit(field, self.noise, 1.0, stops, shift=schedule.shift)[-1]
        return self._answers[key]

    def teacher_steps(self, schedule: Schedule, nfe: int) -> int:
        """How many steps the teacher takes on that grid."""
        return len(substep_grid(torch.tensor(1.0), self._stops(schedule, nfe), 1 / 128, schedule.shift).times) - 1

    def _stops(self, schedule: Schedule, nfe: int) -> Tensor:
        raw = segments(nfe, schedule.final_step_scale)[1:]
        return torch.tensor([shift_time(boundary, schedule.shift) for boundary in raw])

    def student(self, student: ToyStudent | ToyFlowMap, nfe: int) -> Tensor:
        """The student's end points in `nfe` network evaluations; a flow map takes one."""
        if isinstance(student, ToyFlowMap):
            return one_step(student, self.noise, self.conditions)
        return sample(student, self.noise, nfe, self.conditions)

    def metrics(self, points: Tensor, teacher: Tensor) -> dict[str, float]:
        """What the target defines, of end points `[S, *shape]` beside the teacher's from the same noises."""
        x, reference, data = points.flatten(1), teacher.flatten(1), self.data.flatten(1)
        result: dict[str, float] = {}
        if self.target.modes is not None:
            modes = self.target.modes
            report = mode_report(x, modes.means, modes.std)
            result["same_mode"] = same_mode_rate(report.nearest, mode_report(reference, modes.means, modes.std).nearest)
            result["off_mode"] = report.off_mode
            result["modes_covered"] = report.covered
            result["spread"] = report.spread
        if self.target.classes and self.conditions is not None:
            result["class_accuracy"] = self._class_accuracy(x, self.conditions["class_labels"])
        projections = keyed_generator(self.seed, "projections", device=x.device)
        result["sliced_wasserstein"] = sliced_wasserstein(x, data, generator=projections)
        result["energy_distance"] = energy_distance(x[:ENERGY_POINTS], data[:ENERGY_POINTS])
        result["endpoint_rmse"] = endpoint_rmse(x, reference)
        result["diversity"] = self._diversity(x, reference)
        return result

    @torch.no_grad()
    def path_errors(self, network: TwoTimes, deltas: Sequence[float]) -> list[float]:
        """E‖f(z, δ) - φ(z, 1, 1 - δ)‖/E‖φ‖ of a flow map at each δ in (0, 1], rising (FreeFlow, Fig. 4).

        φ is the teacher's own path, by RK4 in 128 steps. It comes near z again half-way, so that φ - z is no measure.
        """
        noise = self.noise[:PATH_POINTS]
        conditions = {name: value[:PATH_POINTS] for name, value in (self.conditions or {}).items()} or None
        stops = 1 - torch.tensor(deltas)
        key: tuple[float | str, ...] = ("path", *deltas)
        if key not in self._answers:
            self._answers[key] = visit(Conditioned(self.target, conditions), noise, 1.0, stops, "rk4", 1 / 128)
        exact = self._answers[key]
        one, errors = noise.new_ones(len(noise)), []
        for s, state in zip(stops.tolist(), exact, strict=True):
            found = jump(network, noise, one, s * one, conditions)
            away, size = (z.flatten(1).norm(dim=1).mean() for z in (found - state, state))
            errors.append(float(away / size))
        return errors

    def _diversity(self, x: Tensor, reference: Tensor) -> float:
        """Over the teacher's; within classes where there are any."""
        if self.conditions is None:
            return diversity(x[:ENERGY_POINTS], reference[:ENERGY_POINTS])
        labels = self.conditions["class_labels"]
        return class_diversity(x, labels) / class_diversity(reference, labels)

    def _class_accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The share of samples whose nearest data point is of the class that was asked for."""
        nearest = torch.stack([torch.cdist(x, prior.means).amin(1) for prior in self.target.priors], dim=1)
        return float((nearest.argmin(1) == labels).double().mean())
