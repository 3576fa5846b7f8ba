"""Keyed randomness, and stopping."""

import os
import signal

import pytest
import torch

from pitools.training import graceful_interrupt, keyed_generator


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
