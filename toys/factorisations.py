"""`pitools factorisations`: what one mixture of a GM policy should cover, without a network (paper, C.1 and Fig. 11).

    A, μ, s  <-  Adam on  E ½ ‖ G(x_t, t, c) - π(x_t, t) ‖²,    x_t = x_1 + ∫_1^t π_D(x_s, s) ds    (Algorithm 1)

The numbers of a mixture for each factor of one latent are parameters themselves, fitted over the whole of (0, 1] to the
teacher from one noise x_1 and one condition c, under several factorisations [L, C] of that latent. Every noise has a
policy of its own: a batch of them is as many studies. What differs at the end is the factorisation's own bias.

All start alike: every mean at the teacher's u(x_1, 1), apart by the same noise on the whole latent; equal weights; one
s for each noise. They are fitted in turn, a step each, on the same draws of t. The teacher's path and the policy's have
the same Euler steps; no state is drawn below the last, where neither is asked for a velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from pitools import draws
from pitools.guidance import Conditioned, Teacher
from pitools.objectives import imitation_loss
from pitools.policies import GMHead, NetworkStudent, Outputs, StaticNetwork
from pitools.rollout import integrate
from pitools.training import DivergenceError, Optimiser, graceful_interrupt, sample_generators
from pitools.training.checkpoint import write_json
from pitools.training.config import RecipeError, to_toml
from pitools.training.data import Ordered, to_device
from pitools.training.distillation import check_engine, check_teacher_data
from pitools.training.engine import Engine
from pitools.training.interrupt import Interrupt
from pitools.training.log import tell
from pitools.training.optimiser import build_optimiser, learning_rate_at
from pitools.training.recipe import Plan
from pitools.training.teacher import new_teacher, trained_teacher
from pitools.types import ELEMENTWISE, PIXELWISE, Conditions, Factorisation, Policy, Schedule, VelocityField, patchwise

SPREAD, LOG_STD = 0.5, math.log(0.05)
"""How far apart the means start, for each element of a latent, and log s."""

MEASURED = 32
"""States of each noise at which the last loss is measured."""

POINTS = 100
"""Of a loss curve: each is the mean over as many steps."""


@dataclass(frozen=True)
class Study:
    """How static policies are fitted.

    steps: of Adam, its rate `learning_rate` brought to 0 along a cosine.  samples: noises, each with a condition and
    policies of its own.  components: K.  states: teacher queries of a noise at each step.
    Raises `ValueError` for sizes below 1 and a rate that is not positive.
    """

    steps: int = 1000
    samples: int = 8
    components: int = 32
    learning_rate: float = 0.03
    states: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "components", "states"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be a positive number, got {self.learning_rate}")

    @property
    def optimiser(self) -> Optimiser:
        return Optimiser(learning_rate=self.learning_rate, warmup_steps=0, decay="cosine")


@dataclass(frozen=True)
class Task:
    """What static policies are fitted to: a teacher from `noise` `[B, C, H, W]` under `conditions`.

    steps: Euler steps of the teacher's path and of the policies', even in raw time.  shift: m of that.  seed: of draws.
    """

    teacher: VelocityField
    noise: Tensor
    conditions: Conditions
    steps: int = 128
    shift: float = 1.0
    seed: int = 0

    @torch.no_grad()
    def end(self) -> Tensor:
        """Where the teacher's own path ends."""
        given = Conditioned(self.teacher, self.conditions)
        return integrate(given, self.noise, 1.0, 0.0, step_size=1 / self.steps, shift=self.shift)


@dataclass(frozen=True)
class Static:
    """A static policy for each noise of a task, under one factorisation."""

    name: str
    task: Task
    student: NetworkStudent
    network: StaticNetwork

    def policy(self) -> Policy:
        """What has been fitted so far. `DivergenceError` for parameters that are not finite."""
        try:
            return self.student(self.task.noise, 1.0)
        except ValueError as error:
            raise DivergenceError(f"{self.name}: {error}; use a lower --learning-rate") from error

    def loss(self, states: int, purpose: str, step: int = 0) -> Tensor:
        """`[B]`: Algorithm 1 over one segment, all of (0, 1]. `DivergenceError` where there is no such number."""
        task = self.task
        loss = imitation_loss(
            task.teacher,
            self.policy(),
            task.noise,
            1.0,
            0.0,
            factorisation=self.student.factorisation,
            conditions=task.conditions,
            states=states,
            step_size=1 / task.steps,
            shift=task.shift,
            floor=1 / task.steps,
            generator=sample_generators(task.seed, purpose, step, range(len(task.noise))),
        ).loss
        if not bool(loss.isfinite().all()):
            raise DivergenceError(f"{self.name}: the loss is not finite; use a lower --learning-rate")
        return loss

    @torch.no_grad()
    def end(self) -> Tensor:
        """Where the policies end, from the task's noises."""
        task, factorisation = self.task, self.student.factorisation
        noise = factorisation.pack(task.noise)
        x = integrate(self.policy(), noise, 1.0, 0.0, step_size=1 / task.steps, shift=task.shift)
        return factorisation.unpack(x, task.noise.shape)


def factorisations(shape: Sequence[int]) -> dict[str, Factorisation]:
    """Those to compare on latents of `shape` [C, H, W]: the three of Fig. 11.

    Where C = 1 two of them are the same, and rows and the whole latent stand beside the others.
    Raises `ValueError` for latents that are no images, or that 2 x 2 patches do not fit.
    """
    if len(shape) != 3:
        raise ValueError(f"factorisations are compared on latents [C, H, W], got {list(shape)}")
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"patches of 2 x 2 do not fit latents of {shape[1]} x {shape[2]}")
    if shape[0] == 1:
        return {
            "pixel-wise = element-wise": PIXELWISE,
            "patch-wise": patchwise(2),
            "row-wise": Factorisation("b c h w -> b h (c w)"),
            "whole": Factorisation("b c h w -> b 1 (c h w)"),
        }
    return {"pixel-wise": PIXELWISE, "patch-wise": patchwise(2), "element-wise": ELEMENTWISE}


def start(task: Task, components: int) -> list[Static]:
    """Static policies as they start: the same under every factorisation, but for how a mixture sees them."""
    noise = task.noise
    rows = range(len(noise))
    apart = [
        draws.normal(noise.shape, sample_generators(task.seed, "static start", k, rows), like=noise)
        for k in range(components)
    ]
    with torch.no_grad():
        u = task.teacher.velocity(noise, 1.0, task.conditions)
    found = []
    for name, factorisation in factorisations(noise.shape[1:]).items():
        means = torch.stack([factorisation.pack(u + SPREAD * each) for each in apart], dim=2)
        log_weights = means.new_zeros(means.shape[:3])
        network = StaticNetwork(Outputs(means, log_weights, means.new_full((len(noise), 1), LOG_STD)))
        student = NetworkStudent(network, GMHead(components), Schedule(1, task.shift), factorisation)
        found.append(Static(name, task, student, network))
    return found


def fit(statics: Sequence[Static], study: Study) -> Iterator[list[float]]:
    """Fit them all, a step each in turn; yields each one's loss of that step, a mean over the noises.

    Raises `DivergenceError` at the first loss that is not finite.
    """
    optimisers = [build_optimiser(study.optimiser, static.network.parameters(), sharded=False) for static in statics]
    for step in range(study.steps):
        losses = []
        for static, optimiser in zip(statics, optimisers, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate_at(study.optimiser, step, study.steps)
            try:
                loss = static.loss(study.states, "static times", step)
            except DivergenceError as error:
                raise DivergenceError(f"step {step + 1}, {error}") from error
            optimiser.zero_grad()
            loss.sum().backward()  # a sum: no noise's parameters feel how many others there are
            optimiser.step()
            losses.append(float(loss.detach().mean()))
        yield losses


def compared(x: Tensor, teacher: Tensor) -> dict[str, list[float]]:
    """How end points `[B, C, H, W]` differ from the teacher's, for each sample.

    rmse: root mean square of the difference.  contrast: standard deviation of a latent's elements, channel by channel,
    over the teacher's.  texture: root mean square of the difference of neighbours, over the teacher's. Fig. 11's
    over-saturated, over-smoothed images have more of the one and less of the other; its confetti has more texture.
    """

    def deviation(z: Tensor) -> Tensor:
        return z.flatten(2).var(2, unbiased=False).mean(1).sqrt()

    def roughness(z: Tensor) -> Tensor:
        return (z.diff(dim=2).square().mean((1, 2, 3)) + z.diff(dim=3).square().mean((1, 2, 3))).sqrt()

    x, teacher = x.double(), teacher.double()
    found = {
        "rmse": (x - teacher).square().mean((1, 2, 3)).sqrt(),
        "contrast": deviation(x) / deviation(teacher),
        "texture": roughness(x) / roughness(teacher),
    }
    return {key: _rounded(values.tolist()) for key, values in found.items()}


def measure(static: Static, end: Tensor, teacher: Tensor) -> dict[str, Any]:
    """A row of factorisations.json: means over the noises, and each noise's own under "each"."""
    with torch.no_grad():
        loss = static.loss(MEASURED, "static loss", 0)
    each = {"loss": _rounded(loss.tolist()), **compared(end, teacher)}
    factors, channels = static.network.velocities.shape[1], static.network.velocities.shape[3]
    means = dict(zip(each, _rounded([mean(values) for values in each.values()]), strict=True))
    return {"name": static.name, "factors": factors, "channels": channels, **means, "each": each}


def run(plan: Plan, study: Study, out: Path, console: Console) -> int | None:
    """The study on a recipe's teacher, which is trained if need be, into the folder `out`.

    Returns the signal that cut the fitting short, None if none did; what is done by then is written. Raises
    `RecipeError` for what cannot be, `DivergenceError` for a rate that is too high, `KeyboardInterrupt` where not a
    step is done, and what training a teacher raises.
    """
    try:
        engine = Engine(plan.recipe.engine)
    except ImportError as error:
        raise RecipeError(f'a teacher needs the extra "scale" ({error}): run `pip install "pitools[scale]"`') from error
    if engine.world > 1:
        raise RecipeError("the study is for one process; start it without torchrun")
    check_engine(plan, engine)
    check_teacher_data(plan)
    shape, conditions = _asked(plan, study.samples)
    try:
        factorisations(shape)
    except ValueError as error:
        raise RecipeError(f"[data] {error}") from None
    network = trained_teacher(plan, new_teacher(plan), engine, console)
    teacher = Teacher(partial(engine.call, network), plan.recipe.teacher.guidance, plan.data.null_conditions)
    seed = plan.recipe.run.seed
    keys = sample_generators(seed, "static noise", 0, range(study.samples))
    noise = draws.normal((study.samples, *shape), keys, torch.empty(0)).to(engine.device)
    # In the time of the recipe's students.
    shift = next((section.shift for section in plan.recipe.students.values()), 1.0)
    steps = plan.recipe.teacher.reference_steps
    task = Task(teacher, noise, to_device(conditions, engine.device), steps, shift, seed)

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out} cannot be written ({error.strerror}); name another folder with --out") from None
    end = task.end()
    statics = start(task, study.components)
    with graceful_interrupt() as interrupt:
        losses = _fitted(statics, study, interrupt, console)
        if not losses:
            raise KeyboardInterrupt
        ends = [static.end() for static in statics]
        rows = [measure(static, x, end) for static, x in zip(statics, ends, strict=True)]
        curves = {static.name: curve(own) for static, own in zip(statics, zip(*losses, strict=True), strict=True)}
        told = {**asdict(study), "steps": len(losses), "teacher_steps": steps, "shift": shift, "seed": seed}
        write_json(out / "factorisations.json", {**told, "factorisations": rows, "losses": curves})
        (out / "recipe.toml").write_text(to_toml(plan.table), encoding="utf-8")
        plot(out / "losses.png", curves)
        titles = [f"{row['name']}, C = {row['channels']}".replace(" = e", " =\ne") for row in rows]
        plan.data.draw_sheet(out / "samples.png", [(f"teacher, {steps} steps", end), *zip(titles, ends, strict=True)])
    if shape[0] == 1:
        tell(console, "Latents have one channel: pixel-wise and element-wise are the same.")
    console.print(table(plan.out.name, told, rows))
    tell(console, f"Wrote {out}/ (factorisations.json, losses.png, samples.png, recipe.toml).")
    return interrupt.signal if len(losses) < study.steps else None


def curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """(step, mean loss since the last point), at most `POINTS` of them."""
    size = -(-len(losses) // POINTS)
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    ends = [min((i + 1) * size, len(losses)) for i in range(len(parts))]
    return list(zip(ends, _rounded([mean(part) for part in parts]), strict=True))


def _rounded(values: Sequence[float]) -> list[float]:
    """To six digits, as they are written."""
    return [float(f"{value:.6g}") for value in values]


def table(title: str, told: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each factorisation: means over the noises."""
    found = Table(title=f"{title}: {told['samples']} noises, K = {told['components']}, {told['steps']} steps")
    found.add_column("factorisation", no_wrap=True)
    for heading in ("L", "C", "loss", "RMSE", "contrast", "texture"):
        found.add_column(heading, justify="right")
    found.add_row("teacher", "", "", "", "0.0000", "1.000", "1.000")
    for row in rows:
        shown = [f"{row['loss']:.1e}", f"{row['rmse']:.4f}", f"{row['contrast']:.3f}", f"{row['texture']:.3f}"]
        found.add_row(row["name"], str(row["factors"]), str(row["channels"]), *shown)
    return found


def plot(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Loss against steps, on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, points in curves.items():
        axis.semilogy(*zip(*points, strict=True), label=name, linewidth=1.2)
    axis.set(xlabel="step", ylabel="loss of π-ID")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    figure.savefig(path, dpi=110)


def _asked(plan: Plan, samples: int) -> tuple[tuple[int, ...], Conditions]:
    """The shape of one latent, and the conditions of the data's first samples, which are of one size."""
    data = plan.data
    if samples > len(data):
        raise RecipeError(f"--samples {samples} is more than [data] has, {len(data)}; lower it")
    try:
        rows = range(samples)
        latents, conditions = data.batch(data.indices(0, 0, samples, rows) if isinstance(data, Ordered) else rows)
    except ValueError as error:
        raise RecipeError(f"--samples {samples} and [data]: {error}") from error
    return tuple(latents.shape[1:]), conditions


def _fitted(statics: Sequence[Static], study: Study, interrupt: Interrupt, console: Console) -> list[list[float]]:
    """Fit until the end or a signal; the losses of each step that is done."""
    done: list[list[float]] = []
    with _progress(console, study.steps) as show:
        for losses in fit(statics, study):
            done.append(losses)
            show(len(done), ", ".join(f"{loss:.3g}" for loss in losses))
            if interrupt.requested and len(done) < study.steps:
                tell(console, f"Stopped after {len(done)} of {study.steps} steps; this is what there is by then.")
                break
    return done


@contextmanager
def _progress(console: Console, steps: int) -> Iterator[Callable[[int, str], None]]:
    """Within it, shows how many steps are done, and the last losses: as a bar, or a line for each tenth."""
    if not console.is_terminal:

        def lines(done: int, losses: str) -> None:
            if done * 10 // steps > (done - 1) * 10 // steps:
                tell(console, f"Fitting: step {done}/{steps}, losses {losses}")

        yield lines
        return
    columns = (TextColumn("Fitting"), BarColumn(24), MofNCompleteColumn(), TextColumn("loss {task.fields[losses]}"))
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console
    ) as progress:
        task = progress.add_task("", total=steps, losses="")
        yield lambda done, losses: progress.update(task, completed=done, losses=losses)
