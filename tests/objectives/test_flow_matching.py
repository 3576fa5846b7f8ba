"""Flow matching: the formula, the law of its times, and the exact marginal velocity as its minimiser."""

import pytest
import torch
from mixtures import rand, randn, random
from scipy.stats import kstest
from torch import Tensor

from pitools import GaussianMixture, unshift_time
from pitools.objectives import flow_matching_loss
from pitools.types import Conditions, Time

PRIOR = GaussianMixture(2 * randn(random(0), 5, 2), randn(random(1), 5), 0.1 + rand(random(2), 5))


class Field:
    """The exact velocity of PRIOR plus a drift and a share of the state; it remembers what it was asked."""

    def __init__(self, drift: Tensor, share: Tensor) -> None:
        self.drift, self.share = drift, share
        self.asked: list[tuple[Tensor, Tensor, Conditions | None]] = []

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        assert isinstance(t, Tensor)
        self.asked.append((x_t, t, conditions))
        return PRIOR.velocity(x_t, t) + self.drift + self.share * x_t


def field(drift: float = 0.0, share: float = 0.0) -> Field:
    values = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (drift, share)]
    return Field(*values)


def test_the_exact_velocity_is_the_minimiser() -> None:
    x_0 = PRIOR.sample((20000,), generator=random(3))
    exact = field()
    losses = flow_matching_loss(exact, x_0, randomness=random(4))
    for parameter in (exact.drift, exact.share):
        # Each sample's gradient, and their mean against its standard error.
        x_t, t, _ = exact.asked[0]
        residual = PRIOR.velocity(x_t, t) - (x_t - x_0) / t[:, None]
        own = (residual * (x_t if parameter is exact.share else 1)).mean(1).detach()
        (gradient,) = torch.autograd.grad(losses.mean(), parameter, retain_graph=True)
        torch.testing.assert_close(gradient, own.mean(), rtol=1e-9, atol=1e-12)
        assert abs(float(gradient)) < 3.5 * float(own.std()) / 20000**0.5
    for drift, share in ((0.2, 0.0), (-0.2, 0.0), (0.0, 0.1), (0.0, -0.1)):
        worse = flow_matching_loss(field(drift, share), x_0, randomness=random(4))
        assert worse.mean() > losses.mean()


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_the_loss_is_the_formula_at_times_even_in_raw_time(shift: float) -> None:
    x_0, asked = PRIOR.sample((3000,), generator=random(3)), field(0.3, 0.2)
    labels = {"class_labels": torch.arange(3000)}
    losses = flow_matching_loss(asked, x_0, labels, random(4), shift)
    ((x_t, t, conditions),) = asked.asked
    assert conditions is labels
    assert kstest(unshift_time(t, shift).numpy(), "uniform").pvalue > 0.01
    u = (x_t - x_0) / t[:, None]
    expected = (u - field(0.3, 0.2).velocity(x_t, t)).square().sum(1) / 4
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    noise = (x_t - (1 - t[:, None]) * x_0) / t[:, None]
    assert kstest(noise[t > 0.01].flatten().numpy(), "norm").pvalue > 0.01


def test_no_time_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for share in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, share=share, **_: torch.full(shape, share))
        asked = field()
        losses = flow_matching_loss(asked, torch.randn(4, 2, generator=random(0)).bfloat16(), shift=0.3)
        assert losses.dtype == torch.float64  # the field's
        ((x_t, t, _),) = asked.asked
        assert x_t.dtype == t.dtype == torch.float32
        assert ((t > 0) & (t <= 1)).all()


def test_with_one_generator_for_each_sample_a_batch_may_be_cut() -> None:
    x_0 = PRIOR.sample((8,), generator=random(3))

    def losses(rows: slice) -> Tensor:
        return flow_matching_loss(field(0.1), x_0[rows], randomness=[random(seed) for seed in range(8)[rows]])

    cut = torch.cat([losses(slice(0, 4)), losses(slice(4, 8))])
    torch.testing.assert_close(losses(slice(0, 8)), cut, rtol=0, atol=1e-12)


def test_bad_arguments_are_refused() -> None:
    class Careless:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            return x_t[:1]

    x_0 = randn(random(0), 4, 2)
    with pytest.raises(ValueError, match="the field answered"):
        flow_matching_loss(Careless(), x_0)
    with pytest.raises(ValueError, match="shift must be a positive number, got 0"):
        flow_matching_loss(field(), x_0, shift=0.0)
