"""The papers' claims at the scale of a laptop, a function for each: what is compared, and where the numbers should lie.

Teachers are exact, networks small MLPs, and training short, so that a claim which does not hold here need not be wrong
at the papers' scale. Ratios are of the students of one seed, which set out from the same weights where their outputs
are the same. Distances of policies are to the teacher's samples from the same noises, as is the papers'
teacher-referenced FID: to data, where a policy can hold the teacher's field, all are at the floor of two draws. Those
of flow maps are to data, as their settings were searched for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform
from pitools.guidance import Conditioned
from pitools.metrics import endpoint_rmse
from pitools.objectives.flow_map import Times
from pitools.path import shift_time
from pitools.rollout import integrate, velocity, visit
from pitools.sampling import sample
from pitools.training import EMA, DivergenceError, keyed_generator
from pitools.types import Conditions, Factorisation, Policy, Schedule, Student, Tempered, Time
from toys.digits import load_classifier
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.evidence import Check, Claim, Ratio
from toys.flow_maps import FlowMapTraining, train
from toys.jobs import default_calls, defaults_of, flow_map_training, start
from toys.lab import TO_TEACHER, Lab, OfFlowMap, OfPolicy, Source, untrained
from toys.network import ToyFlowMap, ToyStudent, one_step
from toys.rivals import SHIPPED, Best, read_settings

TO_DATA, RMSE = "sliced_wasserstein", "endpoint_rmse"
WORDS = {TO_DATA: "SW to data", TO_TEACHER: "SW to the teacher", RMSE: "RMSE"}
BOTH = (TO_TEACHER, RMSE)
WINDOWS = {10: 10 / 128, 20: 5 / 128, 40: 3 / 128}
"""Of DX, by N, at 1 NFE (π-Flow, Table 8)."""
SHORT = 3 / 128
"""Window at 4 NFE (π-Flow, Table 9)."""


@dataclass(frozen=True)
class Size:
    """How long students train, and on how many seeds.

    policies, maps: targets. No policy of K = 8 can hold the teacher of the first; settings of flow maps are known for
    the second.  plane, images: steps and batch.  calls: of the teacher, over those that `pitools rivals` allows.
    samples: of an evaluation, in the plane and of images.
    """

    seeds: Sequence[int]
    policies: Sequence[str]
    maps: Sequence[str]
    plane: tuple[int, int]
    images: tuple[int, int]
    calls: float
    samples: tuple[int, int]


FULL = Size(
    range(200, 205),
    ("spiral", "grid25", "digits"),
    ("grid25", "ring8", "digits"),
    plane=(1000, 512),
    images=(500, 128),
    calls=1.0,
    samples=(10_000, 1000),
)
QUICK = Size(
    range(200, 203), ("spiral",), ("ring8",), plane=(150, 256), images=(60, 64), calls=0.1, samples=(2000, 200)
)


@dataclass(frozen=True)
class Bench:
    """Students and measurements of one size, kept in a folder."""

    folder: Path
    size: Size

    @cached_property
    def lab(self) -> Lab:
        plane, images = self.size.samples
        return Lab(self.folder, {1: plane, 3: images})

    @cached_property
    def best(self) -> Best:
        """What `pitools rivals search` chose for FreeFlow and its halves."""
        return read_settings(SHIPPED, self.size.maps)

    @property
    def seeds(self) -> Sequence[int]:
        """One student each."""
        return self.size.seeds

    def policy(
        self,
        target: str | Source,
        seed: int,
        policy: str,
        size: int,
        nfe: int = 1,
        clone: bool = False,
        batches: float = 1.0,
        **objective: float,
    ) -> OfPolicy:
        """A student of π-ID, or of cloning; `objective` changes its objective, `batches` the size of its batch."""
        source = Source(target) if isinstance(target, str) else target
        defaults, in_plane = defaults_of(source.name), len(source.load().shape) == 1
        steps, batch = self.size.plane if in_plane else self.size.images
        # In the paper's substeps: the toy's own are longer than a window.
        changes: dict[str, Any] = {"step_size": 1 / 128, **objective}
        training = Training(
            steps,
            round(batches * batch),
            defaults.training.learning_rate,
            replace(defaults.training.objective, **changes),
            clone,
        )
        return OfPolicy(source, policy, size, nfe, training, seed)

    def gm(self, target: str | Source, seed: int, K: int = 8, **more: Any) -> OfPolicy:
        """A student with a Gaussian mixture; `more` as of `policy`."""
        return self.policy(target, seed, "gm", K, **more)

    def dx(self, target: str | Source, seed: int, N: int = 10, **more: Any) -> OfPolicy:
        """A student with a grid of N denoised states, and Table 8's window at 1 NFE unless told otherwise."""
        return self.policy(target, seed, "dx", N, **{"window": WINDOWS[N], **more})

    def flow_map(self, target: str, seed: int, method: str, **changes: Any) -> OfFlowMap:
        """A flow map with the settings that the search chose, but for `changes`, at the calls of all."""
        setting = replace(self.best[target].get(method, start(target, method)), **changes)
        calls = round(self.size.calls * default_calls(target))
        return OfFlowMap(Source(target), method, flow_map_training(method, setting, calls), seed, setting.width)

    def metric(self, run: OfPolicy | OfFlowMap, key: str) -> float:
        """A metric of a student."""
        return self.lab.metrics(run)[key]

    def measured(self, run: OfPolicy | OfFlowMap, measure: Callable[[Any], float]) -> float:
        """What `measure` answers of a student; infinity where that diverged."""
        try:
            return measure(self.lab.student(run))
        except DivergenceError:
            return math.inf

    def over(
        self, key: str, one: Callable[[int], OfPolicy | OfFlowMap], other: Callable[[int], OfPolicy | OfFlowMap]
    ) -> list[float]:
        """A metric of one student over that of the other, for each seed."""
        return [_ratio(self.metric(one(seed), key), self.metric(other(seed), key)) for seed in self.seeds]

    def evaluation(self, target: str) -> Evaluation:
        """Fixed noises and data of a target."""
        return self.lab.evaluation(Source(target))


def _ratio(one: float, other: float) -> float:
    return one / other if other > 0 else math.nan


def _ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [_ratio(*pair) for pair in zip(one, other, strict=True)]


def _less(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


# π-Flow


def gm_beats_dx(b: Bench) -> Sequence[Check]:
    """A GM policy beats a DX policy.

    DX has the best of four at 1 NFE: N = 10, 20 and 40 with the paper's windows, which it needs at the paper's scale,
    and N = 10 without, as a window follows a teacher of fewer steps than the one compared with.
    """
    checks = list[Check]()
    for target in b.size.policies:
        for key in BOTH:
            dx = [
                min(
                    *(b.metric(b.dx(target, seed, N), key) for N in WINDOWS),
                    b.metric(b.dx(target, seed, window=0), key),
                )
                for seed in b.seeds
            ]
            gm = [b.metric(b.gm(target, seed), key) for seed in b.seeds]
            says = f"{target}, 1 NFE: {WORDS[key]} of the best DX over that of GM, K = 8"
            checks.append(Ratio(says, _ratios(dx, gm), at_least=1))
            four: dict[str, Any] = {"nfe": 4, "window": SHORT}
            says = f"{target}, 4 NFE: {WORDS[key]} of DX, N = 10, over that of GM, K = 8"
            checks.append(
                Ratio(says, b.over(key, partial(b.dx, target, **four), partial(b.gm, target, **four)), at_least=1)
            )
    return checks


def dx_is_sensitive_to_its_size(b: Bench) -> Sequence[Check]:
    """DX is sensitive to its number of grid points N, and GM less to its number of components K."""
    checks = list[Check]()
    for target in b.size.policies:

        def spread(runs: Sequence[OfPolicy]) -> float:
            found = [b.metric(run, RMSE) for run in runs]
            return math.log(max(found) / min(found)) if math.isfinite(max(found)) else math.inf

        dx = [spread([b.dx(target, seed, N) for N in (10, 40)]) for seed in b.seeds]
        gm = [spread([b.gm(target, seed, K) for K in (8, 32)]) for seed in b.seeds]
        says = f"{target}, 1 NFE: log(worse RMSE over better)"
        checks.append(Check(f"{says} of DX, N = 10 and 40", dx))
        checks.append(Check(f"{says} of GM, K = 8 and 32", gm))
        checks.append(Check(f"{says} of DX less that of GM", _less(dx, gm), at_least=0))
    return checks


def gm_withstands_a_push(b: Bench) -> Sequence[Check]:
    """GM is robust to perturbed states, and DX is not.

    A state half-way (in raw time) is pushed, and policy and teacher both go on from there: what is measured is how much
    the push changes the difference of their end points, not that difference itself.
    """
    checks = list[Check]()
    for target in b.size.policies:
        evaluation = b.evaluation(target)
        for size in (0.1, 0.3):
            harm = partial(_pushed, evaluation, size=size * evaluation.target.scale)
            dx = [b.measured(b.dx(target, seed), harm) for seed in b.seeds]
            gm = [b.measured(b.gm(target, seed), harm) for seed in b.seeds]
            says = (
                f"{target}: what a push of {size:g} widths of the data adds to the error, DX (N = 10) over GM (K = 8)"
            )
            checks.append(Ratio(says, _ratios(dx, gm), at_least=1))
    return checks


@torch.no_grad()
def _pushed(evaluation: Evaluation, student: ToyStudent, size: float) -> float:
    noise, given, shift = evaluation.noise, evaluation.conditions, student.schedule.shift
    policy, teacher = student(noise, 1.0, given), Conditioned(evaluation.target, given)
    pack, unpack = student.factorisation.pack, student.factorisation.unpack
    half = shift_time(0.5, shift)

    def wrong(x: Tensor) -> Tensor:
        end = unpack(integrate(policy, pack(x), half, 0.0, shift=shift), x.shape)
        return end - integrate(teacher, x, half, 0.0, shift=shift)

    x = unpack(integrate(policy, pack(noise), 1.0, half, shift=shift), noise.shape)
    push = size * torch.randn(x.shape, generator=keyed_generator(evaluation.seed, "push"))
    return endpoint_rmse(wrong(x + push), wrong(x))


def dropout_helps(b: Bench) -> Sequence[Check]:
    """GM dropout helps."""
    return [
        Ratio(
            f"{target}, 1 NFE: {WORDS[key]} of GM, K = 8, without dropout over that with a rate of 0.05",
            b.over(key, partial(b.gm, target), partial(b.gm, target, dropout=0.05)),
            at_least=1,
        )
        for target in b.size.policies
        for key in BOTH
    ]


@dataclass(frozen=True)
class AtTemperature:
    """A student whose policies are all tempered, the last step's too."""

    student: ToyStudent
    temperature: float

    @property
    def schedule(self) -> Schedule:
        return self.student.schedule

    @property
    def factorisation(self) -> Factorisation:
        return self.student.factorisation

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        """The student's policy at this temperature."""
        policy = self.student(x_src, t_src, conditions)
        assert isinstance(policy, Tempered)
        return policy.tempered(self.temperature)


def temperature_helps(b: Bench) -> Sequence[Check]:
    """A low temperature helps at 4 NFE, and hurts on the last step."""
    checks = list[Check]()
    for target in b.size.policies:
        evaluation = b.evaluation(target)

        def error(student: Student, temperature: float, evaluation: Evaluation = evaluation) -> float:
            x = sample(student, evaluation.noise, 4, evaluation.conditions, temperature=temperature)
            return endpoint_rmse(x, evaluation.teacher(student.schedule, 4))

        runs = [b.gm(target, seed, nfe=4, window=SHORT, dropout=0.1) for seed in b.seeds]
        none = [b.measured(run, partial(error, temperature=1.0)) for run in runs]
        but_last = [b.measured(run, partial(error, temperature=0.3)) for run in runs]
        every = [b.measured(run, lambda student: error(AtTemperature(student, 0.3), 1.0)) for run in runs]
        says = f"{target}, 4 NFE: RMSE of GM, K = 8,"
        checks.append(
            Ratio(f"{says} at T = 1 over that at 0.3 on all steps but the last", _ratios(none, but_last), at_least=1)
        )
        checks.append(
            Ratio(f"{says} at T = 0.3 on all steps over that on all but the last", _ratios(every, but_last), at_least=1)
        )
    return checks


def window_helps(b: Bench) -> Sequence[Check]:
    """The micro-window helps, DX more than GM."""
    checks = list[Check]()
    for target in b.size.policies:
        gains = {}
        for name, make in (("GM, K = 8", b.gm), ("DX, N = 10", b.dx)):
            without, with_it = (partial(make, target, nfe=4, window=window) for window in (0.0, SHORT))
            gains[name] = b.over(RMSE, without, with_it)
            says = f"{target}, 4 NFE: RMSE of {name}, without a window over that with Δτ = 3/128"
            checks.append(Ratio(says, gains[name], at_least=1))
        gm, dx = gains.values()
        checks.append(Ratio(f"{target}, 4 NFE: the ratio of DX over that of GM", _ratios(dx, gm), at_least=1))
    return checks


def on_policy_beats_cloning(b: Bench) -> Sequence[Check]:
    """Training on the student's own trajectories beats training on the teacher's.

    Both ask the teacher about 16 states of each noise: of its own path in 16 Euler steps, or at random times of the
    student's roll-out in as many.
    """
    checks = list[Check]()
    for target in b.size.policies:
        for name, make in (("GM, K = 8", b.gm), ("DX, N = 10", b.dx)):
            own = partial(make, target, step_size=1 / 16, states=16, window=0.0, batches=0.25)
            for key in BOTH:
                says = f"{target}, 1 NFE, {name}: {WORDS[key]} on the teacher's trajectories over that on the student's"
                checks.append(Ratio(says, b.over(key, partial(own, clone=True), own), at_least=1))
    return checks


SUBSTEPS = (8, 16, 32, 64)


def on_policy_errors_add_up(b: Bench) -> Sequence[Check]:
    """On-policy, errors of n substeps add up as O(nε); those of cloning may grow as O(n²ε).

    ε is the RMS velocity error of a substep times its length, along the student's own path, or for cloning along the
    teacher's. The bounds allow the error at the end to be n ε on the first, n² ε on the second, up to constants.
    """
    target = b.size.policies[0]
    growth: dict[bool, list[float]] = {False: [], True: []}
    for clone, found in growth.items():
        for seed in b.seeds:
            amplified = [
                b.measured(
                    b.gm(target, seed, clone=clone, step_size=1 / n),
                    partial(_amplified, b.evaluation(target), n=n, clone=clone),
                )
                for n in SUBSTEPS
            ]
            found.append(_exponent(SUBSTEPS, amplified))
    says = f"{target}, GM, K = 8: exponent of n in the error at the end over n ε, n = 8 to 64"
    return [
        Check(f"{says}, on-policy", growth[False], at_most=0.25),
        Check(f"{says}, of cloning less on-policy", _less(growth[True], growth[False]), at_least=0),
    ]


@torch.no_grad()
def _amplified(evaluation: Evaluation, student: ToyStudent, n: int, clone: bool) -> float:
    """RMS error of the end over the sum of those of n Euler steps; in the plane, whose times are not shifted."""
    noise, pack, unpack = evaluation.noise, student.factorisation.pack, student.factorisation.unpack
    policy, stops = student(noise, 1.0), torch.linspace(1, 0, n + 1)[1:]
    own = [unpack(x, noise.shape) for x in visit(policy, pack(noise), 1.0, stops, step_size=1 / n)]
    true = visit(evaluation.target, noise, 1.0, stops, step_size=1 / n)
    total, path = 0.0, [noise, *(true if clone else own)]
    for index, x in enumerate(path[:-1]):
        t = 1 - index / n
        u = unpack(velocity(policy, pack(x), t), x.shape)
        total += endpoint_rmse(u, evaluation.target.velocity(x, t)) / n
    return endpoint_rmse(own[-1], true[-1]) / total


def _exponent(n: Sequence[float], values: Sequence[float]) -> float:
    """Of n in a power law through the values, by least squares of logarithms."""
    x, y = torch.tensor(n).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def data_free_is_as_good(b: Bench) -> Sequence[Check]:
    """Data-free and data-dependent training come to nearly the same.

    With as many answers of the teacher: four segments of each noise, or one of four times as many data points.
    """
    return [
        Ratio(
            f"{target}, 4 NFE, GM, K = 8: {WORDS[key]} without data over that with",
            b.over(key, partial(b.gm, target, nfe=4), partial(b.gm, target, nfe=4, data_free=False, batches=4)),
            at_least=0.9,
            at_most=1.1,
        )
        for target in b.size.policies
        for key in BOTH
    ]


def mismatch_hurts_who_reads_data(b: Bench) -> Sequence[Check]:
    """Data that is not the teacher's own hurts a flow map that reads it, and what reads none is unharmed.

    Data points are moved by noise of deviation 0.5. π-ID from data is not of the claim, and told beside it.
    """
    target = b.size.maps[0]
    other = Source(target, blur=0.5)

    def mean_flow(source: Source, seed: int) -> OfFlowMap:
        return replace(b.flow_map(target, seed, "meanflow"), source=source)

    def read(source: Source, seed: int) -> OfPolicy:
        return b.gm(source, seed, nfe=4, data_free=False, batches=4)

    own = Source(target)
    says = f"{target}: SW to data of MeanFlow from other data over that from the teacher's own"
    free = f"{target}, 4 NFE, GM, K = 8: SW to the teacher without data over that from other data"
    told = f"{target}, 4 NFE, GM, K = 8: SW to the teacher from other data over that from the teacher's own"
    return [
        Ratio(says, b.over(TO_DATA, partial(mean_flow, other), partial(mean_flow, own)), at_least=1),
        Ratio(free, b.over(TO_TEACHER, partial(b.gm, target, nfe=4), partial(read, other)), at_most=1),
        Ratio(told, b.over(TO_TEACHER, partial(read, other), partial(read, own))),
    ]


def mixing_helps_a_weak_teacher(b: Bench) -> Sequence[Check]:
    """Trajectory mixing helps with a teacher that is weak off its path."""
    target, steps = b.size.policies[0], b.size.plane[0]
    checks = list[Check]()
    for weak in (True, False):
        make = partial(b.gm, Source(target, weak=weak), nfe=4, states=4)
        mixed = partial(make, teacher_ratio=1.0, decay_steps=2 * steps // 3)
        kind = "a teacher that is weak off its path" if weak else "the exact teacher"
        for key in BOTH:
            says = f"{target}, 4 NFE, {kind}: {WORDS[key]} on-policy over that with trajectory mixing"
            checks.append(Ratio(says, b.over(key, make, mixed), at_least=1 if weak else None))
    return checks


def diversity_survives(b: Bench) -> Sequence[Check]:
    """Diversity survives where distribution matching collapses."""
    checks = list[Check]()
    for target in b.size.maps:
        own = [b.metric(b.gm(target, seed, nfe=4, window=SHORT), "diversity") for seed in b.seeds]
        matched = [b.metric(b.flow_map(target, seed, "dmd"), "diversity") for seed in b.seeds]
        says = f"{target}: diversity, the teacher's being 1, of π-ID (GM, K = 8, 4 NFE)"
        checks.append(Check(says, own, at_least=0.9))
        checks.append(Check(f"{says} less that of distribution matching (1 NFE)", _less(own, matched), at_least=0))
    return checks


def substeps_have_diminishing_returns(b: Bench) -> Sequence[Check]:
    """More substeps help, with diminishing returns."""
    checks = list[Check]()
    for target in b.size.policies:
        evaluation = b.evaluation(target)
        given, shift = evaluation.conditions, evaluation.target.shift
        with torch.no_grad():
            fine = integrate(Conditioned(evaluation.target, given), evaluation.noise, 1.0, 0.0, "rk4", shift=shift)
        errors = {
            n: [b.measured(b.gm(target, seed), partial(_apart, evaluation, fine, n)) for seed in b.seeds]
            for n in (4, 8, 64, 128)
        }
        says = f"{target}, GM, K = 8, 1 NFE: RMSE to a fine path of the teacher with"
        checks.append(Ratio(f"{says} 4 substeps over that with 128", _ratios(errors[4], errors[128]), at_least=1))
        early, late = _less(errors[4], errors[8]), _less(errors[64], errors[128])
        says = f"{target}, GM, K = 8, 1 NFE: what doubling 4 substeps gains in RMSE, less what doubling 64 does"
        checks.append(Check(says, _less(early, late), at_least=0))
    return checks


def _apart(evaluation: Evaluation, fine: Tensor, n: int, student: ToyStudent) -> float:
    return endpoint_rmse(sample(student, evaluation.noise, 1, evaluation.conditions, step_size=1 / n), fine)


def convergence_is_smooth(b: Bench) -> Sequence[Check]:
    """Convergence is smooth."""
    target, climbs = b.size.maps[0], dict[str, list[float]]()
    for name, make in (("π-ID (GM, K = 8)", b.gm), ("dmd", partial(b.flow_map, method="dmd"))):
        climbs[name] = []
        for seed in b.seeds:
            run = make(target, seed)
            curve = b.lab.numbers(("curve", b.size.samples, run), partial(_curve, b, run))
            moves = [after - before for before, after in pairwise(curve)]
            climbs[name].append(sum(max(move, 0.0) for move in moves) / sum(map(abs, moves)) if moves else math.inf)
    own, matched = climbs.values()
    says = f"{target}: share of upward moves in SW to data, over ten times of training,"
    return [
        Check(f"{says} of π-ID (GM, K = 8)", own, at_most=0.1),
        Check(f"{says} of distribution matching less that", _less(matched, own), at_least=0),
    ]


def _curve(b: Bench, run: OfPolicy | OfFlowMap) -> list[float]:
    """SW to data of the averaged weights at ten times of a training; nothing where it diverges."""
    network, found = untrained(run), list[float]()
    evaluation, target, steps = b.lab.evaluation(run.source), run.source.load(), run.training.steps
    average, shown = EMA(network, run.training.ema_gamma), untrained(run).eval().requires_grad_(False)

    def on_step(step: int, loss: float) -> None:
        average.update(network)
        if step * 10 // steps > (step - 1) * 10 // steps:
            average.copy_to(shown)
            points = evaluation.student(shown, 1)
            found.append(evaluation.metrics(points, points)[TO_DATA])

    try:
        if isinstance(run, OfPolicy) and isinstance(network, ToyStudent):
            distill(network, target, [run.nfe], run.training, run.seed, on_step)
        elif isinstance(run, OfFlowMap) and isinstance(network, ToyFlowMap):
            train(run.method, network, target, run.training, run.seed, on_step)
    except DivergenceError:
        return []
    return found


# FreeFlow


def prediction_and_correction_help_each_other(b: Bench) -> Sequence[Check]:
    """Prediction and correction together beat each alone."""
    return [
        Ratio(
            f"{target}: SW to data of {name} alone over that of both",
            b.over(TO_DATA, partial(b.flow_map, target, method=half), partial(b.flow_map, target, method="freeflow")),
            at_least=1,
        )
        for target in b.size.maps
        for half, name in (("prediction", "prediction"), ("dmd", "correction"))
    ]


def prediction_errors_accumulate(b: Bench) -> Sequence[Check]:
    """Prediction's errors accumulate from noise to data.

    Its path sets out from the noise itself: an error of its mean velocity that is the same at all δ doubles from δ = ½
    to 1. Errors that accumulate do more.
    """
    checks = list[Check]()
    for target in b.size.maps:
        growth = partial(_growth, b.evaluation(target))
        values = [b.measured(b.flow_map(target, seed, "prediction"), growth) for seed in b.seeds]
        says = f"{target}: prediction's relative error at δ = 1 over twice that at δ = ½"
        checks.append(Ratio(says, values, at_least=1))
    return checks


def _growth(evaluation: Evaluation, network: ToyFlowMap) -> float:
    half, whole = evaluation.path_errors(network, (0.5, 1.0))
    return whole / (2 * half)


def alpha_hardly_matters(b: Bench) -> Sequence[Check]:
    """Both together are robust across α."""
    target, alphas = b.size.maps[0], (0.3, 0.6, 1.5, 3.0)
    found = [
        [b.metric(b.flow_map(target, seed, "freeflow", alpha=alpha), TO_DATA) for seed in b.seeds] for alpha in alphas
    ]
    middle = [math.exp(mean(map(math.log, values))) for values in zip(*found, strict=True)]
    checks: list[Check] = [
        Ratio(f"{target}: SW to data at α = {alpha:g} over the mean of all α", _ratios(own, middle), 0.8, 1.25)
        for alpha, own in zip(alphas, found, strict=True)
    ]
    alone = [b.metric(b.flow_map(target, seed, "dmd"), TO_DATA) for seed in b.seeds]
    checks.append(
        Ratio(f"{target}: that of correction alone over the mean of all α", _ratios(alone, middle), at_least=1)
    )
    return checks


def correction_makes_steps_and_solver_unimportant(b: Bench) -> Sequence[Check]:
    """With the correction, the number of steps N and the solver matter less.

    All take as many optimiser steps as Heun's, whose teacher is asked twice.
    """
    target = b.size.maps[0]

    def spread(method: str, seed: int) -> float:
        run, found = b.flow_map(target, seed, method, solver="heun"), list[float]()
        for N in (4, 8, 16, 32):
            for solver in ("euler", "heun"):
                prediction = replace(run.training.free_flow.prediction, steps=N, solver=solver)
                found.append(b.metric(replace(run, training=_with(run.training, prediction=prediction)), TO_DATA))
        return math.log(max(found) / min(found)) if math.isfinite(max(found)) else math.inf

    alone, both = ([spread(method, seed) for seed in b.seeds] for method in ("prediction", "freeflow"))
    says = f"{target}: log(worst SW to data over best), N = 4 to 32 and either solver,"
    return [
        Check(f"{says} of prediction alone", alone),
        Check(f"{says} of both", both),
        Check(f"{says} of prediction alone less that of both", _less(alone, both), at_least=0),
    ]


def high_noise_matters_to_the_correction(b: Bench) -> Sequence[Check]:
    """The correction needs high noise levels r.

    Learning rates are those that a search found with a law of r of its own.
    """
    target = b.size.maps[0]
    high, low = (partial(b.flow_map, target, method="dmd", r_mean=at, r_std=1.6) for at in (0.8, -0.4))
    says = f"{target}, correction alone: SW to data with r from LogitNormal(-0.4, 1.6) over that from (0.8, 1.6)"
    checks: list[Check] = [Ratio(says, b.over(TO_DATA, low, high), at_least=1)]

    def up_to(most: float, seed: int) -> OfFlowMap:
        run = b.flow_map(target, seed, "dmd")
        return replace(run, training=_with(run.training, r=UpTo(most=most)))

    for most in (0.6, 0.8):
        says = f"{target}, correction alone: SW to data with r uniform in [0, {most:g}] over that in [0, 1]"
        checks.append(Ratio(says, b.over(TO_DATA, partial(up_to, most), partial(up_to, 1.0)), at_least=1))
    return checks


@dataclass(frozen=True)
class UpTo(Times):
    """Uniform times in [0, most)."""

    most: float = 1.0

    def draw(self, count: int, randomness: Randomness, like: Tensor) -> Tensor:
        """`[count]`."""
        return self.most * uniform([count], randomness, like)


def _with(training: FlowMapTraining, **changes: Any) -> FlowMapTraining:
    return replace(training, free_flow=replace(training.free_flow, **changes))


def strong_decay_helps_both_together(b: Bench) -> Sequence[Check]:
    """With both, a strong decay of large differences (k = 1) is better.

    Each k has the best of three α, as the search that chose the other settings varied k, too.
    """
    target = b.size.maps[0]

    def best(k: float, seed: int) -> float:
        return min(b.metric(b.flow_map(target, seed, "freeflow", k=k, alpha=a), TO_DATA) for a in (0.3, 1.0, 3.0))

    without, strong = ([best(k, seed) for seed in b.seeds] for k in (0.0, 1.0))
    return [Ratio(f"{target}: SW to data of both, k = 0 over k = 1", _ratios(without, strong), at_least=1)]


def some_steps_start_at_the_noise(b: Bench) -> Sequence[Check]:
    """Some predictions should start at δ = 0."""

    def never(target: str, seed: int) -> OfFlowMap:
        run = b.flow_map(target, seed, "prediction")
        prediction = run.training.free_flow.prediction
        prediction = replace(prediction, delta=replace(prediction.delta, at_zero=0.0))
        return replace(run, training=_with(run.training, prediction=prediction))

    return [
        Ratio(
            f"{target}, prediction alone: SW to data with δ from LogitNormal(0, 1) over that with one in ten set to 0",
            b.over(TO_DATA, partial(never, target), partial(b.flow_map, target, method="prediction")),
            at_least=1,
        )
        for target in b.size.maps
    ]


def the_auxiliary_network_learns_faster(b: Bench) -> Sequence[Check]:
    """The auxiliary network should learn faster than the student.

    One update each. Both have half of the student's searched rate, so that 10/3 of it does not diverge; the auxiliary
    network's is constant, and the student's falls.
    """
    checks = list[Check]()
    for target in b.size.maps:
        rate = b.best[target]["dmd"].learning_rate / 2
        slow, fast = (
            partial(b.flow_map, target, method="dmd", learning_rate=rate, auxiliary_rate=factor * rate, updates=1)
            for factor in (1, 10 / 3)
        )
        says = f"{target}, correction alone: SW to data with g at the student's rate over that at 10/3 of it"
        checks.append(Ratio(says, b.over(TO_DATA, slow, fast), at_least=1))
    return checks


def searched_noises_are_good_for_the_teacher(b: Bench) -> Sequence[Check]:
    """Noises that a student finds best are good for its teacher, too; less so with the correction alone.

    The score is the log-probability that a classifier gives the class asked for. The exact teacher draws digits of the
    data set, most of which the classifier has seen: there is little to gain.
    """
    evaluation, classifier = b.evaluation("digits"), load_classifier()
    target, given = evaluation.target, evaluation.conditions or {}

    def scores(x: Tensor) -> Tensor:
        logits: Tensor = classifier(x.float())
        return logits.log_softmax(1).gather(1, given["class_labels"].unsqueeze(1)).squeeze(1)

    def answered(noise: Tensor) -> float:
        return float(scores(integrate(Conditioned(target, given), noise, 1.0, 0.0, shift=target.shift)).mean())

    @torch.no_grad()
    def gain(network: ToyFlowMap, seed: int) -> float:
        noises = torch.randn(8, *evaluation.noise.shape, generator=keyed_generator(seed, "search"))
        found = torch.stack([scores(one_step(network, noise, given)) for noise in noises])
        chosen = noises[found.argmax(0), torch.arange(len(evaluation.noise))]
        return answered(chosen) - answered(noises[0])

    both, alone = (
        [b.measured(b.flow_map("digits", seed, method), partial(gain, seed=seed)) for seed in b.seeds]
        for method in ("freeflow", "dmd")
    )
    says = "digits: the teacher's score from the best of 8 noises less that from the first, chosen by"
    return [
        Check(f"{says} FreeFlow", both, at_least=0),
        Check(f"{says} FreeFlow less that by correction alone", _less(both, alone), at_least=0),
    ]


CLAIMS: Sequence[Claim] = (
    Claim("gm-beats-dx", "π-Flow, Tables 1 and 5", gm_beats_dx),
    Claim("sizes", "π-Flow, Table 1", dx_is_sensitive_to_its_size),
    Claim("push", "π-Flow, 3.1 and 3.2", gm_withstands_a_push),
    Claim("dropout", "π-Flow, Table 1", dropout_helps),
    Claim("temperature", "π-Flow, Table 7 and B.1", temperature_helps),
    Claim("window", "π-Flow, Table 7 and B.3", window_helps),
    Claim("on-policy", "the review's ablation", on_policy_beats_cloning),
    Claim("adding-up", "π-Flow, section 4", on_policy_errors_add_up),
    Claim("data-free", "π-Flow, Tables 3 and 4", data_free_is_as_good),
    Claim("mismatch", "FreeFlow, Fig. 2", mismatch_hurts_who_reads_data),
    Claim("mixing", "π-Flow, B.2", mixing_helps_a_weak_teacher),
    Claim("diversity", "π-Flow, Fig. 4 and Table 4", diversity_survives),
    Claim("substeps", "the review's ablation", substeps_have_diminishing_returns),
    Claim("smooth", "π-Flow, Fig. 7", convergence_is_smooth),
    Claim("synergy", "FreeFlow, Fig. 7 and Table 5", prediction_and_correction_help_each_other),
    Claim("accumulation", "FreeFlow, Fig. 4", prediction_errors_accumulate),
    Claim("alpha", "FreeFlow, Fig. 6", alpha_hardly_matters),
    Claim("steps-and-solver", "FreeFlow, Fig. 9", correction_makes_steps_and_solver_unimportant),
    Claim("high-noise", "FreeFlow, Tables 1a and 1b", high_noise_matters_to_the_correction),
    Claim("decay", "FreeFlow, Table 1d", strong_decay_helps_both_together),
    Claim("delta", "FreeFlow, Table 3", some_steps_start_at_the_noise),
    Claim("auxiliary-rate", "FreeFlow, Table 4", the_auxiliary_network_learns_faster),
    Claim("best-of-n", "FreeFlow, Fig. 8", searched_noises_are_good_for_the_teacher),
)
