"""One run of `pitools toy`: train each student by each method, compare it with the teacher, write the folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file

from pitools.objectives.flow_map import Prediction
from pitools.objectives.free_flow import FreeFlow
from pitools.objectives.pi_id import PiID
from pitools.policies import DXHead, GMHead, Head, PolynomialHead, ShortcutHead
from pitools.training import DivergenceError, Interrupt, graceful_interrupt, keyed_generator
from pitools.types import Schedule
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.flow_maps import METHODS as FLOW_MAPS
from toys.flow_maps import FlowMapTraining, train
from toys.network import ToyFlowMap, ToyStudent
from toys.targets import Target, load_target

OF_POLICIES = ("pi-id", "cloning")
"""Methods that train a policy; the others train a flow map."""


@dataclass(frozen=True)
class Defaults:
    """What a kind of target asks for, unless told otherwise."""

    components: int
    width: int
    samples: int
    training: Training
    flow_maps: FlowMapTraining


MOST_NFE = 128

FREE_FLOW = FreeFlow(Prediction(steps=16, power=0.0, warmup=200), alpha=0.1, delay=1000, correction_warmup=500)

PLANE = Defaults(
    components=64,
    width=256,
    samples=10_000,
    training=Training(1000, 1024, 4e-3, PiID(data_free=True, states=2, step_size=1 / 32, floor=1 / 128)),
    flow_maps=FlowMapTraining(steps=4000, batch=1024, learning_rate=3e-3, free_flow=FREE_FLOW),
)
IMAGES = Defaults(
    components=32,
    width=512,
    samples=1000,
    training=Training(700, 256, 3e-3, PiID(data_free=True, states=2, step_size=1 / 32, floor=1 / 32)),
    flow_maps=FlowMapTraining(steps=2000, batch=256, learning_rate=1e-3, free_flow=FREE_FLOW),
)


@dataclass(frozen=True)
class Experiment:
    """A resolved run: everything that its outcome depends on."""

    methods: tuple[str, ...]
    policies: tuple[str, ...]
    target: str
    nfes: tuple[int, ...]
    components: int
    grid_points: int
    width: int
    training: Training
    flow_maps: FlowMapTraining
    samples: int
    seed: int
    device: str
    out: Path

    @classmethod
    def resolve(
        cls,
        methods: Sequence[str],
        policies: Sequence[str],
        target: str,
        nfes: Sequence[int],
        components: int | None = None,
        grid_points: int = 10,
        steps: int | None = None,
        seed: int = 0,
        device: str = "auto",
        out: Path | None = None,
    ) -> Experiment:
        """Defaults filled in and everything checked, before any work. `ValueError` says what to change."""
        defaults = PLANE if len(load_target(target).shape) == 1 else IMAGES
        training, flow_maps = defaults.training, defaults.flow_maps
        if steps is not None:
            if steps < 1:
                raise ValueError(f"--steps must be at least 1, got {steps}")
            training, flow_maps = replace(training, steps=steps), replace(flow_maps, steps=steps)
        known = (*OF_POLICIES, *FLOW_MAPS)
        for method in methods:
            if method not in known:
                raise ValueError(f"unknown method {method!r}; the methods are {', '.join(known)}")
        if not 1 <= min(nfes) <= max(nfes) <= MOST_NFE:
            raise ValueError(f"--nfe must be at least 1 and at most {MOST_NFE}, the teacher's own steps; got {nfes}")
        methods = tuple(dict.fromkeys(methods))
        of_policies = tuple(dict.fromkeys(policies)) if set(methods) & set(OF_POLICIES) else ()
        others = (method for method in methods if method != "pi-id")
        experiment = cls(
            methods=methods,
            policies=tuple(dict.fromkeys(policies)),
            target=target,
            nfes=tuple(sorted(set(nfes))),
            components=components if components is not None else defaults.components,
            grid_points=grid_points,
            width=defaults.width,
            training=training,
            flow_maps=flow_maps,
            samples=defaults.samples,
            seed=seed,
            device=_device(device),
            out=free_folder(out, Path("runs") / "-".join(["toy", target, *others, *of_policies])),
        )
        for name in (*experiment.policies, "gm", "dx"):  # the last two for their sizes, used or not
            experiment.head(name)
        return experiment

    def head(self, policy: str) -> Head:
        """The head of a policy at this run's sizes. `ValueError` for an unknown name or size."""
        if policy not in HEADS:
            raise ValueError(f"unknown policy {policy!r}; the policies are {', '.join(HEADS)}")
        return HEADS[policy](self)

    def students(self) -> list[tuple[str, str | None, tuple[int, ...]]]:
        """(method, policy, the NFEs it serves) of each network to train.

        A policy that reaches t = 0 from anywhere serves every NFE with one network; the others know only
        the segment that they were trained on. A flow map has no policy, and takes one evaluation.
        """
        found: list[tuple[str, str | None, tuple[int, ...]]] = []
        for method in self.methods:
            if method not in OF_POLICIES:
                found.append((method, None, (1,)))
                continue
            for name in self.policies:
                groups = [self.nfes] if self.head(name).reaches_zero else [(nfe,) for nfe in self.nfes]
                found += [(method, name, nfes) for nfes in groups]
        return found

    def label(self, method: str, policy: str | None) -> str:
        """What a student is called: its policy, where the method goes without saying."""
        if policy is None or self.methods == ("pi-id",):
            return policy or method
        return f"{method} {policy}"


HEADS: Mapping[str, Callable[[Experiment], Head]] = MappingProxyType(
    {
        "gm": lambda experiment: GMHead(experiment.components),
        "dx": lambda experiment: DXHead(experiment.grid_points),
        "polynomial": lambda experiment: PolynomialHead(experiment.grid_points),
        "shortcut": lambda experiment: ShortcutHead(),
    }
)


@dataclass(frozen=True)
class Trained:
    """A student with its averaged weights, its method, the NFEs that it is for, and what it took."""

    name: str
    method: str
    nfes: tuple[int, ...]
    steps: int
    teacher_calls: int
    seconds: float
    student: ToyStudent | ToyFlowMap


@dataclass(frozen=True)
class Results:
    """The contents of metrics.json: the teacher's metrics, a row for each student and NFE, the time it took."""

    teacher: Mapping[str, float]
    students: Sequence[Mapping[str, float | str]]
    seconds: float


def run(experiment: Experiment, console: Console) -> bool:
    """Train, evaluate, print the table and write `experiment.out`; True if Ctrl-C cut the training short.

    Raises `DivergenceError` where a loss is not finite, after the students before it are shown; `OSError` where
    the folder cannot be written; `KeyboardInterrupt` where there is nothing to show yet.
    """
    start = time.perf_counter()
    device = torch.device(experiment.device)
    target = load_target(experiment.target).to(device)
    experiment.out.mkdir(parents=True, exist_ok=True)
    config = asdict(experiment) | {"out": str(experiment.out)}
    (experiment.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    with graceful_interrupt() as interrupt, _progress(console) as progress:
        trained: list[Trained] = []
        failure: DivergenceError | None = None
        for method, policy, nfes in experiment.students():
            name = experiment.label(method, policy)
            try:
                student = _train(experiment, target, method, policy, nfes, progress, interrupt)
            except DivergenceError as error:
                failure = DivergenceError(f"{name} for {nfes} NFE: {error}")
                break
            if student is None:
                break
            trained.append(student)
            served = policy is None or experiment.head(policy).reaches_zero
            label = name.replace(" ", "-") + ("" if served else f"-{nfes[0]}nfe")
            save_file(student.student.state_dict(), experiment.out / f"{label}.safetensors")
    if not trained:
        raise failure or KeyboardInterrupt
    if interrupt.requested:
        console.print("Stopped early; showing what there is.")

    with console.status("Comparing with the teacher"):
        evaluation = Evaluation.prepare(target, experiment.samples, device)
        results = _evaluate(experiment, evaluation, trained, start)
    (experiment.out / "metrics.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    teacher_steps = evaluation.teacher_steps(Schedule(shift=target.shift), experiment.nfes[0])
    console.print(_table(experiment, results, teacher_steps))

    from toys.plots import plot_samples, plot_trajectories

    with console.status("Drawing"):
        students = [(one.name, nfe, one.student) for one in trained for nfe in one.nfes]
        plot_samples(experiment.out / "samples.png", evaluation, students)
        plot_trajectories(experiment.out / "trajectories.png", evaluation, students)
    if failure is not None:
        raise failure
    console.print(f"Wrote {experiment.out}/ (samples.png, trajectories.png, metrics.json, config.json, weights).")
    return interrupt.requested


def _train(
    experiment: Experiment,
    target: Target,
    method: str,
    policy: str | None,
    nfes: tuple[int, ...],
    progress: Progress,
    interrupt: Interrupt,
) -> Trained | None:
    """One student, or None where the stop came before its first step."""
    name, start = experiment.label(method, policy), time.perf_counter()
    steps = experiment.flow_maps.steps if policy is None else experiment.training.steps
    task = progress.add_task(f"{name} for {', '.join(map(str, nfes))} NFE", total=steps, loss="")

    average: list[float] = []

    def on_step(step: int, loss: float) -> None:
        average.append(loss)
        recent = average[-50:]
        progress.update(task, completed=step, loss=f"loss {sum(recent) / len(recent):.4g}")

    def stopped() -> bool:
        return interrupt.requested

    # All flow maps, and all students of one policy, set out from the same weights.
    generator = keyed_generator(experiment.seed, f"init {policy or 'flow map'}")
    student: ToyStudent | ToyFlowMap
    if policy is None:
        student = ToyFlowMap(target.shape, classes=target.classes, width=experiment.width, generator=generator).to(
            target.device
        )
        outcome = train(method, student, target, experiment.flow_maps, experiment.seed, on_step, stopped)
    else:
        student = ToyStudent(
            experiment.head(policy),
            Schedule(nfe=max(nfes), shift=target.shift),
            target.factorisation,
            target.shape,
            classes=target.classes,
            width=experiment.width,
            scale=target.scale,
            generator=generator,
        ).to(target.device)
        training = replace(experiment.training, clone=method == "cloning")
        outcome = distill(student, target, nfes, training, experiment.seed, on_step, stopped)
    if not average:
        return None
    progress.stop_task(task)
    outcome.ema.copy_to(student)
    seconds = time.perf_counter() - start
    student.eval().requires_grad_(False)
    return Trained(name, method, nfes, outcome.ema.steps, outcome.teacher_calls, seconds, student)


def _evaluate(experiment: Experiment, evaluation: Evaluation, trained: Sequence[Trained], start: float) -> Results:
    schedule = Schedule(shift=evaluation.target.shift)
    reference = evaluation.teacher(schedule, experiment.nfes[0])
    rows: list[Mapping[str, float | str]] = []
    for one in trained:
        for nfe in one.nfes:
            metrics = evaluation.metrics(evaluation.student(one.student, nfe), evaluation.teacher(schedule, nfe))
            cost = {"steps": one.steps, "teacher_calls": one.teacher_calls, "seconds": round(one.seconds, 2)}
            rows.append({"policy": one.name, "method": one.method, "nfe": nfe, **cost, **metrics})
    return Results(evaluation.metrics(reference, reference), rows, round(time.perf_counter() - start, 2))


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


PERCENTAGES = ("same_mode", "off_mode", "class_accuracy")
HEADINGS = {
    "same_mode": "same mode",
    "off_mode": "off mode",
    "modes_covered": "modes",
    "class_accuracy": "right class",
    "sliced_wasserstein": "SW",
    "energy_distance": "energy",
    "endpoint_rmse": "RMSE",
}


def _table(experiment: Experiment, results: Results, teacher_steps: int) -> Table:
    """The teacher, then each student at each NFE; where methods are compared, also what each took."""
    compared = experiment.methods != ("pi-id",)
    title = f"{experiment.target}, {experiment.samples:,} noises, {results.seconds} s"
    table = Table(title=title)
    if compared:  # in 80 columns
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("student" if compared else "policy", no_wrap=True)
    table.add_column("NFE", justify="right")
    shown = [key for key in HEADINGS if key in results.teacher]
    for key in shown:
        table.add_column(HEADINGS[key], justify="right")
    for heading in ("million teacher calls", "s") if compared else ():
        table.add_column(heading, justify="right")
    table.add_row("teacher", str(teacher_steps), *(_show(key, results.teacher[key]) for key in shown))
    for row in results.students:
        cells = [_show(key, row[key]) for key in shown]
        if compared:
            cells += [f"{float(row['teacher_calls']) / 1e6:.2f}", f"{float(row['seconds']):.0f}"]
        table.add_row(str(row["policy"]), str(row["nfe"]), *cells)
    return table


def _show(key: str, value: float | str) -> str:
    if key in PERCENTAGES:
        return f"{value:.2%}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _device(name: str) -> str:
    """`auto` resolved; `ValueError` for a device that is not the CPU or a GPU that torch has here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = (name if ":" in name else f"{name}:0").partition(":")
    known = kind == "cpu" or (kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count())
    if not known:
        raise ValueError(f"--device {name} is not here; use cpu, cuda (with a GPU), cuda:1, ... or auto")
    return name


def free_folder(out: Path | None, default: Path) -> Path:
    """A folder that loses nothing: the one asked for if it is new or empty, else the first free default."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} exists and is not an empty folder; name another one")
        return out
    path, number = default, 1
    while path.exists():
        number += 1
        path = default.with_name(f"{default.name}-{number}")
    return path
