"""`pitools rivals`: equal budgets, a search that keeps to its own seeds, a ledger, and tables of every method."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from click.testing import Result
from mixtures import random
from torch import Tensor
from typer.testing import CliRunner

from pitools import GaussianMixture, integrate
from pitools.path import diffuse
from pitools.training import DivergenceError
from pitools.types import Conditions
from toys import jobs
from toys.cli import rivals
from toys.evaluation import Evaluation
from toys.flow_maps import Now, auxiliary_errors, train
from toys.jobs import EVALUATION_SEEDS, FLOW_MAPS, METHODS, TRIO, Found, Job, Ledger, Setting, flow_map_training
from toys.network import ToyFlowMap
from toys.rivals import SHIPPED, read_settings, report_jobs, why_jobs
from toys.search import KEPT, REPORT_SEEDS, SEARCH_SEEDS, SPACES, search
from toys.targets import load_target


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Evaluations of a few samples."""
    monkeypatch.setattr(jobs, "SAMPLES", {1: 64, 3: 20})
    jobs._evaluation.cache_clear()
    yield
    jobs._evaluation.cache_clear()


def pretend(job: Job) -> Found:
    """A result that depends on the setting alone, and likes large alpha, low r and small rates."""
    s = job.setting
    worth = s.r_mean - s.alpha + 100 * s.learning_rate + s.N / 100
    return Found(job, 1, 1, 0.1, {"sliced_wasserstein": worth}, ())


def command(*args: str) -> Result:
    app = typer.Typer()
    app.command()(rivals)
    return CliRunner().invoke(app, args)


def test_seeds_and_evaluations_of_search_and_report_are_apart() -> None:
    assert not set(SEARCH_SEEDS) & set(REPORT_SEEDS)
    assert EVALUATION_SEEDS["search"] != EVALUATION_SEEDS["report"]
    target = load_target("ring8")
    noises = [Evaluation.prepare(target, 5, torch.device("cpu"), seed).noise for seed in EVALUATION_SEEDS.values()]
    assert not torch.equal(*noises)


@pytest.mark.parametrize("method", FLOW_MAPS)
@pytest.mark.parametrize("setting", [Setting(), Setting(N=0, delay=0.5), Setting(solver="euler", share=0.5, delay=0.0)])
def test_a_method_asks_the_teacher_as_often_as_it_may(method: str, setting: Setting) -> None:
    setting, calls = replace(setting, width=8, batch=16), 3000
    training = flow_map_training(method, setting, calls)
    asked = train(method, ToyFlowMap((2,), width=8), load_target("ring8"), training, 0).teacher_calls
    assert asked <= calls
    most = {"regression": 32 * 16, "progressive": calls}.get(method, 2 * 16)
    assert asked > calls - most


def test_too_few_calls_are_an_error() -> None:
    for method in FLOW_MAPS:
        with pytest.raises(ValueError, match="not enough for one step"):
            flow_map_training(method, Setting(), 500)


def test_a_search_keeps_to_its_seeds_and_finds_the_lowest() -> None:
    seen: list[Job] = []

    def result(job: Job) -> Found:
        seen.append(job)
        return pretend(job)

    best = search(result, "ring8", 12, 1000)
    assert {(job.purpose, job.calls) for job in seen} == {("search", 1000)}
    assert {job.seed for job in seen} == set(SEARCH_SEEDS)
    for method in TRIO:
        tried = {job.setting: pretend(job).metrics["sliced_wasserstein"] for job in seen if job.method == method}
        assert tried[best[method]] == min(tried.values())
        assert 6 < len(tried) <= 12
        again = {job.setting for job in seen if job.method == method and job.seed == SEARCH_SEEDS[1]}
        assert again == set(sorted(tried, key=tried.__getitem__)[:KEPT])
        for setting in tried:  # what a half does not know stays
            assert all(getattr(setting, key) == getattr(Setting(), key) for key in BOTH - SPACES[method].keys())
    first = next(job.setting for job in seen if job.method == "freeflow")
    assert (first.learning_rate, first.N) == (best["prediction"].learning_rate, best["prediction"].N)
    assert first.r_mean == best["dmd"].r_mean


BOTH = SPACES["freeflow"].keys()


def test_a_ledger_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Job] = []

    def execute(job: Job, on_step: object) -> Found:
        done.append(job)
        if len(done) == 5:
            raise KeyboardInterrupt
        return pretend(job)

    monkeypatch.setattr(jobs, "execute", execute)
    path = tmp_path / "runs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        search(Ledger(path).result, "ring8", 4, 1000)
    assert len(path.read_text().splitlines()) == 4
    best = search(Ledger(path).result, "ring8", 4, 1000)
    assert len(done) == len(set(done)) + 1  # the one that was stopped
    count = len(done)
    assert search(Ledger(path).result, "ring8", 4, 1000) == best
    assert len(done) == count


def test_a_line_that_was_cut_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "execute", lambda job, on_step: pretend(job))
    path, own = tmp_path / "runs.jsonl", [Job("search", "ring8", "dmd", Setting(), seed, 9) for seed in (0, 1)]
    for job in own:
        Ledger(path).result(job)
    path.write_text(path.read_text()[:-10])
    ledger = Ledger(path)
    assert set(ledger.done) == {own[0]}
    ledger.result(own[1])
    assert Ledger(path).done == {job: pretend(job) for job in own}


@pytest.mark.usefixtures("few")
def test_a_setting_that_diverges_loses_a_search_and_ends_a_report() -> None:
    job = Job("search", "ring8", "prediction", Setting(learning_rate=math.inf, width=8, batch=16), 0, 3000)
    assert jobs.execute(job).metrics == {"sliced_wasserstein": math.inf}
    with pytest.raises(DivergenceError):
        jobs.execute(replace(job, purpose="report"))


@pytest.mark.usefixtures("few")
@pytest.mark.slow
def test_search_and_report_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toys.rivals.REPORT_SEEDS", REPORT_SEEDS[:2])  # for the time that it takes
    out = tmp_path / "here"
    options = ["--target", "ring8", "--out", str(out), "--calls", "20000"]
    done = command("search", *options, "--runs", "1")
    assert done.exit_code == 0, done.output
    best = read_settings(out / "best.json", ["ring8"])
    assert set(best["ring8"]) == set(TRIO)
    done = command("report", *options, "--settings", str(out / "best.json"))
    assert done.exit_code == 0, done.output
    text = (out / "report-ring8.md").read_text()
    for name in ("teacher", *METHODS):
        assert f"| {name} |" in text
    assert {line.split(" | ")[0] for line in text[text.index("| r |") :].splitlines()[2:]} == {"| dmd", "| freeflow"}
    rows = json.loads((out / "report-ring8.json").read_text())["rows"]
    assert set(rows) == set(METHODS)
    for method, found in rows.items():
        assert [row["job"]["seed"] for row in found] == list(REPORT_SEEDS[:2])
        assert len({row["metrics"]["endpoint_rmse"] for row in found}) == 2, method
        assert all(0 < row["teacher_calls"] <= 20000 for row in found)
    for name in ("errors.png", "modes.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["serch"], "search, report, why"),
        (["report", "--target", "circle"], "ring8, grid25"),
        (["report", "--target", "spiral"], "no settings for spiral"),
        (["report", "--settings", "nowhere.json"], "nowhere.json does not exist"),
        (["search", "--target", "ring8", "--calls", "10"], "not enough for one step"),
    ],
)
def test_a_mistake_is_one_clear_error(args: list[str], message: str, tmp_path: Path) -> None:
    done = command(*args, "--out", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")
    assert "Traceback" not in done.output


def test_the_shipped_settings_serve_every_target_with_one_network() -> None:
    best = read_settings(SHIPPED, ["grid25", "ring8", "digits"])
    for target, chosen in best.items():
        planned = report_jobs(target, chosen, 10**6)
        assert set(planned) == set(METHODS)
        settings = [job.setting for own in planned.values() for job in own]
        assert len({(setting.width, setting.batch) for setting in settings}) == 1
        assert {job.seed for own in why_jobs(target, chosen, 10**6).values() for job in own} <= set(REPORT_SEEDS)


def test_the_error_along_the_path_is_that_of_an_independent_one() -> None:
    target, deltas = load_target("ring8"), [0.25, 0.5, 0.9, 1.0]
    evaluation = Evaluation.prepare(target, 20, torch.device("cpu"))

    def exact(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        end = integrate(target, x_t, 1.0, float(s[0]), "heun", 1 / 256)
        return (x_t - end) / (t - s).unsqueeze(1)

    def idle(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return torch.zeros_like(x_t)

    assert max(evaluation.path_errors(exact, deltas)) < 2e-3
    for delta, error in zip(deltas, evaluation.path_errors(idle, deltas), strict=True):
        end = integrate(target, evaluation.noise, 1.0, 1 - delta, "heun", 1 / 256)
        expected = (evaluation.noise - end).norm(dim=1).mean() / end.norm(dim=1).mean()
        assert error == pytest.approx(float(expected), rel=2e-3)


MEAN, STD = torch.tensor([1.0, -2.0]), 0.5
NORMAL = GaussianMixture(MEAN.unsqueeze(0), torch.zeros(1), STD**2)


def to_normal(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
    """A flow map whose samples are `NORMAL`'s."""
    return x_t - (MEAN + STD * x_t)


def test_the_velocity_of_noising_samples_is_the_closed_form_of_a_gaussian() -> None:
    field, t = Now(to_normal, random(0), count=40_000), torch.linspace(0.2, 0.9, 20)
    x = diffuse(MEAN + STD * torch.randn(20, 2, generator=random(1)), torch.randn(20, 2, generator=random(2)), t)
    torch.testing.assert_close(field.velocity(x, t), NORMAL.velocity(x, t), atol=0.1, rtol=0.05)
    with pytest.raises(ValueError, match="use at least 1"):
        field.velocity(x, t, {"class_labels": torch.zeros(20)})


def test_an_auxiliary_network_is_as_wrong_as_it_is_far_from_the_truth() -> None:
    target = load_target("ring8")

    def right(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return NORMAL.velocity(x_t, t)

    def blind(x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        return target.velocity(x_t, t)

    levels = (0.2, 0.5, 0.8)
    assert max(auxiliary_errors(right, to_normal, target, levels, random(0))) < 0.1
    assert auxiliary_errors(blind, to_normal, target, levels, random(0)) == pytest.approx([1.0] * 3)
    training = flow_map_training("freeflow", Setting(width=8, batch=16), 200)
    found = {
        method: train(method, ToyFlowMap((2,), width=8), target, training, 0).auxiliary for method in FLOW_MAPS[:4]
    }
    assert {method for method, network in found.items() if network is not None} == {"dmd", "freeflow"}
    exact = replace(training, auxiliary_updates=0)
    assert train("freeflow", ToyFlowMap((2,), width=8), target, exact, 0).auxiliary is None
