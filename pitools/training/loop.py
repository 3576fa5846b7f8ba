"""The training loop. A step from top to bottom:

    a turn of the job's helper, if it has one, and one of its own:
        for each accumulation step:  rows of the global batch -> data and draws keyed by (seed, step, row)
            for each part of the loss:  forward, backward
        one reduction: losses, and whether to stop -> check that everything is finite
        clip, optimiser step
    EMA, log; now and then a checkpoint or a sheet of samples

Every number of a step is a function of the recipe and the step, so that a run which goes on from a checkpoint
ends with the same bits.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from pitools.training import checkpoint
from pitools.training.clock import Clock
from pitools.training.data import Data, Ordered, data_indices, to_device
from pitools.training.ema import EMA
from pitools.training.engine import Engine
from pitools.training.errors import CheckpointError, DivergenceError, Stopped
from pitools.training.interrupt import Interrupt, graceful_interrupt
from pitools.training.jobs import Batch, Call, Job
from pitools.training.log import RunLog, StepRecord, peak_memory, tell
from pitools.training.optimiser import Optimiser, build_optimiser, clip_at, learning_rate_at, local
from pitools.training.random import keyed_generator, sample_generators

EMA_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "own": None}


@dataclass(frozen=True)
class Training:
    """The recipe's section [training], or [teacher.training].

    steps: optimiser steps.  batch: samples a step, over all processes and accumulation steps.  accumulation: how
    many forward and backward passes a step is split into.  ema_gamma: Karras's γ.  ema_dtype, ema_device: of the
    averages; "own" is each parameter's.  checkpoint_every, log_every, sheet_every: in steps; no sheets with 0, else
    one at the end, too.  sheet_images: in a row of a sheet.  keep: how many checkpoints stay.
    """

    steps: int
    batch: int
    accumulation: int = 1
    ema_gamma: float = 7.0
    ema_dtype: Literal["float32", "bfloat16", "own"] = "float32"
    ema_device: Literal["own", "cpu"] = "own"
    checkpoint_every: int = 250
    keep: int = 2
    log_every: int = 10
    sheet_every: int = 0
    sheet_images: int = 20
    optimiser: Optimiser = field(default_factory=Optimiser)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulation", "checkpoint_every", "keep", "log_every", "sheet_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulation:
            raise ValueError(
                f"batch {self.batch} does not divide into {self.accumulation} accumulation steps; use a multiple"
            )
        if self.sheet_every < 0:
            raise ValueError(f"sheet_every must not be negative, got {self.sheet_every}")
        if not self.ema_gamma >= 0:
            raise ValueError(f"ema_gamma must not be negative, got {self.ema_gamma}")


def train(
    job: Job,
    section: Training,
    data: Data,
    engine: Engine,
    *,
    seed: int,
    folder: Path,
    name: str,
    console: Console,
    draw_sheet: Callable[[Call, Path | None], None] | None = None,
) -> dict[str, Tensor]:
    """Train `job` to its last step, from the newest good checkpoint in `folder` if there is one.

    name: of the run on the console and among the keys of its draws.  draw_sheet: given the averaged network and
    where to draw to (None on every process but the first, all of which call it).
    Returns the averaged weights, whole and on the CPU, to the main process, and nothing to others. Raises
    `DivergenceError` at the first loss or gradient that is not finite, before it reaches the weights, and for weights
    that are not, before they are saved; `Stopped` after a signal, with everything saved; `CheckpointError` where
    nothing can be saved, naming the last good checkpoint.
    """
    own = _trainee(job, section.optimiser, name, engine)
    trainees, updates, plain = [own], 0, job.network
    if job.helper is not None:
        helper, updates = job.helper, job.helper.updates
        trainees.append(_trainee(helper.job, helper.optimiser, f"{name} {helper.name}", engine, f"{helper.name}-"))
    ema_device = None if section.ema_device == "own" else section.ema_device
    ema = EMA(plain, section.ema_gamma, EMA_DTYPES[section.ema_dtype], ema_device)
    checkpoints = folder / "checkpoints"
    start, log_state = _resume(checkpoints, trainees, ema, engine, console)
    if not engine.agreed(start):
        raise CheckpointError(f"the processes see other checkpoints in {checkpoints}; it must be a folder they share")

    run = _Run(section, data, seed, engine, checkpoints)
    finite: list[Tensor] = []
    averaged = _watched(own.network, engine, finite)
    with _writing(folder / "log.jsonl", checkpoints):
        log = RunLog(
            folder if engine.main else None,
            console if engine.main else None,
            section.steps,
            name,
            start,
            engine.section.tensorboard,
            section.log_every,
            log_state,
        )
    with _closed(log, folder / "log.jsonl", checkpoints), graceful_interrupt() as interrupt:
        for step in range(start, section.steps):
            clock = Clock(engine.device)
            helped: float | None = None
            for update in range(updates):
                helped = _turn(run, trainees[-1], step, f" {update}", clock, interrupt).loss
            last = _turn(run, own, step, "", clock, interrupt)
            ema.update(plain)

            done, seconds = step + 1, clock.seconds
            memory = peak_memory(engine.device)
            with _writing(folder / "log.jsonl", checkpoints):
                told = (last.loss, last.rate, last.norm, seconds, clock.network, clock.policy, memory, helped)
                log.record(StepRecord(done, *told))
            due = section.sheet_every and (done % section.sheet_every == 0 or done == section.steps)
            if draw_sheet is not None and due:
                sheet = folder / "samples" / f"step-{done:06d}.png"
                where = f"{name}, sheet of step {done}"
                with _answered(finite, where, checkpoints), _writing(sheet, checkpoints), ema.applied(plain):
                    plain.eval()
                    with torch.no_grad():
                        draw_sheet(averaged, sheet if engine.main else None)
                    plain.train()
                    log.image("samples", sheet, done)
            if last.stop or done == section.steps or done % section.checkpoint_every == 0:
                _save(run, name, done, trainees, ema, log)
            if last.stop and done < section.steps:
                raise _stopped(name, done, section.steps, interrupt)
        if start == section.steps:
            # Killed right after its last checkpoint: written again, it clears away what the kill left of older ones.
            _save(run, name, start, trainees, ema, log)
        # A signal during the last step must not be lost on what comes after this training.
        if engine.mean(_flag(interrupt, engine.device)).item():
            raise _stopped(name, section.steps, section.steps, interrupt)
    return checkpoint.taken(ema.averages)


@dataclass(frozen=True)
class _Run:
    """What all turns of a training have in common."""

    section: Training
    data: Data
    seed: int
    engine: Engine
    checkpoints: Path


@dataclass(frozen=True)
class _Trainee:
    """A job, its network as the processes share it, and its optimiser. files: what its files of a checkpoint begin
    with."""

    job: Job
    name: str
    network: nn.Module
    named: list[tuple[str, nn.Parameter]]
    section: Optimiser
    optimiser: torch.optim.Optimizer
    files: str


def _trainee(job: Job, section: Optimiser, name: str, engine: Engine, files: str = "") -> _Trainee:
    network, plain = engine.prepare(job.network), job.network
    plain.train()
    named = [(key, value) for key, value in plain.named_parameters() if value.requires_grad]
    optimiser = build_optimiser(section, plain.parameters(), sharded=engine.sharded)
    return _Trainee(job, name, network, named, section, optimiser, files)


@dataclass(frozen=True)
class _Turn:
    """What a turn came to. stop: whether the processes agreed to stop."""

    loss: float
    rate: float
    norm: float
    stop: bool


def _turn(run: _Run, trainee: _Trainee, step: int, update: str, clock: Clock, interrupt: Interrupt) -> _Turn:
    """One update of a network; `update` tells those of a step apart."""
    section, engine, job, name = run.section, run.engine, trainee.job, trainee.name
    finite: list[Tensor] = []  # flags of the network's last answer, which nobody waits for unless something fails
    call = _watched(trainee.network, engine, finite)
    losses: list[Tensor] = []
    told: list[Tensor] = []
    places: list[Callable[[], str]] = []
    rows = engine.rows(section.batch, section.accumulation)
    for micro, own in enumerate(rows):
        batch = _batch(run, job, f"{name}{update}", step, own)
        computed = job.losses(call, step, batch, clock)
        for index, part in enumerate(job.parts):
            last = micro == len(rows) - 1 and index == len(job.parts) - 1
            with engine.syncing(trainee.network, last):
                where = f"{name}, step {step + 1}, {part}"
                with _answered(finite, where, run.checkpoints), clock.forward():
                    share = next(computed)
                    loss = share.loss / len(rows)
                with clock.backward():
                    loss.backward()
            losses.append(loss.detach())
            told.append(losses[-1] if share.told is None else share.told.detach() / len(rows))
            places.append(share.where)

    *means, stop = engine.mean(torch.stack([*losses, *told, _flag(interrupt, engine.device)])).tolist()
    values, shown = means[: len(losses)], means[len(losses) :]
    norm = _clipped([value for _, value in trainee.named], clip_at(trainee.section, step))
    if not all(map(math.isfinite, [*values, norm])):
        raise _diverged(name, step, values, [place() for place in places], norm, run.checkpoints)
    rate = learning_rate_at(trainee.section, step, section.steps)
    for group in trainee.optimiser.param_groups:
        group["lr"] = rate
    trainee.optimiser.step()
    trainee.optimiser.zero_grad(set_to_none=True)
    return _Turn(sum(shown), rate, norm, bool(stop))


def _watched(network: nn.Module, engine: Engine, finite: list[Tensor]) -> Call:
    """The network as the engine calls it, which notes in `finite` whether its last answer was."""

    def call(x: Tensor, t: Tensor, conditions: Mapping[str, object] | None = None) -> object:
        answer = engine.call(network, x, t, conditions)
        finite[:] = [value.detach().isfinite().all() for value in (answer if isinstance(answer, tuple) else (answer,))]
        return answer

    return call


def _batch(run: _Run, job: Job, name: str, step: int, rows: range) -> Batch:
    seed, data, engine = run.seed, run.data, run.engine
    generators = sample_generators(seed, f"train {name}", step, rows)
    if job.reads_data:
        latents, conditions = data.batch(_indices(data, seed, step, run.section.batch, rows))
    else:
        latents, conditions = torch.empty(len(rows), *data.shape), {}
    # Modules draw from torch's global state, as dropout does: it is keyed by the first row, for all of them.
    torch.manual_seed(keyed_generator(seed, f"modules {name}", step, sample=rows.start).initial_seed())
    return Batch(latents.to(engine.device), to_device(conditions, engine.device), generators, rows)


def _indices(data: Data, seed: int, step: int, size: int, rows: range) -> Sequence[int]:
    """Which samples these rows are: the data's own choice, where a batch must be of one size."""
    if isinstance(data, Ordered):
        return data.indices(seed, step, size, rows)
    return data_indices(seed, len(data), step, size, rows)


def _flag(interrupt: Interrupt, device: torch.device) -> Tensor:
    """1 where this process was asked to stop: then all of them do."""
    return torch.tensor(float(interrupt.requested), device=device)


def _stopped(name: str, done: int, steps: int, interrupt: Interrupt) -> Stopped:
    # A process that got no signal stops with the others; what launched it sends SIGTERM.
    return Stopped(f"{name} stopped at step {done} of {steps}", interrupt.signal or signal.SIGTERM)


@contextmanager
def _answered(finite: list[Tensor], where: str, checkpoints: Path) -> Iterator[None]:
    """Within it, what a policy says against an answer of the network that is not finite is a `DivergenceError`."""
    try:
        yield
    except ValueError as error:
        if all(map(bool, finite)):
            raise
        raise DivergenceError(
            f"{where}: the network's answer is not finite; nothing of it was saved. {_kept(checkpoints)}. "
            "A lower learning rate or a smaller clip may help, unless the data is not finite"
        ) from error


@contextmanager
def _writing(path: Path, checkpoints: Path) -> Iterator[None]:
    """Within it, a disk that refuses is a `CheckpointError`: it names the file, and what there is to go on from."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{path} could not be written: {reason}. {_kept(checkpoints)}") from error


@contextmanager
def _closed(log: RunLog, path: Path, checkpoints: Path) -> Iterator[None]:
    """Closes the log; a full disk that refuses its last bytes too does not hide the error that came before."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            log.close()
        raise
    with _writing(path, checkpoints):
        log.close()


def _kept(checkpoints: Path) -> str:
    last = checkpoint.newest(checkpoints)
    return f"The last good checkpoint is {last}" if last else "No checkpoint was saved yet"


def _clipped(parameters: list[nn.Parameter], most: float) -> float:
    """The gradient's norm; where it is more than `most`, the gradient is scaled down to that."""
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _diverged(
    name: str, step: int, values: list[float], names: list[str], norm: float, checkpoints: Path
) -> DivergenceError:
    bad = [part for part, value in zip(names, values, strict=True) if not math.isfinite(value)]
    # The gradient is the sum over all parts: where every loss is finite, none of them can be told from the others.
    where = bad[0] if bad else ", ".join(dict.fromkeys(names))
    return DivergenceError(
        f"{name}, step {step + 1}, {where}: loss {sum(values)}, gradient norm {norm}; nothing of it was saved. "
        f"{_kept(checkpoints)}. A lower learning rate or a smaller clip may help"
    )


def _save(run: _Run, name: str, step: int, trainees: Sequence[_Trainee], ema: EMA, log: RunLog) -> None:
    # A finite gradient can still be too large a step; the next loss would tell, but after this checkpoint.
    engine, folder = run.engine, run.checkpoints
    named = [(trainee.files + key, value) for trainee in trainees for key, value in trainee.named]
    bad = next((key for key, value in named if not bool(local(value.detach()).isfinite().all())), None)
    for key in engine.on_each(lambda: bad):
        if key is not None:
            raise DivergenceError(
                f"{name}, step {step}: {key} is no longer finite; nothing of it was saved. {_kept(folder)}. "
                "A lower learning rate may help"
            )
    form = engine.section.checkpoints if engine.sharded else "consolidated"
    tensors: dict[str, Mapping[str, Tensor]] = {"ema": checkpoint.taken(ema.state_dict(), form)}
    for trainee in trainees:
        tensors[f"{trainee.files}model"] = checkpoint.taken(dict(trainee.named), form)
        tensors[f"{trainee.files}optimiser"] = checkpoint.optimiser_tensors(trainee.optimiser, trainee.named, form)
    with _writing(folder, folder):
        checkpoint.save(folder, step, tensors, {"log": log.state()}, run.section.keep, form, engine)


def _resume(
    folder: Path, trainees: Sequence[_Trainee], ema: EMA, engine: Engine, console: Console
) -> tuple[int, Mapping[str, object] | None]:
    """The step to go on from, and the log's state there; 0 and None for a new run."""
    refused: list[Exception] = []
    found = checkpoint.latest(folder, refused.append)
    if engine.main:
        for error in refused:
            console.print(f"Refused: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if found is None:
        return 0, None
    files = {"ema", *(trainee.files + kind for trainee in trainees for kind in ("model", "optimiser"))}
    checkpoint.check_keys(f"the files of {found.path}", files, found.tensors)
    for trainee in trainees:
        weights = found.tensors[f"{trainee.files}model"]
        checkpoint.check_keys(f"the {trainee.files}model in {found.path}", [key for key, _ in trainee.named], weights)
        with torch.no_grad():
            for key, parameter in trainee.named:
                parameter.copy_(checkpoint.placed(weights[key], parameter, key))
        checkpoint.restore_optimiser(trainee.optimiser, trainee.named, found.tensors[f"{trainee.files}optimiser"])
    ema.load_state_dict(found.tensors["ema"])
    if engine.main:
        tell(console, f"Going on from {found.path}")
    return found.step, found.meta["log"]
