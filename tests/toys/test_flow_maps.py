"""Training of flow maps by every method: what it changes, repeats, costs and refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixtures import random
from torch import Tensor

from pitools.objectives.flow_map import Prediction
from pitools.objectives.free_flow import FreeFlow
from pitools.training import DivergenceError
from toys.flow_maps import METHODS, FlowMapTraining, train
from toys.network import AtOnce, FromNoise, ToyFlowMap, one_step
from toys.targets import Target, load_target
from toys.training import Outcome

OBJECTIVE = FreeFlow(Prediction(steps=4, warmup=0), delay=0, correction_warmup=0)
SHORT = FlowMapTraining(steps=6, batch=32, learning_rate=1e-3, free_flow=OBJECTIVE, teacher_steps=8)


def trained(
    method: str, target: Target, training: FlowMapTraining = SHORT, seed: int = 0
) -> tuple[Outcome, ToyFlowMap]:
    network = ToyFlowMap(target.shape, target.classes, width=16, generator=random(0))
    return train(method, network, target, training, seed), network


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["ring8", "digits"])
def test_a_method_trains_and_its_seed_decides(method: str, name: str) -> None:
    target = load_target(name)
    start = ToyFlowMap(target.shape, target.classes, width=16, generator=random(0)).outlet.weight
    (outcome, network), (again, _), (other, _) = (trained(method, target, seed=seed) for seed in (0, 0, 1))
    assert not torch.equal(network.outlet.weight, start)
    own, same, different = (found.ema.averages["outlet.weight"] for found in (outcome, again, other))
    assert torch.equal(own, same)
    assert not torch.equal(own, different)
    noise = torch.randn(10, *target.shape, generator=random(1))
    ends = one_step(network, noise, target.labels(10, noise.device))
    assert ends.shape == noise.shape
    assert bool(ends.isfinite().all())


# Of 32 samples a step: 24 predict, with 2 answers for Heun's step, and 8 correct.
@pytest.mark.parametrize(
    ("method", "calls"),
    [
        ("freeflow", 24 * 2 + 8),
        ("prediction", 32 * 2),
        ("dmd", 32),
        ("meanflow", 32),
        ("consistency", 32),
        ("regression", 32 * 8),
    ],
)
def test_the_teacher_s_answers_are_counted(method: str, calls: int) -> None:
    assert trained(method, load_target("ring8"))[0].teacher_calls == 6 * calls


def test_progressive_distillation_asks_the_teacher_in_its_first_stage_alone() -> None:
    # 8 teacher steps are 3 stages, of 2 optimiser steps each; a jump is two of the teacher's.
    assert trained("progressive", load_target("ring8"))[0].teacher_calls == 2 * 2 * 32


def test_free_flow_sees_no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("data were asked for")

    monkeypatch.setattr(Target, "sample", refuse)
    for method in ("freeflow", "prediction", "dmd", "regression"):
        trained(method, load_target("ring8"))
    for method in ("meanflow", "consistency", "progressive"):
        with pytest.raises(AssertionError, match="data were asked for"):
            trained(method, load_target("ring8"))


def test_more_updates_of_the_auxiliary_network_lead_elsewhere() -> None:
    once, twice = (
        trained("freeflow", load_target("ring8"), replace(SHORT, auxiliary_updates=n))[0].ema.averages["outlet.weight"]
        for n in (1, 2)
    )
    assert not torch.equal(once, twice)


def test_a_loss_that_is_not_finite_ends_it_before_the_weights() -> None:
    target = load_target("ring8")
    network = ToyFlowMap(target.shape, width=16, generator=random(0))
    with torch.no_grad():
        network.inlet.bias[0] = math.nan
    kept = network.outlet.weight.clone()
    with pytest.raises(DivergenceError, match=r"step 1 \(freeflow\)"):
        train("freeflow", network, target, SHORT, 0)
    assert torch.equal(network.outlet.weight, kept)
    with pytest.raises(ValueError, match="freeflow, prediction, dmd"):
        train("freeflo", network, target, SHORT, 0)
    with pytest.raises(ValueError, match="power of two"):
        replace(SHORT, teacher_steps=12)


def test_training_stops_when_asked() -> None:
    target, seen = load_target("ring8"), list[int]()
    network = ToyFlowMap(target.shape, width=16, generator=random(0))
    outcome = train("regression", network, target, SHORT, 0, lambda step, _: seen.append(step), lambda: len(seen) == 2)
    assert seen == [1, 2]
    assert outcome.ema.steps == 2


def test_views_of_the_network() -> None:
    network = ToyFlowMap((2,), guided=True, width=16, generator=random(0))
    noise, delta = torch.randn(5, 2, generator=random(1)), torch.linspace(0, 1, 5)
    given = {"guidance": torch.full((5,), 1.5)}
    one = torch.ones(5)
    assert torch.equal(FromNoise(network)(noise, delta, given), network(noise, one, 1 - delta, given))
    assert torch.equal(AtOnce(network).velocity(noise, 0.5, given), network(noise, one / 2, one / 2, given))
    # A strength counts for nothing until it has been learned.
    assert torch.equal(network(noise, one, 0 * one, {"guidance": 2 * one}), network(noise, one, 0 * one, given))
    with pytest.raises(ValueError, match="conditioned on guidance"):
        network(noise, one, one)
