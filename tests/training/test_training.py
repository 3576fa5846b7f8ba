"""The moving average, keyed randomness, and stopping."""

import os
import signal

import pytest
import torch
from torch import nn

from pitools.training import EMA, graceful_interrupt, keyed_generator


@pytest.mark.parametrize("gamma", [0.0, 1.0, 7.0])
def test_ema_is_karras_power_profile(gamma: float) -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    ema, history = EMA(layer, gamma), []
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight.fill_(torch.sin(torch.tensor(float(step))))
        ema.update(layer)
        history.append(layer.weight.detach().clone())
    # In closed form: the weights of a product of (1 - β_j) and later β's.
    weights, left = [], 1.0
    for step in range(len(history), 0, -1):
        beta = (1 - 1 / step) ** (gamma + 1)
        weights.insert(0, left * (1 - beta))
        left *= beta
    assert sum(weights) == pytest.approx(1)  # nothing is left of the initial weights
    expected = sum(w * h for w, h in zip(weights, history, strict=True))
    torch.testing.assert_close(ema.module.weight, expected, rtol=1e-12, atol=1e-12)


def test_ema_of_long_runs_follows_the_power_of_the_step() -> None:
    gamma, steps = 7.0, 4000
    ema = EMA(nn.Linear(1, 1, bias=False, dtype=torch.float64), gamma)
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    for step in range(1, steps + 1):
        nn.init.constant_(layer.weight, step / steps)
        ema.update(layer)
    # ∫ s · s^γ ds / ∫ s^γ ds over [0, 1]
    assert float(ema.module.weight) == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)


def test_ema_copies_buffers_and_trains_nothing() -> None:
    norm = nn.BatchNorm1d(2)
    ema = EMA(norm)
    norm(torch.randn(8, 2))
    ema.update(norm)
    assert torch.equal(ema.module.running_mean, norm.running_mean)
    assert not any(p.requires_grad for p in ema.module.parameters())
    with pytest.raises(ValueError, match="gamma"):
        EMA(norm, -1.0)


def test_draws_are_a_function_of_seed_purpose_and_step() -> None:
    def draw(*key: object) -> list[float]:
        return torch.rand(4, generator=keyed_generator(*key)).tolist()  # type: ignore[arg-type]

    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    others = [draw(0, "noise", 4), draw(1, "noise", 3), draw(0, "times", 3)]
    assert all(other != draw(0, "noise", 3) for other in others)


def test_the_first_interrupt_only_asks_and_the_second_raises() -> None:
    before = signal.getsignal(signal.SIGINT)
    with graceful_interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
