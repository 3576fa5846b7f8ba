"""One run of `pitools toy`: train each student, compare it with the teacher, write the folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file

from pitools.policies import DXHead, GMHead, Head, PolynomialHead, ShortcutHead
from pitools.training import DivergenceError, Interrupt, graceful_interrupt, keyed_generator
from pitools.types import Schedule
from toys.distill import Training, distill
from toys.evaluation import Evaluation
from toys.network import ToyStudent
from toys.targets import Target, load_target


@dataclass(frozen=True)
class Defaults:
    """What a kind of target asks for, unless told otherwise."""

    components: int
    width: int
    samples: int
    training: Training


MOST_NFE = 128

PLANE = Defaults(
    components=64,
    width=256,
    samples=10_000,
    training=Training(steps=1000, batch=1024, learning_rate=4e-3, states=2, step_size=1 / 32, floor=1 / 128),
)
IMAGES = Defaults(
    components=32,
    width=512,
    samples=1000,
    training=Training(steps=700, batch=256, learning_rate=3e-3, states=2, step_size=1 / 32, floor=1 / 32),
)


@dataclass(frozen=True)
class Experiment:
    """A resolved run: everything that its outcome depends on."""

    policies: tuple[str, ...]
    target: str
    nfes: tuple[int, ...]
    components: int
    grid_points: int
    width: int
    training: Training
    samples: int
    seed: int
    device: str
    out: Path

    @classmethod
    def resolve(
        cls,
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
        training = defaults.training
        if steps is not None:
            if steps < 1:
                raise ValueError(f"--steps must be at least 1, got {steps}")
            training = replace(training, steps=steps)
        if not 1 <= min(nfes) <= max(nfes) <= MOST_NFE:
            raise ValueError(f"--nfe must be at least 1 and at most {MOST_NFE}, the teacher's own steps; got {nfes}")
        experiment = cls(
            policies=tuple(dict.fromkeys(policies)),
            target=target,
            nfes=tuple(sorted(set(nfes))),
            components=components if components is not None else defaults.components,
            grid_points=grid_points,
            width=defaults.width,
            training=training,
            samples=defaults.samples,
            seed=seed,
            device=_device(device),
            out=_folder(out, f"toy-{target}-{'-'.join(dict.fromkeys(policies))}"),
        )
        for name in (*experiment.policies, "gm", "dx"):  # the last two for their sizes, used or not
            experiment.head(name)
        return experiment

    def head(self, policy: str) -> Head:
        """The head of a policy at this run's sizes. `ValueError` for an unknown name or size."""
        if policy not in HEADS:
            raise ValueError(f"unknown policy {policy!r}; the policies are {', '.join(HEADS)}")
        return HEADS[policy](self)

    def students(self) -> list[tuple[str, tuple[int, ...]]]:
        """(policy, the NFEs it serves) of each network to train.

        A policy that reaches t = 0 from anywhere serves every NFE with one network; the others know only
        the segment that they were trained on.
        """
        return [
            (name, nfes)
            for name in self.policies
            for nfes in ([self.nfes] if self.head(name).reaches_zero else [(nfe,) for nfe in self.nfes])
        ]


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
    """A student with its averaged weights, the NFEs that it is for, and the steps that it had."""

    policy: str
    nfes: tuple[int, ...]
    steps: int
    student: ToyStudent


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
        for policy, nfes in experiment.students():
            try:
                student = _train(experiment, target, policy, nfes, progress, interrupt)
            except DivergenceError as error:
                failure = DivergenceError(f"{policy} for {nfes} NFE: {error}")
                break
            if student is None:
                break
            trained.append(student)
            label = policy if student.student.head.reaches_zero else f"{policy}-{nfes[0]}nfe"
            save_file(student.student.state_dict(), experiment.out / f"{label}.safetensors")
    if not trained:
        raise failure or KeyboardInterrupt
    if interrupt.requested:
        console.print("Stopped early; showing what there is.")

    with console.status("Comparing with the teacher"):
        evaluation = Evaluation.prepare(target, experiment.samples, device)
        results = _evaluate(experiment, evaluation, trained, start)
    (experiment.out / "metrics.json").write_text(json.dumps(asdict(results), indent=2) + "\n")
    teacher_steps = evaluation.teacher_steps(trained[0].student.schedule, experiment.nfes[0])
    console.print(_table(experiment, results, teacher_steps))

    from toys.plots import plot_samples, plot_trajectories

    with console.status("Drawing"):
        students = [(one.policy, nfe, one.student) for one in trained for nfe in one.nfes]
        plot_samples(experiment.out / "samples.png", evaluation, students)
        plot_trajectories(experiment.out / "trajectories.png", evaluation, students)
    if failure is not None:
        raise failure
    console.print(f"Wrote {experiment.out}/ (samples.png, trajectories.png, metrics.json, config.json, weights).")
    return interrupt.requested


def _train(
    experiment: Experiment,
    target: Target,
    policy: str,
    nfes: tuple[int, ...],
    progress: Progress,
    interrupt: Interrupt,
) -> Trained | None:
    """One student, or None where the stop came before its first step."""
    student = ToyStudent(
        experiment.head(policy),
        Schedule(nfe=max(nfes), shift=target.shift),
        target.factorisation,
        target.shape,
        classes=target.classes,
        width=experiment.width,
        scale=target.scale,
        generator=keyed_generator(experiment.seed, f"init {policy}"),
    ).to(target.device)
    steps = experiment.training.steps
    task = progress.add_task(f"{policy} for {', '.join(map(str, nfes))} NFE", total=steps, loss="")

    average: list[float] = []

    def on_step(step: int, loss: float) -> None:
        average.append(loss)
        recent = average[-50:]
        progress.update(task, completed=step, loss=f"loss {sum(recent) / len(recent):.4g}")

    ema = distill(student, target, nfes, experiment.training, experiment.seed, on_step, lambda: interrupt.requested)
    if not average:
        return None
    progress.stop_task(task)
    ema.copy_to(student)
    return Trained(policy, nfes, ema.steps, student.eval().requires_grad_(False))


def _evaluate(experiment: Experiment, evaluation: Evaluation, trained: Sequence[Trained], start: float) -> Results:
    reference = evaluation.teacher(trained[0].student.schedule, experiment.nfes[0])
    rows: list[Mapping[str, float | str]] = []
    for one in trained:
        for nfe in one.nfes:
            teacher = evaluation.teacher(one.student.schedule, nfe)
            metrics = evaluation.metrics(evaluation.student(one.student, nfe), teacher)
            rows.append({"policy": one.policy, "nfe": nfe, "steps": one.steps, **metrics})
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
    """The teacher, then each student at each NFE."""
    table = Table(title=f"{experiment.target}, {experiment.samples:,} noises, {results.seconds} s")
    table.add_column("policy")
    table.add_column("NFE", justify="right")
    for key in results.teacher:
        table.add_column(HEADINGS[key], justify="right")
    table.add_row("teacher", str(teacher_steps), *(_show(key, value) for key, value in results.teacher.items()))
    for row in results.students:
        table.add_row(str(row["policy"]), str(row["nfe"]), *(_show(key, row[key]) for key in results.teacher))
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


def _folder(out: Path | None, name: str) -> Path:
    """A folder that loses nothing: the one asked for if it is new or empty, else the first free default."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"--out {out} exists and is not an empty folder; name another one")
        return out
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path
