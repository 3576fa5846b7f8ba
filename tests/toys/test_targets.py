"""Targets: their teachers are exact, and their data is what they say."""

import pytest
import torch
from mixtures import random

from pitools import integrate
from pitools.guidance import Conditioned
from pitools.metrics import energy_distance, mode_report
from toys.targets import TARGETS, load_target

PLANE = [name for name in TARGETS if name != "digits"]


@pytest.mark.parametrize("name", PLANE)
def test_the_teacher_generates_the_data(name: str) -> None:
    target = load_target(name)
    data = [target.sample(3000, random(seed)) for seed in (0, 1)]
    noise = torch.randn(3000, 2, generator=random(2))
    with torch.no_grad():
        generated = integrate(Conditioned(target), noise, 1.0, 0.0)
    floor = energy_distance(*data)  # between two draws of the data itself
    assert energy_distance(generated, data[0]) < 2 * floor
    assert energy_distance(noise, data[0]) > 3 * floor


def test_separated_targets_have_their_modes() -> None:
    for name, count, std in (("ring8", 8, 0.1), ("grid25", 25, 0.08)):
        target = load_target(name)
        assert target.modes is not None
        assert (len(target.modes.means), target.modes.std) == (count, std)
        report = mode_report(target.sample(5000, random(0)), target.modes.means, std)
        assert report.covered == count
        assert report.off_mode < 0.002  # exp(-8) of a Gaussian in the plane lies beyond 4 deviations
    distances = torch.pdist(load_target("grid25").modes.means)  # type: ignore[union-attr]
    assert float(distances.min()) == pytest.approx(1)


def test_checkerboard_is_half_of_the_board() -> None:
    points = load_target("checkerboard").priors[0].means
    assert len(points) == 8 * 64
    assert (points.floor().sum(-1) % 2 == 0).all()
    assert float(points.abs().max()) < 2


def test_digits_are_the_data_set_one_mixture_a_class() -> None:
    target = load_target("digits")
    assert target.classes == 10
    assert sum(len(prior.means) for prior in target.priors) == 1797
    assert all((prior.variance == 0).all() for prior in target.priors)
    labels = {"class_labels": torch.tensor([3, 3, 7, 0])}
    x = target.sample(4, random(0), labels)
    assert x.shape == (4, 1, 8, 8)
    assert float(x.min()) >= -1
    assert float(x.max()) <= 1
    for image, label in zip(x, [3, 3, 7, 0], strict=True):
        assert (image.flatten() == target.priors[label].means).all(-1).any()


def test_digits_velocity_is_each_class_own_discrete_limit() -> None:
    target, g = load_target("digits"), random(0)
    x, t = torch.randn(6, 1, 8, 8, generator=g), torch.tensor([0.9, 0.5, 0.2, 0.9, 0.5, 0.2])
    labels = torch.tensor([4, 1, 1, 9, 4, 0])
    u = target.velocity(x, t, {"class_labels": labels})
    for i in range(6):
        points = target.priors[int(labels[i])].means
        weights = torch.softmax(-(x[i].flatten() - (1 - t[i]) * points).square().sum(-1) / (2 * t[i] ** 2), dim=0)
        expected = (x[i].flatten() - weights @ points) / t[i]
        torch.testing.assert_close(u[i].flatten(), expected, rtol=1e-3, atol=1e-3)


def test_bad_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="ring8, grid25, spiral, moons, checkerboard, digits"):
        load_target("circle")
    digits = load_target("digits")
    x = torch.zeros(2, 1, 8, 8)
    for conditions in (None, {}, {"class_labels": torch.tensor([1])}, {"class_labels": torch.tensor([1, 10])}):
        with pytest.raises(ValueError, match="class"):
            digits.velocity(x, 0.5, conditions)
