"""Students of the toys that many measurements share: each is trained once, and kept in a folder.

A student's file is named by a hash of its settings and of torch's version, so that a command that was stopped goes on
where it was, and several processes may work in one folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pitools.metrics import sliced_wasserstein
from pitools.path import align, as_time
from pitools.policies import DXHead, GMHead, Head, PolynomialHead
from pitools.training import DivergenceError, keyed_generator
from pitools.types import Conditions, Schedule, Time
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.flow_maps import FlowMapTraining, train
from toys.network import ToyFlowMap, ToyStudent
from toys.targets import Target, load_target

HEADS: Mapping[str, Callable[[int], Head]] = {"gm": GMHead, "dx": DXHead, "polynomial": PolynomialHead}
TO_TEACHER = "teacher_distance"
"""The metric of `Lab.metrics` that is the sliced Wasserstein distance to the teacher's samples from the same noises."""
ERRORS = (TO_TEACHER, "sliced_wasserstein", "energy_distance", "endpoint_rmse", "off_mode", "spread")
CODE = 1
"""Raised where a student of the same settings would come out differently."""
ON_PATH = 4.0
"""Deviations of the nearest component's noised Gaussian within which a state is on the path of `Weak`."""


@dataclass(frozen=True)
class Weak(Target):
    """A teacher that answers well on its own paths alone: off them, the denoised state fades to the data's mean.

    A stand-in for a guidance-distilled teacher, which has no guidance to pull a state back (paper, section 5.1 and
    B.2). For targets without classes.
    """

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """c u + (1 - c)(x_t - x̄)/t, with c = 1 within four deviations of a component and falling beyond."""
        prior, time = self.priors[0], as_time("t", t, x_t).expand(len(x_t))
        t_ = align(time, x_t)
        std = ((1 - time) ** 2 * prior.variance.mean() + time**2).sqrt()
        gaps = torch.cdist(x_t / (1 - t_).clamp(min=1e-6), prior.means).amin(1) * (1 - time) / std
        c = align(torch.exp(-(gaps - ON_PATH).clamp(min=0)), x_t)
        return c * super().velocity(x_t, t, conditions) + (1 - c) * (x_t - prior.mean()) / t_


@dataclass(frozen=True)
class Blurred(Target):
    """The same teacher, beside data that is not its own: points are moved by `blur` standard deviations of 1."""

    blur: float = 0.0

    def sample(self, count: int, generator: torch.Generator, conditions: Conditions | None = None) -> Tensor:
        """`count` points of the data set."""
        x = super().sample(count, generator, conditions)
        return x + self.blur * torch.randn(x.shape, generator=generator, device=x.device)


@dataclass(frozen=True)
class Source:
    """A target by its name, and what is changed in its teacher or its data."""

    name: str
    weak: bool = False
    blur: float = 0.0

    def __post_init__(self) -> None:
        if self.weak and self.blur:
            raise ValueError("a source is either weak or blurred")

    def load(self) -> Target:
        """The target. `ValueError` for an unknown name."""
        target = load_target(self.name)
        if self.weak:
            target = Weak(**vars(target))
        if self.blur:
            target = Blurred(**vars(target), blur=self.blur)
        return target


@dataclass(frozen=True)
class OfPolicy:
    """A student with a policy. size: K, N or coefficients.  width: of its network."""

    source: Source
    policy: str
    size: int
    nfe: int
    training: Training
    seed: int
    width: int = 128


@dataclass(frozen=True)
class OfFlowMap:
    """A flow map."""

    source: Source
    method: str
    training: FlowMapTraining
    seed: int
    width: int = 128


@dataclass
class Lab:
    """folder: where students are kept.  samples: of an evaluation, by its target's dimensions."""

    folder: Path
    samples: Mapping[int, int]
    _evaluations: dict[Source, Evaluation] = field(default_factory=dict, init=False)
    _metrics: dict[OfPolicy | OfFlowMap, dict[str, float]] = field(default_factory=dict, init=False)

    def evaluation(self, source: Source) -> Evaluation:
        """Fixed noises and data of a target as it is, and the answers of the teacher that `source` names."""
        source = Source(source.name, source.weak)
        if source not in self._evaluations:
            target = source.load()
            count = self.samples[len(target.shape)]
            self._evaluations[source] = Evaluation.prepare(target, count, torch.device("cpu"))
        return self._evaluations[source]

    def metrics(self, run: OfPolicy | OfFlowMap) -> dict[str, float]:
        """A student's, in the evaluations that it was trained for, and its distance to the teacher, `TO_TEACHER`.

        Where its training diverged, errors are infinite, and rates and diversity 0.
        """
        if run not in self._metrics:
            self._metrics[run] = self._measured(run)
        return self._metrics[run]

    def _measured(self, run: OfPolicy | OfFlowMap) -> dict[str, float]:
        evaluation, nfe = self.evaluation(run.source), run.nfe if isinstance(run, OfPolicy) else 1
        schedule = Schedule(nfe=nfe, shift=evaluation.target.shift)
        reference = evaluation.teacher(schedule, nfe)
        try:
            student = self.student(run)
            points = evaluation.student(student, nfe)
        except DivergenceError:
            names = (*evaluation.metrics(reference, reference), TO_TEACHER)
            return {name: math.inf if name in ERRORS else 0.0 for name in names}
        projections = keyed_generator(evaluation.seed, "projections")
        apart = sliced_wasserstein(points.flatten(1), reference.flatten(1), generator=projections)
        return {**evaluation.metrics(points, reference), TO_TEACHER: apart}

    def numbers(self, of: object, measure: Callable[[], Sequence[float]]) -> list[float]:
        """What `measure` answers, kept under the name that `repr(of)` gives it."""
        path = self.folder / f"{_name(of)}.json"
        if not path.exists():
            text = json.dumps({"of": repr(of), "numbers": list(measure())}, indent=1)
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))
        numbers: list[float] = json.loads(path.read_text(encoding="utf-8"))["numbers"]
        return numbers

    @overload
    def student(self, run: OfPolicy) -> ToyStudent: ...

    @overload
    def student(self, run: OfFlowMap) -> ToyFlowMap: ...

    def student(self, run: OfPolicy | OfFlowMap) -> ToyStudent | ToyFlowMap:
        """With its averaged weights, trained or read. Raises `DivergenceError` where it diverged, now or before."""
        network, target = untrained(run), run.source.load()
        path = self.folder / f"{_name(run)}.safetensors"
        told = path.with_suffix(".json")
        if told.exists() and (reason := json.loads(told.read_text(encoding="utf-8"))["diverged"]) is not None:
            raise DivergenceError(reason)
        if not told.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            reason = None
            try:
                if isinstance(network, ToyStudent) and isinstance(run, OfPolicy):
                    outcome = distill(network, target, [run.nfe], run.training, run.seed)
                elif isinstance(network, ToyFlowMap) and isinstance(run, OfFlowMap):
                    outcome = train(run.method, network, target, run.training, run.seed)
                outcome.ema.copy_to(network)
                _write(path, lambda file: save_file(network.state_dict(), file))
            except DivergenceError as error:
                reason = str(error)
            text = json.dumps({"run": repr(run), "diverged": reason}, indent=1)
            _write(told, lambda file: file.write_text(text + "\n", encoding="utf-8"))
            if reason is not None:
                raise DivergenceError(reason)
        network.load_state_dict(load_file(path))
        return network.eval().requires_grad_(False)


@overload
def untrained(run: OfPolicy) -> ToyStudent: ...


@overload
def untrained(run: OfFlowMap) -> ToyFlowMap: ...


def untrained(run: OfPolicy | OfFlowMap) -> ToyStudent | ToyFlowMap:
    """The network of a student, with its first weights."""
    target = run.source.load()
    if isinstance(run, OfFlowMap):
        generator = keyed_generator(run.seed, "init flow map")
        return ToyFlowMap(target.shape, target.classes, width=run.width, generator=generator)
    return ToyStudent(
        HEADS[run.policy](run.size),
        Schedule(nfe=run.nfe, shift=target.shift),
        target.factorisation,
        target.shape,
        target.classes,
        run.width,
        scale=target.scale,
        generator=keyed_generator(run.seed, f"init {run.policy}"),
    )


def _name(of: object) -> str:
    return hashlib.sha256(repr((CODE, torch.__version__, of)).encode()).hexdigest()[:20]


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Whole or not at all, whoever else writes it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    os.replace(temporary, path)
