"""Training runs that compare: each method's settings, what they cost, and a ledger of what came of them.

Every method trains a network of one size on as many noises a step and may ask the teacher as often; the number of its
steps follows from what they cost. Progressive distillation, which soon asks no more, stops at one answer a noise.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from pitools.objectives.flow_map import Prediction, Times
from pitools.objectives.free_flow import FreeFlow
from pitools.policies import DXHead, GMHead
from pitools.training import DivergenceError, keyed_generator
from pitools.types import Schedule
from toys.distill import Training, distill
from toys.evaluation import EVALUATION_SEED, Evaluation
from toys.experiment import IMAGES, PLANE, Defaults
from toys.flow_maps import FlowMapTraining, auxiliary_errors, train
from toys.network import ToyFlowMap, ToyStudent
from toys.targets import load_target

TRIO = ("prediction", "dmd", "freeflow")
FLOW_MAPS = (*TRIO, "meanflow", "consistency", "progressive", "regression")
POLICIES = ("pi-id gm", "pi-id dx", "cloning gm")
METHODS = (*FLOW_MAPS, *POLICIES)

EVALUATION_SEEDS: Mapping[str, int] = {"search": 1, "report": EVALUATION_SEED}
SAMPLES: Mapping[int, int] = {1: 20_000, 3: 1000}
"""Noises, and data points, of an evaluation, by the dimensions of a latent."""
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
DELTAS = tuple((index + 1) / 16 for index in range(16))


@dataclass(frozen=True)
class Setting:
    """One method's settings, in the paper's symbols.

    N, solver, k: of the prediction.  alpha, share: α_ref and the share of the batch that predicts.  r_mean, r_std: of
    the correction's times.  updates, auxiliary_rate: of the auxiliary network.  delay: T_delay as a share of all steps.
    """

    learning_rate: float = 2e-3
    N: int = 16
    solver: Literal["euler", "heun"] = "heun"
    k: float = 0.0
    alpha: float = 1.0
    share: float = 0.75
    r_mean: float = -0.8
    r_std: float = 1.2
    updates: int = 2
    auxiliary_rate: float = 2e-3
    delay: float = 0.25
    width: int = 128
    batch: int = 512


def start(target: str, method: str = "freeflow") -> Setting:
    """Where a search sets out; of what is not searched for, the rate of `pitools toy`. Targets differ in the batch."""
    defaults = defaults_of(target)
    setting = replace(Setting(), batch=128 if defaults is IMAGES else 512)
    if method in TRIO:
        return setting
    rates = defaults.training if method in POLICIES else defaults.flow_maps
    return replace(setting, learning_rate=rates.learning_rate)


def default_calls(target: str) -> int:
    """How often a method may ask the teacher: as 1,000 steps of two answers a noise do, 500 of the slower digits'."""
    steps = 500 if defaults_of(target) is IMAGES else 1000
    return 2 * steps * start(target).batch


@dataclass(frozen=True)
class Job:
    """One training run.

    purpose: search or report, whose evaluations have noises and data of their own.  calls: the most that the teacher
    may be asked, each sample counted.
    """

    purpose: str
    target: str
    method: str
    setting: Setting
    seed: int
    calls: int


@dataclass(frozen=True)
class Found:
    """What a job came to.  seconds: of training, the processor's, which on one thread is the wall time whatever else
    runs.  path_errors: at each of `DELTAS`, of a flow map.  auxiliary_errors: at each of `LEVELS`, of an auxiliary
    network at the end, where there are no classes."""

    job: Job
    steps: int
    teacher_calls: int
    seconds: float
    metrics: Mapping[str, float]
    path_errors: Sequence[float]
    auxiliary_errors: Sequence[float] = ()


class Ledger:
    """What is done, a line of JSON for each job: a command that was stopped goes on where it was."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):  # stopped while it was written
            path.write_text("".join(lines[:-1]), encoding="utf-8")
            del lines[-1]
        self.done = {found.job: found for found in map(_read, lines)}

    def result(self, job: Job, on_step: Callable[[int, int], None] = lambda step, steps: None) -> Found:
        """What is written of the job, or else what now comes of it. on_step: told the step and of how many."""
        if job not in self.done:
            found = execute(job, on_step)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found)) + "\n")
            self.done[job] = found
        return self.done[job]


def _read(line: str) -> Found:
    found: dict[str, Any] = json.loads(line)
    for name in ("path_errors", "auxiliary_errors"):
        found[name] = tuple(found.get(name, ()))
    job = found.pop("job")
    return Found(Job(**job | {"setting": Setting(**job["setting"])}), **found)


def execute(job: Job, on_step: Callable[[int, int], None] = lambda step, steps: None) -> Found:
    """Train and evaluate. Raises `ValueError` for too few calls, and `DivergenceError` where a loss is not finite;
    for a search, all distances are then infinite."""
    try:
        return _execute(job, on_step)
    except DivergenceError:
        if job.purpose != "search":
            raise
        return Found(job, 0, 0, 0.0, {"sliced_wasserstein": math.inf}, ())


def _execute(job: Job, on_step: Callable[[int, int], None]) -> Found:
    evaluation, begun = _evaluation(job.target, job.purpose), time.process_time()
    target, method, setting = evaluation.target, job.method, job.setting
    generator = keyed_generator(job.seed, f"init {method if method in POLICIES else 'flow map'}")
    schedule = Schedule(nfe=1, shift=target.shift)
    student: ToyStudent | ToyFlowMap
    if method in POLICIES:
        defaults = defaults_of(job.target)
        head = GMHead(defaults.components) if method.endswith("gm") else DXHead(10)
        student = ToyStudent(
            head,
            schedule,
            target.factorisation,
            target.shape,
            target.classes,
            setting.width,
            scale=target.scale,
            generator=generator,
        )
        policy = policy_training(method, setting, job.calls, defaults.training)
        steps = policy.steps
        outcome = distill(student, target, [1], policy, job.seed, lambda step, _: on_step(step, steps))
    else:
        student = ToyFlowMap(target.shape, target.classes, width=setting.width, generator=generator)
        training = flow_map_training(method, setting, job.calls)
        steps = training.steps
        outcome = train(method, student, target, training, job.seed, lambda step, _: on_step(step, steps))
    seconds = round(time.process_time() - begun, 2)
    wrong: list[float] = []
    if isinstance(outcome.auxiliary, ToyFlowMap) and isinstance(student, ToyFlowMap) and not target.classes:
        wrong = auxiliary_errors(outcome.auxiliary, student, target, LEVELS, keyed_generator(job.seed, "levels"))
    outcome.ema.copy_to(student)
    student.eval().requires_grad_(False)
    metrics = evaluation.metrics(evaluation.student(student, 1), evaluation.teacher(schedule, 1))
    errors = evaluation.path_errors(student, DELTAS) if isinstance(student, ToyFlowMap) else []
    return Found(job, steps, outcome.teacher_calls, seconds, metrics, tuple(errors), tuple(wrong))


def teacher_metrics(target: str, purpose: str = "report") -> dict[str, float]:
    """The exact teacher's own, with 128 Euler steps."""
    evaluation = _evaluation(target, purpose)
    reference = evaluation.teacher(Schedule(shift=evaluation.target.shift), 1)
    return evaluation.metrics(reference, reference)


def flow_map_training(method: str, setting: Setting, calls: int) -> FlowMapTraining:
    """As many steps as `calls` allow. Raises `ValueError` for calls that are not enough for one."""
    batch, teacher_steps = setting.batch, 32
    steps = calls // batch
    if method in TRIO:
        share = {"prediction": 1.0, "dmd": 0.0}.get(method, setting.share)

        def cost(steps: int) -> int:
            return _asked(replace(_objective(setting, steps), share=share), batch, steps)

        # During T_delay the part of the batch that corrects asks nothing.
        steps = bisect_right(range(4 * steps + 1), calls, key=cost) - 1
    elif method == "regression":
        steps = calls // (batch * teacher_steps)
    _check(steps, method, calls)
    return FlowMapTraining(
        steps=steps,
        batch=batch,
        learning_rate=setting.learning_rate,
        free_flow=_objective(setting, steps),
        teacher_steps=teacher_steps,
        auxiliary_rate=setting.auxiliary_rate,
        auxiliary_updates=setting.updates,
    )


def policy_training(method: str, setting: Setting, calls: int, defaults: Training) -> Training:
    """As many steps as `calls` allow: π-ID asks about a few states of each noise, cloning about its whole path."""
    clone = method.startswith("cloning")
    asked = round(1 / defaults.objective.step_size) if clone else defaults.objective.states
    steps = calls // (setting.batch * asked)
    _check(steps, method, calls)
    return replace(defaults, steps=steps, batch=setting.batch, learning_rate=setting.learning_rate, clone=clone)


def _check(steps: int, method: str, calls: int) -> None:
    if steps < 1:
        raise ValueError(f"{calls} calls of the teacher are not enough for one step of {method}; allow more")


def _objective(setting: Setting, steps: int) -> FreeFlow:
    """With the confident region's warmup in the first tenth, and α's in an eighth from its delay on."""
    return FreeFlow(
        Prediction(setting.N, setting.solver, power=setting.k, warmup=steps // 10),
        share=setting.share,
        r=Times(setting.r_mean, setting.r_std),
        alpha=setting.alpha,
        delay=round(setting.delay * steps),
        correction_warmup=steps // 8,
    )


def _asked(objective: FreeFlow, batch: int, steps: int) -> int:
    """How often the teacher is asked in all steps."""
    predicting = round(objective.share * batch)
    correcting, twice = batch - predicting, objective.prediction.steps > 0 and objective.prediction.solver == "heun"
    total = 0
    for step in range(steps):
        total += predicting * (2 if twice and objective.confident_at(step) == 0 else 1)
        total += correcting if objective.alpha_at(step) > 0 or not predicting else 0
    return total


def defaults_of(target: str) -> Defaults:
    """What `pitools toy` takes for that kind of target."""
    return PLANE if len(load_target(target).shape) == 1 else IMAGES


@lru_cache
def _evaluation(target: str, purpose: str) -> Evaluation:
    loaded = load_target(target)
    return Evaluation.prepare(loaded, SAMPLES[len(loaded.shape)], torch.device("cpu"), EVALUATION_SEEDS[purpose])
