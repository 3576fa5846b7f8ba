"""The training loop on a network of a few numbers: steps written out, resuming, and what must stop it."""

import copy
import json
import math
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from pitools.draws import normal
from pitools.training.clock import Clock
from pitools.training.data import data_indices
from pitools.training.engine import Engine, EngineSection
from pitools.training.errors import CheckpointError, DivergenceError, Stopped
from pitools.training.jobs import Batch, Call, Helper, Part
from pitools.training.loop import Training, train
from pitools.training.optimiser import Optimiser, learning_rate_at
from pitools.training.random import sample_generators
from pitools.types import Conditions

STEPS = 7


@dataclass(frozen=True)
class Points:
    """Twelve points; the label of each is its number."""

    values: Tensor = field(default_factory=lambda: torch.linspace(-1, 2, 36).reshape(12, 3))

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        rows = torch.tensor(indices)
        return self.values[rows], {"labels": rows}


@dataclass(frozen=True)
class Regression:
    """A job of several parts: each is a different function of the batch and of its own draws.

    spoil: turns the loss of (step, part index) into what it likes.
    """

    network: nn.Module
    parts: Sequence[str] = ("part 1 of 2", "part 2 of 2")
    reads_data: ClassVar[bool] = True
    spoil: Callable[[int, int, Tensor], Tensor] = lambda step, index, loss: loss
    helper: Helper | None = None

    def losses(self, network: Call, step: int, batch: Batch, clock: Clock) -> Iterator[Part]:
        for index in range(len(self.parts)):
            noise = normal(batch.latents.shape, batch.randomness, batch.latents)
            labels = torch.as_tensor(batch.conditions["labels"]).unsqueeze(1)
            with clock.in_network():
                answer = network(batch.latents + noise, noise.sum(1))
            loss = (answer - 0.1 * labels - index).square().mean()
            yield Part(self.spoil(step, index, loss), partial(str, self.parts[index]))


class Network(nn.Module):
    """A line, an affine map that is frozen, and a mode that evaluation must switch."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.line = nn.Linear(3, 1)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        with torch.no_grad():
            for value in self.parameters():
                value.copy_(torch.randn(value.shape, generator=generator))

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        answer: Tensor = self.line(self.frozen(x).tanh() + 0.1 * t.unsqueeze(1))
        return answer


SECTION = Training(
    steps=STEPS,
    batch=6,
    ema_gamma=3.0,
    checkpoint_every=2,
    log_every=3,
    optimiser=Optimiser(learning_rate=0.05, warmup_steps=3, decay="cosine", clip=0.5),
)


def run(folder: Path, job: Regression, section: Training = SECTION, **options: Any) -> dict[str, Tensor]:
    engine = Engine(EngineSection(device="cpu", tensorboard=False))
    console = options.pop("console", Console(quiet=True))
    return train(job, section, Points(), engine, seed=5, folder=folder, name="job", console=console, **options)  # type: ignore[arg-type]


def steps_in(folder: Path) -> list[str]:
    path = folder / "checkpoints"
    return sorted(entry.name for entry in path.iterdir()) if path.exists() else []


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def written_out(section: Training) -> tuple[Network, dict[str, Tensor], list[float], list[float]]:
    """The same training with torch alone: network, averages, losses and gradient norms."""
    network = Network()
    trained = dict(network.line.named_parameters(prefix="line"))
    chosen = section.optimiser
    adam = torch.optim.AdamW(trained.values(), betas=chosen.betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
    averages = {name: value.detach().clone() for name, value in trained.items()}
    losses, norms = [], []
    for step in range(section.steps):
        indices = data_indices(5, 12, step, section.batch, range(section.batch))
        randomness = sample_generators(5, "train job", step, range(section.batch))
        latents, conditions = Points().batch(indices)
        total = 0.0
        clock = Clock(torch.device("cpu"))
        for part in Regression(network).losses(
            network, step, Batch(latents, conditions, randomness, range(section.batch)), clock
        ):
            part.loss.backward()
            total += float(part.loss.detach())
        norm = torch.stack([value.grad.norm() for value in trained.values() if value.grad is not None]).norm()
        if step >= chosen.warmup_steps and norm > chosen.clip:
            for value in trained.values():
                assert value.grad is not None
                value.grad *= chosen.clip / norm
        adam.param_groups[0]["lr"] = learning_rate_at(chosen, step, section.steps)
        adam.step()
        adam.zero_grad()
        share = (1 - 1 / (step + 1)) ** (section.ema_gamma + 1)
        averages = {name: share * averages[name] + (1 - share) * value.detach() for name, value in trained.items()}
        losses.append(total)
        norms.append(float(norm))
    return network, averages, losses, norms


def test_a_run_is_its_steps_written_out(tmp_path: Path) -> None:
    network, averages, losses, norms = written_out(SECTION)
    assert max(norms[3:]) > 0.5  # clipped at least once, and only after the warm-up
    job = Regression(Network())
    got = run(tmp_path, job)
    assert set(got) == {"line.weight", "line.bias"}
    for name, average in averages.items():
        torch.testing.assert_close(got[name], average, rtol=1e-5, atol=1e-6)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(job.network.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(job.network.state_dict()["frozen.weight"], Network().frozen.weight)
    logged = lines(tmp_path)
    assert [line["step"] for line in logged] == [3, 6, 7]
    for line, steps in zip(logged, ([0, 1, 2], [3, 4, 5], [6]), strict=True):
        assert line["loss"] == pytest.approx(sum(losses[step] for step in steps) / len(steps), rel=1e-5)
        assert line["gradient_norm"] == pytest.approx(sum(norms[step] for step in steps) / len(steps), rel=1e-5)
        assert line["learning_rate"] == learning_rate_at(SECTION.optimiser, steps[-1], STEPS)
        assert 0 < line["policy_share"] < 1


def test_accumulation_changes_the_rounding_alone(tmp_path: Path) -> None:
    once = run(tmp_path / "1", Regression(Network()))
    thrice = run(tmp_path / "3", Regression(Network()), replace(SECTION, accumulation=3))
    for name, value in once.items():
        torch.testing.assert_close(thrice[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(lines(tmp_path / "1"), lines(tmp_path / "3"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="batch 6 does not divide into 4 accumulation steps"):
        replace(SECTION, accumulation=4)


def test_checkpoints_come_in_time_and_the_oldest_go(tmp_path: Path) -> None:
    run(tmp_path, Regression(Network()), replace(SECTION, keep=3))
    assert steps_in(tmp_path) == ["step-00000004", "step-00000006", "step-00000007"]
    last = tmp_path / "checkpoints" / "step-00000007"
    assert set(load_file(last / "model.safetensors")) == {"line.weight", "line.bias"}  # and nothing that is frozen


class Cut(Exception):  # noqa: N818 - a test's own
    pass


def cut_at(step: int, part: int = 0) -> Callable[[int, int, Tensor], Tensor]:
    def spoil(now: int, index: int, loss: Tensor) -> Tensor:
        if (now, index) == (step, part):
            raise Cut
        return loss

    return spoil


@pytest.mark.parametrize("step", range(STEPS))
def test_a_run_cut_at_any_step_ends_with_the_same_bits(step: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Regression(Network()))
    with pytest.raises(Cut):
        run(tmp_path / "cut", Regression(Network(), spoil=cut_at(step, step % 2)))
    job = Regression(Network())
    asked: list[int] = []
    again = run(tmp_path / "cut", replace(job, spoil=lambda now, index, loss: (asked.append(now), loss)[1]))
    assert asked[0] == step - step % 2  # from the checkpoint, not from the start
    for name, value in whole.items():
        assert torch.equal(again[name], value)
    for name in ("model", "ema", "optimiser"):
        last = f"checkpoints/step-00000007/{name}.safetensors"
        a, b = load_file(tmp_path / "whole" / last), load_file(tmp_path / "cut" / last)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    keys = ("step", "loss", "learning_rate", "gradient_norm")
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert [a[key] for key in keys] == [b[key] for key in keys]


def test_a_finished_run_trains_no_more_and_returns_the_same(tmp_path: Path) -> None:
    first = run(tmp_path, Regression(Network()))
    again = run(tmp_path, Regression(Network(), spoil=cut_at(STEPS - 1)))
    assert all(torch.equal(again[name], value) for name, value in first.items())


def spoiled(step: int, part: int, change: Callable[[Tensor], Tensor]) -> Callable[[int, int, Tensor], Tensor]:
    return lambda now, index, loss: change(loss) if (now, index) == (step, part) else loss


NOT_FINITE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a loss that is NaN": (lambda loss: loss * torch.nan, "part 2 of 2: loss nan"),
    "a loss that is infinite": (lambda loss: loss * torch.inf, "part 2 of 2: loss inf"),
    # sqrt has no slope at 0: the loss stays as it was.
    "a gradient that is NaN": (lambda loss: loss + (loss * 0).sqrt(), "part 1 of 2, part 2 of 2: loss"),
}


@pytest.mark.parametrize(("change", "message"), NOT_FINITE.values(), ids=NOT_FINITE.keys())
@pytest.mark.parametrize("accumulation", [1, 2])
def test_what_is_not_finite_stops_the_run_before_it_reaches_the_weights(
    change: Callable[[Tensor], Tensor], message: str, accumulation: int, tmp_path: Path
) -> None:
    section = replace(SECTION, accumulation=accumulation)
    job = Regression(Network(), spoil=spoiled(4, 1, change))
    with pytest.raises(DivergenceError) as told:
        run(tmp_path, job, section)
    assert f"job, step 5, {message}" in str(told.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000004'}" in str(told.value)
    assert "\n" not in str(told.value)
    assert steps_in(tmp_path) == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in lines(tmp_path)] == [3]
    # The weights are those of step 4, and what was wrong once mended, the run goes on from there.
    saved = load_file(tmp_path / "checkpoints" / "step-00000004" / "model.safetensors")
    assert all(torch.equal(job.network.state_dict()[name], value) for name, value in saved.items())
    mended = run(tmp_path, Regression(Network()), section)
    whole = run(tmp_path / "whole", Regression(Network()), section)
    assert all(torch.equal(mended[name], value) for name, value in whole.items())


def test_a_first_step_that_is_not_finite_says_that_nothing_was_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"step 1, part 1 of 2: loss nan.*No checkpoint was saved yet"):
        run(tmp_path, Regression(Network(), spoil=spoiled(0, 0, lambda loss: loss * torch.nan)))
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("sheet", [False, True])
def test_a_policys_complaint_is_a_divergence_only_where_the_answer_is_not_finite(sheet: bool, tmp_path: Path) -> None:
    """As that of a mixture about its means, before there is any loss."""

    class Sometimes(Network):
        scale = 1.0

        def forward(self, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
            return super().forward(x, t) * self.scale

    def complain(step: int, index: int, loss: Tensor) -> Tensor:
        if (step, index) == (3, 1) and not sheet:
            raise ValueError("means hold a NaN")
        return loss

    def draw(call: Call, path: Path | None) -> None:
        call(torch.ones(1, 3), torch.ones(1))
        raise ValueError("means hold a NaN")

    section = replace(SECTION, sheet_every=4 if sheet else 0)
    network = Sometimes()
    with pytest.raises(ValueError, match="means hold a NaN"):
        run(tmp_path / "finite", Regression(network, spoil=complain), section, draw_sheet=draw)

    def infinite(step: int, index: int, loss: Tensor) -> Tensor:
        network.scale = torch.inf if (step, index) == (3, 0) else 1.0
        return complain(step, index, loss)

    def draw_infinite(call: Call, path: Path | None) -> None:
        network.scale = torch.inf
        draw(call, path)

    where = "sheet of step 4" if sheet else "step 4, part 2 of 2"
    network = Sometimes()
    job = Regression(network, spoil=complain if sheet else infinite)
    with pytest.raises(DivergenceError, match=f"job, {where}: the network's answer is not finite.*step-00000002"):
        run(tmp_path / "infinite", job, section, draw_sheet=draw_infinite)
    assert steps_in(tmp_path / "infinite") == ["step-00000002"]


def test_a_helper_is_trained_beside_as_it_would_be_alone(tmp_path: Path) -> None:
    """Bit for bit, each with its own optimiser; and the job itself as it would be without."""
    own = Optimiser(learning_rate=0.02, warmup_steps=1, clip=0.3)
    beside = Regression(Network(), parts=("its own",))
    helped = Regression(Network(), helper=Helper("other", beside, own))
    got = run(tmp_path / "helped", helped)
    alone = run(tmp_path / "alone", Regression(Network()))
    assert all(torch.equal(value, alone[name]) for name, value in got.items())

    other = Regression(Network(), parts=("its own",))
    section = replace(SECTION, optimiser=own)
    engine = Engine(EngineSection(device="cpu", tensorboard=False))
    quiet = Console(quiet=True)
    train(other, section, Points(), engine, seed=5, folder=tmp_path / "other", name="job other 0", console=quiet)  # type: ignore[arg-type]
    assert all(
        torch.equal(value, other.network.state_dict()[name]) for name, value in beside.network.state_dict().items()
    )
    assert not torch.equal(beside.network.line.weight, Network().line.weight)  # type: ignore[union-attr, arg-type]
    losses = [
        [line.get(key) for line in lines(tmp_path / name)]
        for name, key in (("helped", "auxiliary_loss"), ("other", "loss"))
    ]
    assert losses[0] == losses[1]
    assert all("auxiliary_loss" not in line for line in lines(tmp_path / "alone"))


def test_a_helper_is_updated_as_often_as_it_says(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    def told(name: str) -> Callable[[int, int, Tensor], Tensor]:
        return lambda step, index, loss: (asked.append((name, step)), loss)[1]

    beside = Regression(Network(), parts=("its own",), spoil=told("helper"))
    job = Regression(Network(), parts=("one",), spoil=told("job"), helper=Helper("other", beside, Optimiser(), 3))
    run(tmp_path, job, replace(SECTION, steps=2))
    assert asked == [(name, step) for step in (0, 1) for name in ("helper", "helper", "helper", "job")]


def test_a_helper_that_diverges_stops_the_run_before_its_weights_change(tmp_path: Path) -> None:
    beside = Regression(Network(), parts=("its own",), spoil=spoiled(4, 0, lambda loss: loss * math.nan))
    section = replace(SECTION, checkpoint_every=4)
    with pytest.raises(DivergenceError, match=r"job other, step 5, its own: loss nan.*step-00000004"):
        run(tmp_path, Regression(Network(), helper=Helper("other", beside, Optimiser())), section)
    saved = load_file(tmp_path / "checkpoints" / "step-00000004" / "other-model.safetensors")
    assert all(torch.equal(beside.network.state_dict()[name], value) for name, value in saved.items())


def test_weights_that_overflow_are_not_saved(tmp_path: Path) -> None:
    """Every loss and gradient is finite, until the twelfth step of 3e37 leaves float32."""
    network = Network()

    def pull(step: int, index: int, loss: Tensor) -> Tensor:
        return torch.stack([(value - value.detach()).sum() for value in network.line.parameters()]).sum()

    chosen = Optimiser(learning_rate=3e37, warmup_steps=0, clip=0)
    with pytest.raises(DivergenceError, match=r"job, step 12: line\.\w+ is no longer finite.*step-00000010"):
        run(tmp_path, Regression(network, ("all of it",), pull), replace(SECTION, steps=14, optimiser=chosen))
    assert steps_in(tmp_path) == ["step-00000008", "step-00000010"]


def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path: Path) -> None:
    def spoil(step: int, index: int, loss: Tensor) -> Tensor:
        if (step, index) == (2, 0):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    with pytest.raises(Stopped, match="job stopped at step 3 of 7") as told:
        run(tmp_path, Regression(Network(), spoil=spoil))
    assert told.value.signal == signal.SIGTERM
    assert steps_in(tmp_path) == ["step-00000002", "step-00000003"]
    again = run(tmp_path, Regression(Network()))
    whole = run(tmp_path / "whole", Regression(Network()))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


class Forgetful(Network):
    """It has dropout, which draws from torch's global state."""

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training), t, conditions)


def test_a_module_that_draws_for_itself_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Regression(Forgetful()))
    plain = run(tmp_path / "plain", Regression(Network()))
    assert not any(torch.equal(plain[name], value) for name, value in whole.items())
    with pytest.raises(Cut):
        run(tmp_path / "cut", Regression(Forgetful(), spoil=cut_at(3)))
    torch.rand(7)
    again = run(tmp_path / "cut", Regression(Forgetful()))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_signal_in_the_last_step_is_not_lost(tmp_path: Path) -> None:
    def interrupted(call: Call, path: Path | None) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # after the processes have agreed whether to stop

    section = replace(SECTION, sheet_every=STEPS)
    with pytest.raises(Stopped, match="job stopped at step 7 of 7") as told:
        run(tmp_path, Regression(Network()), section, draw_sheet=interrupted)
    assert told.value.signal == signal.SIGINT
    assert steps_in(tmp_path)[-1] == "step-00000007"


def test_sheets_show_the_averages_and_leave_the_weights_alone(tmp_path: Path) -> None:
    job = Regression(Network())
    drawn: list[tuple[str, dict[str, Tensor], bool, bool]] = []

    def draw(call: Call, path: Path | None) -> None:
        assert path is not None
        state = copy.deepcopy(job.network.state_dict())
        drawn.append((path.name, state, job.network.training, torch.is_grad_enabled()))
        assert torch.equal(call(torch.ones(1, 3), torch.ones(1)), job.network(torch.ones(1, 3), torch.ones(1)))

    got = run(tmp_path, job, replace(SECTION, sheet_every=STEPS), draw_sheet=draw)
    ((name, state, training, grad),) = drawn
    assert (name, training, grad) == ("step-000007.png", False, False)
    assert all(torch.equal(state[key], value) for key, value in got.items())
    assert job.network.training
    plain = Regression(Network())
    run(tmp_path / "plain", plain)
    for key, value in plain.network.state_dict().items():
        assert torch.equal(job.network.state_dict()[key], value)


def test_a_full_disk_names_the_sheet_and_the_checkpoint(tmp_path: Path) -> None:
    def draw(call: Call, path: Path | None) -> None:
        raise OSError(28, "No space left on device")

    job = Regression(Network())
    with pytest.raises(CheckpointError, match=r"step-000003\.png could not be written: No space left.*step-00000002"):
        run(tmp_path, job, replace(SECTION, sheet_every=3), draw_sheet=draw)
    assert steps_in(tmp_path) == ["step-00000002"]
    # With its own weights, not the averages.
    plain = Regression(Network())
    run(tmp_path / "plain", plain, replace(SECTION, steps=3, optimiser=replace(SECTION.optimiser, decay="constant")))
    for key, value in plain.network.state_dict().items():
        assert torch.equal(job.network.state_dict()[key], value)


def test_a_log_that_fails_again_on_closing_is_still_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pitools.training.log.RunLog._write", refuse)
    monkeypatch.setattr("pitools.training.log.RunLog.close", refuse)
    with pytest.raises(CheckpointError, match=r"log\.jsonl could not be written: No space left.*step-00000002"):
        run(tmp_path, Regression(Network()))


def test_refused_checkpoints_are_named_on_the_console(tmp_path: Path) -> None:
    """In full and on one line, also where a folder's name looks like the console's markup."""
    folder = tmp_path / "[bold]a long name " / ("x" * 80)
    with pytest.raises(Cut):
        run(folder, Regression(Network(), spoil=cut_at(5)))
    bad = folder / "checkpoints" / "step-00000004" / "ema.safetensors"
    bad.write_bytes(bad.read_bytes()[:-1])
    text = tmp_path / "console"
    with text.open("w") as file:
        run(folder, Regression(Network()), console=Console(file=file, width=80))
    told = text.read_text().splitlines()
    assert any(line.startswith(f"Refused: {bad} is truncated") for line in told)
    assert f"Going on from {bad.parent.with_name('step-00000002')}" in told


@pytest.mark.parametrize("key", ["steps", "batch", "accumulation", "checkpoint_every", "keep", "log_every"])
def test_counts_are_at_least_one(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} must be at least 1, got 0"):
        replace(SECTION, **{key: 0})
