"""The papers' claims at the scale of a laptop, a function for each: what is compared, and where the numbers should lie.

Teachers are exact, networks small MLPs, and training short, so that a claim which does not hold here need not be wrong
at the papers' scale; each is told with the reason that was found. Ratios are of one seed's two students, which share
their first weights where their outputs are the same, and their noises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from pitools.draws import Randomness, uniform
from pitools.guidance import Conditioned
from pitools.metrics import endpoint_rmse
from pitools.objectives.flow_map import Times
from pitools.rollout import integrate, velocity, visit
from pitools.sampling import best_of, sample
from pitools.training import EMA, keyed_generator
from pitools.types import Conditions, Factorisation, Policy, Schedule, Student, Tempered, Time
from toys.digits import load_classifier
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.evidence import Check, Claim, Ratio
from toys.flow_maps import FlowMapTraining, train
from toys.jobs import default_calls, defaults_of, flow_map_training, start
from toys.lab import Lab, OfFlowMap, OfPolicy, Source, untrained
from toys.network import ToyFlowMap, ToyStudent
from toys.rivals import SHIPPED, Best, read_settings

GRIDS, COMPONENTS = (10, 20, 40), (8, 16, 32)
WINDOWS = {10: 10 / 128, 20: 5 / 128, 40: 3 / 128}
"""Of DX, by N (π-Flow, Table 8)."""

WORDS = {"sliced_wasserstein": "SW", "endpoint_rmse": "RMSE", "diversity": "diversity"}
DELTAS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Size:
    """How long students train, and on how many seeds. plane, images: steps and batch.  calls: of the teacher, over
    those that `pitools rivals` allows.  samples: of an evaluation, by a latent's dimensions."""

    seeds: Sequence[int]
    targets: Sequence[str]
    plane: tuple[int, int]
    images: tuple[int, int]
    calls: float
    samples: tuple[int, int]


FULL = Size(range(200, 205), ("grid25", "ring8", "digits"), (1000, 512), (500, 128), 1.0, (10_000, 1000))
QUICK = Size(range(200, 203), ("ring8",), (150, 256), (60, 64), 0.1, (2000, 200))


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
        return read_settings(SHIPPED, self.size.targets)

    @property
    def plane(self) -> str:
        """The target of what is shown on one alone."""
        return self.size.targets[0]

    def gm(
        self, target: str | Source, seed: int, K: int = 32, nfe: int = 1, batches: float = 1.0, **objective: object
    ) -> OfPolicy:
        """A student of π-ID with a Gaussian mixture; `objective` changes its objective, `batches` its batch."""
        return self._policy(target, seed, "gm", K, nfe, batches, objective)

    def dx(self, target: str | Source, seed: int, N: int = 10, nfe: int = 1, **objective: object) -> OfPolicy:
        """A student of π-ID with a grid of N denoised states, with the paper's window unless told otherwise."""
        return self._policy(target, seed, "dx", N, nfe, 1.0, {"window": WINDOWS[N] / nfe, **objective})

    def _policy(
        self,
        target: str | Source,
        seed: int,
        policy: str,
        size: int,
        nfe: int,
        batches: float,
        changes: dict[str, object],
    ) -> OfPolicy:
        source = Source(target) if isinstance(target, str) else target
        defaults, in_plane = defaults_of(source.name), len(source.load().shape) == 1
        steps, batch = self.size.plane if in_plane else self.size.images
        clone = bool(changes.pop("clone", False))
        # In the paper's substeps: the toy's own are coarser than a window.
        objective = replace(defaults.training.objective, **{"step_size": 1 / 128, **changes})  # type: ignore[arg-type]
        training = Training(steps, round(batches * batch), defaults.training.learning_rate, objective, clone)
        return OfPolicy(source, policy, size, nfe, training, seed)

    def flow_map(self, target: str, seed: int, method: str, **changes: object) -> OfFlowMap:
        """A flow map with the settings that the search chose, but for `changes`, at the calls of all."""
        setting = self.best[target].get(method, start(target, method))
        setting = replace(setting, **changes)  # type: ignore[arg-type]
        calls = round(self.size.calls * default_calls(target))
        return OfFlowMap(Source(target), method, flow_map_training(method, setting, calls), seed, setting.width)

    def metric(self, run: OfPolicy | OfFlowMap, key: str) -> float:
        """A metric of a student."""
        return self.lab.metrics(run)[key]

    def over(
        self, key: str, one: Callable[[int], OfPolicy | OfFlowMap], other: Callable[[int], OfPolicy | OfFlowMap]
    ) -> list[float]:
        """A metric of one student over that of the other, for each seed."""
        return [self.metric(one(seed), key) / self.metric(other(seed), key) for seed in self.size.seeds]


# π-Flow


def gm_beats_dx(b: Bench) -> Sequence[Check]:
    """A GM policy beats a DX policy."""
    checks = list[Check]()
    for target in b.size.targets:
        for key in ("sliced_wasserstein", "endpoint_rmse"):
            values = [
                min(b.metric(b.dx(target, seed, N), key) for N in GRIDS) / b.metric(b.gm(target, seed, K=8), key)
                for seed in b.size.seeds
            ]
            checks.append(
                Ratio(f"{target}: {WORDS[key]} of the best DX (N = 10, 20, 40) over that of GM, K = 8", values, 1)
            )
    return checks


def dx_is_sensitive_to_its_size(b: Bench) -> Sequence[Check]:
    """DX is sensitive to its number of grid points N, GM is not to its number of components K."""
    checks = list[Check]()
    for target in b.size.targets:

        def spread(runs: Sequence[OfPolicy]) -> float:
            found = [b.metric(run, "endpoint_rmse") for run in runs]
            return math.log(max(found) / min(found)) if math.isfinite(max(found)) else math.inf

        dx = [spread([b.dx(target, seed, N) for N in GRIDS]) for seed in b.size.seeds]
        gm = [spread([b.gm(target, seed, K) for K in COMPONENTS]) for seed in b.size.seeds]
        says = f"{target}: log(worst RMSE over best)"
        checks.append(Check(f"{says} of GM, K = 8, 16, 32", gm, at_most=math.log(1.25)))
        checks.append(
            Check(
                f"{says} of DX, N = 10, 20, 40, less that of GM",
                [one - two for one, two in zip(dx, gm, strict=True)],
                0,
            )
        )
    return checks


def gm_withstands_a_push(b: Bench) -> Sequence[Check]:
    """GM is robust to perturbed states, and DX is not."""
    checks = list[Check]()
    for target in b.size.targets:
        evaluation = b.lab.evaluation(Source(target))
        for size in (0.1, 0.3):

            def harm(run: OfPolicy, size: float = size, evaluation: Evaluation = evaluation) -> float:
                return _pushed(evaluation, b.lab.student(run), size * evaluation.target.scale)

            values = [harm(b.dx(target, seed)) / harm(b.gm(target, seed, K=8)) for seed in b.size.seeds]
            says = (
                f"{target}: error at the end after a push of {size:g} data widths half-way, DX (N = 10) over GM (K = 8)"
            )
            checks.append(Ratio(says, values, 1))
    return checks


@torch.no_grad()
def _pushed(evaluation: Evaluation, student: ToyStudent, size: float) -> float:
    """RMS distance of the ends of policy and teacher from one pushed state at t = ½."""
    noise, given = evaluation.noise, evaluation.conditions
    policy, pack = student(noise, 1.0, given), student.factorisation.pack
    x = student.factorisation.unpack(integrate(policy, pack(noise), 1.0, 0.5), noise.shape)
    x = x + size * torch.randn(x.shape, generator=keyed_generator(evaluation.seed, "push"))
    end = student.factorisation.unpack(integrate(policy, pack(x), 0.5, 0.0), noise.shape)
    true = integrate(Conditioned(evaluation.target, given), x, 0.5, 0.0)
    return endpoint_rmse(end, true)


def dropout_helps(b: Bench) -> Sequence[Check]:
    """GM dropout helps."""
    return [
        Ratio(
            f"{target}: {WORDS[key]} without GM dropout over that with a rate of 0.05 (K = 32)",
            b.over(key, partial(b.gm, target), partial(b.gm, target, dropout=0.05)),
            1,
        )
        for target in b.size.targets
        for key in ("sliced_wasserstein", "endpoint_rmse")
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
    for target in b.size.targets:
        evaluation = b.lab.evaluation(Source(target))
        errors: dict[str, list[float]] = {"none": [], "but the last": [], "all": []}
        for seed in b.size.seeds:
            student = b.lab.student(b.gm(target, seed, nfe=4, dropout=0.1))
            reference = evaluation.teacher(student.schedule, 4)

            ways: Sequence[tuple[str, Student, float]] = (
                ("none", student, 1.0),
                ("but the last", student, 0.3),
                ("all", AtTemperature(student, 0.3), 1.0),
            )
            for way, tempered, temperature in ways:
                x = sample(tempered, evaluation.noise, 4, evaluation.conditions, temperature=temperature)
                errors[way].append(endpoint_rmse(x, reference))
        none, but_last, every = (errors[key] for key in errors)
        says = f"{target}, 4 NFE: RMSE"
        pairs = [one / two for one, two in zip(none, but_last, strict=True)]
        checks.append(Ratio(f"{says} at T = 1 over that at T = 0.3 on all steps but the last", pairs, 1))
        pairs = [one / two for one, two in zip(every, but_last, strict=True)]
        checks.append(Ratio(f"{says} at T = 0.3 on all steps over that on all but the last", pairs, 1))
    return checks


def window_helps(b: Bench) -> Sequence[Check]:
    """The micro-window helps, DX most of all."""
    return [
        Ratio(
            f"{target}: RMSE of {name} without the micro-window over that with it",
            b.over("endpoint_rmse", partial(make, window=0.0), make),
            1,
        )
        for target in b.size.targets
        for name, make in (
            ("GM (K = 8, 4 NFE, Δτ = 3/128)", partial(b.gm, target, K=8, nfe=4, window=3 / 128)),
            ("DX (N = 10, 1 NFE, Δτ = 10/128)", partial(b.dx, target)),
        )
    ]


def on_policy_beats_cloning(b: Bench) -> Sequence[Check]:
    """Training on the student's own trajectories beats training on the teacher's."""
    checks = list[Check]()
    for target in b.size.targets:
        for name, make in (("GM, K = 8", partial(b.gm, target, K=8)), ("DX, N = 10", partial(b.dx, target))):
            for key in ("sliced_wasserstein", "endpoint_rmse"):
                values = b.over(key, partial(make, clone=True, step_size=1 / 32), make)
                says = f"{target}, {name}: {WORDS[key]} on the teacher's trajectories over that on the student's own"
                checks.append(Ratio(says, values, 1))
    return checks


SUBSTEPS = (8, 16, 32, 64)


def on_policy_errors_add_up(b: Bench) -> Sequence[Check]:
    """On-policy, errors of n substeps add up as O(nε); those of cloning may grow as O(n²ε).

    ε is the RMS velocity error of a substep times its length, on the states that training saw: the student's own, or
    the teacher's. The bounds allow the error at the end to be n ε on the first, n² ε on the second, up to constants.
    """
    slopes: dict[bool, list[float]] = {False: [], True: []}
    evaluation = b.lab.evaluation(Source(b.plane))
    for clone, found in slopes.items():
        for seed in b.size.seeds:
            runs = [b.gm(b.plane, seed, K=8, clone=clone, step_size=1 / n) for n in SUBSTEPS]
            amplified = [
                _amplified(evaluation, b.lab.student(run), n, clone) for run, n in zip(runs, SUBSTEPS, strict=True)
            ]
            found.append(_slope(SUBSTEPS, amplified))
    says = f"{b.plane}, GM, K = 8: growth with n (exponent) of the end's error over n ε, n = 8 to 64"
    rest = [one - two for one, two in zip(slopes[True], slopes[False], strict=True)]
    return [
        Check(f"{says}, on its own trajectories", slopes[False], at_most=0.25),
        Check(f"{says}, on the teacher's, less that on its own", rest, 0),
    ]


@torch.no_grad()
def _amplified(evaluation: Evaluation, student: ToyStudent, n: int, clone: bool) -> float:
    """RMS error of the end over the sum of those of n Euler steps, along the path that training saw."""
    noise, given = evaluation.noise, evaluation.conditions
    teacher, shift = Conditioned(evaluation.target, given), student.schedule.shift
    pack, unpack = student.factorisation.pack, student.factorisation.unpack
    policy = student(noise, 1.0, given)
    stops = torch.linspace(1, 0, n + 1)[1:]
    own = visit(policy, pack(noise), 1.0, stops, step_size=1 / n, shift=shift)
    true = visit(teacher, noise, 1.0, stops, step_size=1 / n, shift=shift)
    total, x = 0.0, noise
    for index in range(n):
        t = 1 - index / n
        wrong = unpack(velocity(policy, pack(x), t), x.shape) - evaluation.target.velocity(x, t, given)
        total += float(wrong.square().mean().sqrt()) / n
        x = true[index] if clone else unpack(own[index], noise.shape)
    return float((unpack(own[-1], noise.shape) - true[-1]).square().mean().sqrt()) / total


def _slope(n: Sequence[float], values: Sequence[float]) -> float:
    x, y = torch.tensor(n).double().log(), torch.tensor(values).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


def data_free_is_as_good(b: Bench) -> Sequence[Check]:
    """Data-free and data-dependent training come to nearly the same.

    With as many answers of the teacher: four segments of each noise, or one of four times as many data points.
    """
    return [
        Ratio(
            f"{target}, 4 NFE, GM, K = 8: {WORDS[key]} data-free over that from data",
            b.over(
                key,
                partial(b.gm, target, K=8, nfe=4),
                partial(b.gm, target, K=8, nfe=4, data_free=False, batches=4),
            ),
            0.9,
            1.1,
        )
        for target in b.size.targets
        for key in ("sliced_wasserstein", "endpoint_rmse")
    ]


def mismatch_hurts_who_reads_data(b: Bench) -> Sequence[Check]:
    """Data that is not the teacher's own hurts training that reads it, and no other."""
    target, key = b.plane, "sliced_wasserstein"
    other = Source(target, blur=0.5)
    read = partial(b.gm, K=8, nfe=4, data_free=False, batches=4)

    def mean_flow(source: Source, seed: int) -> OfFlowMap:
        return replace(b.flow_map(target, seed, "meanflow"), source=source)

    return [
        Ratio(
            f"{target}, π-ID from data, 4 NFE: SW with data blurred by 0.5 over that with the teacher's own",
            b.over(key, partial(read, other), partial(read, target)),
            1,
        ),
        Ratio(
            f"{target}, MeanFlow: SW with data blurred by 0.5 over that with the teacher's own",
            b.over(key, partial(mean_flow, other), partial(mean_flow, Source(target))),
            1,
        ),
        Ratio(
            f"{target}, 4 NFE: SW of π-ID without data over that with the blurred data",
            b.over(key, partial(b.gm, other, K=8, nfe=4), partial(read, other)),
            at_most=1,
        ),
    ]


def mixing_helps_a_weak_teacher(b: Bench) -> Sequence[Check]:
    """Trajectory mixing helps with a teacher that is weak off its path."""
    steps = b.size.plane[0]
    checks = list[Check]()
    for weak in (True, False):
        make = partial(b.gm, Source(b.plane, weak=weak), K=8, nfe=4, states=4)
        mixed = partial(make, teacher_ratio=1.0, decay_steps=2 * steps // 3)
        kind = "a teacher that is weak off its path" if weak else "the exact teacher"
        for key in ("endpoint_rmse", "sliced_wasserstein"):
            says = f"{b.plane}, 4 NFE, {kind}: {WORDS[key]} on-policy over that with trajectory mixing"
            checks.append(Ratio(says, b.over(key, make, mixed), 1 if weak else None))
    return checks


def diversity_survives(b: Bench) -> Sequence[Check]:
    """Diversity survives where distribution matching collapses."""
    checks = list[Check]()
    for target in b.size.targets:
        own = [b.metric(b.gm(target, seed), "diversity") for seed in b.size.seeds]
        matched = [b.metric(b.flow_map(target, seed, "dmd"), "diversity") for seed in b.size.seeds]
        less = [one - two for one, two in zip(own, matched, strict=True)]
        checks.append(Check(f"{target}: diversity of π-ID (GM, K = 32, 1 NFE), the teacher's being 1", own, 0.95, 1.05))
        checks.append(Check(f"{target}: diversity of π-ID less that of distribution matching", less, 0))
    return checks


def substeps_have_diminishing_returns(b: Bench) -> Sequence[Check]:
    """More substeps help, with diminishing returns."""
    checks = list[Check]()
    for target in b.size.targets:
        evaluation, gains, late = b.lab.evaluation(Source(target)), [], []
        for seed in b.size.seeds:
            student = b.lab.student(b.gm(target, seed))
            reference = evaluation.teacher(student.schedule, 1)
            errors = {
                n: float(
                    (sample(student, evaluation.noise, 1, evaluation.conditions, step_size=1 / n) - reference)
                    .square()
                    .mean()
                    .sqrt()
                )
                for n in (4, 8, 32, 64, 128)
            }
            gains.append(errors[4] / errors[128])
            late.append(((errors[4] - errors[8]) - (errors[64] - errors[128])) / errors[128])
        says = f"{target}, GM, K = 32, 1 NFE: RMSE"
        checks.append(Ratio(f"{says} with 4 substeps over that with 128", gains, 1))
        checks.append(
            Check(f"{says}: what 8 gain on 4 less what 128 gain on 64, over the RMSE with 128", late, 0),
        )
    return checks


def convergence_is_smooth(b: Bench) -> Sequence[Check]:
    """Convergence is smooth."""
    rises: dict[str, list[float]] = {"pi-id": [], "dmd": []}
    for seed in b.size.seeds:
        for method, run in (("pi-id", b.gm(b.plane, seed)), ("dmd", b.flow_map(b.plane, seed, "dmd"))):
            curve = b.lab.numbers(("curve", run), partial(_curve, b, run))
            ups = sum(max(after - before, 0.0) for before, after in pairwise(curve))
            rises[method].append(ups / max(curve[0] - min(curve), 1e-9))
    less = [one - two for one, two in zip(rises["dmd"], rises["pi-id"], strict=True)]
    says = f"{b.plane}: sum of the rises of SW at ten times of training over its fall"
    return [
        Check(f"{says}, π-ID (GM, K = 32)", rises["pi-id"], at_most=0.1),
        Check(f"{says}, distribution matching less π-ID", less, 0),
    ]


def _curve(b: Bench, run: OfPolicy | OfFlowMap) -> list[float]:
    """SW of the averaged weights at ten times of a training."""
    network, found = untrained(run), list[float]()
    evaluation, target, steps = b.lab.evaluation(run.source), run.source.load(), run.training.steps
    average, shown = EMA(network, run.training.ema_gamma), untrained(run).eval().requires_grad_(False)

    def on_step(step: int, loss: float) -> None:
        average.update(network)
        if step * 10 // steps > (step - 1) * 10 // steps:
            average.copy_to(shown)
            points = evaluation.student(shown, 1)
            found.append(evaluation.metrics(points, points)["sliced_wasserstein"])

    if isinstance(run, OfPolicy) and isinstance(network, ToyStudent):
        distill(network, target, [run.nfe], run.training, run.seed, on_step)
    elif isinstance(run, OfFlowMap) and isinstance(network, ToyFlowMap):
        train(run.method, network, target, run.training, run.seed, on_step)
    return found


# FreeFlow


def prediction_and_correction_help_each_other(b: Bench) -> Sequence[Check]:
    """Prediction and correction together beat each alone."""
    return [
        Ratio(
            f"{target}: SW of {name} over that of both",
            b.over(
                "sliced_wasserstein",
                partial(b.flow_map, target, method=half),
                partial(b.flow_map, target, method="freeflow"),
            ),
            1,
        )
        for target in b.size.targets
        for half, name in (("prediction", "prediction alone"), ("dmd", "correction alone"))
    ]


def prediction_errors_accumulate(b: Bench) -> Sequence[Check]:
    """Prediction's errors accumulate from noise to data."""
    checks = list[Check]()
    for target in b.size.targets:
        evaluation, values = b.lab.evaluation(Source(target)), []
        for seed in b.size.seeds:
            errors = evaluation.path_errors(b.lab.student(b.flow_map(target, seed, "prediction")), DELTAS)
            values.append(errors[-1] / errors[1])
        checks.append(Ratio(f"{target}: prediction's relative error at δ = 1 over that at δ = ½", values, 1))
    return checks


ALPHAS = (0.3, 0.6, 1.5, 3.0)


def alpha_hardly_matters(b: Bench) -> Sequence[Check]:
    """Both together are robust across α."""
    target, checks = b.plane, list[Check]()
    found = {
        alpha: [
            b.metric(b.flow_map(target, seed, "freeflow", alpha=alpha), "sliced_wasserstein") for seed in b.size.seeds
        ]
        for alpha in ALPHAS
    }
    worst = [max(values) for values in zip(*found.values(), strict=True)]
    best = [min(values) for values in zip(*found.values(), strict=True)]
    alone = [b.metric(b.flow_map(target, seed, "dmd"), "sliced_wasserstein") for seed in b.size.seeds]
    ratios = [one / two for one, two in zip(worst, best, strict=True)]
    checks.append(Ratio(f"{target}: worst SW over best, α = 0.3, 0.6, 1.5, 3", ratios, at_most=1.25))
    ratios = [one / two for one, two in zip(alone, worst, strict=True)]
    checks.append(Ratio(f"{target}: SW of correction alone over the worst of them", ratios, 1))
    return checks


def correction_makes_steps_and_solver_unimportant(b: Bench) -> Sequence[Check]:
    """With the correction, the number of steps N and the solver matter less."""

    def spread(method: str, seed: int) -> float:
        runs = [
            b.flow_map(b.plane, seed, method, N=N, solver=solver)
            for N in (4, 8, 16, 32)
            for solver in ("euler", "heun")
        ]
        found = [b.metric(run, "sliced_wasserstein") for run in runs]
        return math.log(max(found) / min(found))

    less = [spread("prediction", seed) - spread("freeflow", seed) for seed in b.size.seeds]
    says = f"{b.plane}: log(worst SW over best), N = 4 to 32 and both solvers, of prediction alone less that of both"
    return [Check(says, less, 0)]


def high_noise_matters_to_the_correction(b: Bench) -> Sequence[Check]:
    """The correction needs high noise levels r."""
    high, low = (partial(b.flow_map, b.plane, method="dmd", r_mean=mean, r_std=1.6) for mean in (0.8, -0.4))
    says = f"{b.plane}, correction alone: SW with r from LogitNormal(-0.4, 1.6) over that from (0.8, 1.6)"
    checks = [Ratio(says, b.over("sliced_wasserstein", low, high), 1)]
    for most in (0.6, 0.8):

        def up_to(seed: int, most: float) -> OfFlowMap:
            run = b.flow_map(b.plane, seed, "dmd")
            return replace(run, training=_with(run.training, r=UpTo(most=most)))

        values = b.over("sliced_wasserstein", partial(up_to, most=most), partial(up_to, most=1.0))
        checks.append(Ratio(f"{b.plane}, correction alone: SW with r uniform in [0, {most:g}] over [0, 1]", values, 1))
    return checks


@dataclass(frozen=True)
class UpTo(Times):
    """Uniform times in [0, most)."""

    most: float = 1.0

    def draw(self, count: int, randomness: Randomness, like: Tensor) -> Tensor:
        """`[count]`."""
        return self.most * uniform([count], randomness, like)


def _with(training: FlowMapTraining, **changes: object) -> FlowMapTraining:
    return replace(training, free_flow=replace(training.free_flow, **changes))  # type: ignore[arg-type]


def strong_decay_helps_both_together(b: Bench) -> Sequence[Check]:
    """With both, a strong decay of large differences (k = 1) is better."""
    return [
        Ratio(
            f"{target}: SW of both with k = 0 over that with k = 1",
            b.over(
                "sliced_wasserstein",
                partial(b.flow_map, target, method="freeflow", k=0.0),
                partial(b.flow_map, target, method="freeflow", k=1.0),
            ),
            1,
        )
        for target in b.size.targets
    ]


def some_steps_start_at_the_noise(b: Bench) -> Sequence[Check]:
    """Some predictions should start at δ = 0."""

    def never(target: str, seed: int) -> OfFlowMap:
        run = b.flow_map(target, seed, "prediction")
        prediction = run.training.free_flow.prediction
        prediction = replace(prediction, delta=replace(prediction.delta, at_zero=0.0))
        return replace(run, training=_with(run.training, prediction=prediction))

    return [
        Ratio(
            f"{target}, prediction alone: SW with no δ set to 0 over that with 10%",
            b.over("sliced_wasserstein", partial(never, target), partial(b.flow_map, target, method="prediction")),
            1,
        )
        for target in b.size.targets
    ]


def the_auxiliary_network_learns_faster(b: Bench) -> Sequence[Check]:
    """The auxiliary network should learn faster than the student."""
    checks = list[Check]()
    for target in b.size.targets:
        rate = b.best[target]["dmd"].learning_rate
        slow, fast = (
            partial(b.flow_map, target, method="dmd", learning_rate=rate / 2, auxiliary_rate=each)
            for each in (rate / 2, 5 / 3 * rate)
        )
        says = f"{target}, correction alone: SW with g at the student's rate over that at 10/3 of it"
        checks.append(Ratio(says, b.over("sliced_wasserstein", slow, fast), 1))
    return checks


def searched_noises_are_good_for_the_teacher(b: Bench) -> Sequence[Check]:
    """Noises that a student finds best are good for its teacher, too.

    The score is the log-probability that a classifier gives the class asked for.
    """
    checks = list[Check]()
    evaluation, classifier = b.lab.evaluation(Source("digits")), load_classifier()

    def score(latents: Tensor, conditions: Conditions | None) -> Tensor:
        labels: Tensor = (conditions or {})["class_labels"]
        logits: Tensor = classifier(latents.float())
        return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)

    def teacher(noise: Tensor) -> float:
        x = integrate(
            Conditioned(evaluation.target, evaluation.conditions), noise, 1.0, 0.0, shift=evaluation.target.shift
        )
        return float(score(x, evaluation.conditions).mean())

    shape = evaluation.noise.shape
    gains: dict[int, list[float]] = {2: [], 8: []}
    for seed in b.size.seeds:
        student = b.lab.student(b.gm("digits", seed))
        for n, found in gains.items():
            generator = keyed_generator(seed, "search")
            noises = [torch.randn(shape, generator=generator) for _ in range(n)]
            best = best_of(student, noises, score, evaluation.conditions, 1)
            found.append(teacher(best.noise) - teacher(noises[0]))
    for n, found in gains.items():
        checks.append(
            Check(f"digits: the teacher's score from the best of {n} noises less that from the first", found, 0)
        )
    return checks


CLAIMS: Sequence[Claim[Bench]] = (
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
    Claim("substeps", "the review", substeps_have_diminishing_returns),
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
