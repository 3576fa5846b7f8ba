"""Few-step sampling: schedules, temperature, latents in and out."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from mixtures import randn, random
from torch import Tensor

from pitools import (
    DXPolicy,
    Factorisation,
    GaussianMixture,
    GMPolicy,
    Policy,
    Schedule,
    ShortcutPolicy,
    integrate,
    sample,
)
from pitools.metrics import energy_distance
from pitools.sampling import Look, auto_temperature
from pitools.types import PIXELWISE, POINTS, Conditions, Time

THREE_STEPS, SHIFTED, AUTO = Schedule(nfe=3), Schedule(nfe=2, shift=2.0), Schedule(nfe=4, temperature="auto")
PRIOR = GaussianMixture(2 * randn(random(0), 5, 2), torch.zeros(5), 0.1)


@dataclass
class ExactStudent:
    """Answers with the exact posterior of PRIOR."""

    schedule: Schedule = THREE_STEPS
    factorisation: Factorisation = POINTS
    looks: list[tuple[float, Conditions | None]] = field(default_factory=list)

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        self.looks.append((float(t_src), conditions))
        seen = PRIOR.condition(x_src, t_src)
        mixture = GaussianMixture(seen.means[:, None], seen.log_weights[:, None], seen.variance[:, None])
        return GMPolicy(mixture, x_src[:, None], t_src)


@pytest.mark.parametrize("nfe", [1, 2, 4, None])
def test_an_exact_student_reproduces_the_teacher_at_any_nfe(nfe: int | None) -> None:
    student, noise = ExactStudent(), randn(random(1), 100, 2)
    x = sample(student, noise, nfe)
    # The same raw grid: every boundary of 1, 2 and 4 steps is one of 128 substeps.
    tolerance = 1e-8 if nfe else 0.05
    torch.testing.assert_close(x, integrate(PRIOR, noise, 1.0, 0.0), rtol=0, atol=tolerance)
    assert len(student.looks) == (nfe or 3)


def test_the_schedule_is_the_students_unless_told() -> None:
    student, noise = ExactStudent(Schedule(nfe=4, shift=3.2, final_step_scale=0.5)), randn(random(1), 2, 2)
    sample(student, noise, conditions={"a": 1})
    assert [t for t, _ in student.looks] == pytest.approx([1, 0.8889, 0.7059, 0.3478], abs=1e-4)
    assert student.looks[0][1] == {"a": 1}
    student.looks.clear()
    sample(student, noise, nfe=2, shift=1.0, final_step_scale=1.0)
    assert [t for t, _ in student.looks] == pytest.approx([1, 0.5])


def test_temperature_is_left_out_of_the_last_step() -> None:
    noise = randn(random(1), 50, 2)
    cold = sample(ExactStudent(), noise, 2, temperature=0.3)
    student = ExactStudent()
    first = student(noise, 1.0).tempered(0.3)  # type: ignore[attr-defined]
    middle = integrate(first, noise[:, None], 1.0, 0.5)[:, 0]
    end = integrate(student(middle, 0.5), middle[:, None], 0.5, 0.0)[:, 0]
    torch.testing.assert_close(cold, end, rtol=0, atol=1e-12)
    assert (cold - sample(ExactStudent(), noise, 2)).abs().max() > 0.01
    torch.testing.assert_close(sample(ExactStudent(), noise, 1, temperature=0.3), sample(ExactStudent(), noise, 1))


def test_the_published_temperature_rule() -> None:
    assert [auto_temperature(n) for n in (1, 2, 4, 8, 11, 50)] == pytest.approx([1, 0.1, 0.3, 0.7, 1, 1])
    noise = randn(random(1), 20, 2)
    auto = sample(ExactStudent(Schedule(nfe=4, temperature="auto")), noise)
    torch.testing.assert_close(
        auto, sample(ExactStudent(Schedule(nfe=4)), noise, temperature=0.3), rtol=1e-9, atol=1e-9
    )


def test_images_come_back_as_images() -> None:
    @dataclass
    class Grid:
        schedule: Schedule = SHIFTED
        factorisation: Factorisation = PIXELWISE

        def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
            target = torch.arange(x_src[0].numel()).reshape(x_src[0].shape).expand_as(x_src).to(x_src)
            return DXPolicy(PIXELWISE.pack(target)[:, None], t_src, 0.0, 2.0)

    x = sample(Grid(), torch.randn(2, 3, 4, 5, generator=random(0)))
    torch.testing.assert_close(x[1], torch.arange(60.0).reshape(3, 4, 5), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="no temperature"):
        sample(Grid(), torch.zeros(1, 3, 4, 5), temperature=0.3)


def test_bad_schedules_are_refused() -> None:
    for bad in ({"nfe": 0}, {"shift": -1.0}, {"final_step_scale": 0.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sample(ExactStudent(), torch.zeros(1, 2), **bad)


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_substeps_follow_the_schedules_shift(shift: float) -> None:
    noise = randn(random(1), 100, 2)
    x = sample(ExactStudent(Schedule(nfe=4, shift=shift)), noise)
    torch.testing.assert_close(x, integrate(PRIOR, noise, 1.0, 0.0, shift=shift), rtol=0, atol=1e-8)


@pytest.mark.parametrize("strength", [0.5, 1.0, math.inf])
def test_renoising_keeps_the_marginals_and_follows_its_generator(strength: float) -> None:
    noise = randn(random(1), 4000, 2)
    ode = sample(ExactStudent(), noise, 4)
    x = sample(ExactStudent(), noise, 4, renoise=strength, generator=random(2))
    assert torch.equal(x, sample(ExactStudent(), noise, 4, renoise=strength, generator=random(2)))
    assert (x - ode).abs().mean() > 0.5  # other samples,
    data = [PRIOR.sample((4000,), generator=random(seed)) for seed in (3, 4)]
    assert energy_distance(x, data[0]) < 2 * energy_distance(*data)  # of the same distribution
    with pytest.raises(ValueError, match="renoise"):
        sample(ExactStudent(), noise, renoise=-1.0)


def test_the_callback_sees_every_evaluation() -> None:
    looks: list[Look] = []
    noise = randn(random(1), 3, 2)
    x = sample(ExactStudent(), noise, 2, callback=looks.append)
    assert [(look.t_src, look.t_dst) for look in looks] == [(1.0, 0.5), (0.5, 0.0)]
    last = looks[-1]
    torch.testing.assert_close(integrate(last.policy, POINTS.pack(last.x), 0.5, 0.0)[:, 0], x, rtol=0, atol=0)


def test_the_published_rule_leaves_policies_without_temperature_alone() -> None:
    @dataclass
    class Straight:
        schedule: Schedule = AUTO
        factorisation: Factorisation = POINTS

        def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
            return ShortcutPolicy(torch.ones_like(x_src)[:, None], t_src)

    torch.testing.assert_close(sample(Straight(), torch.randn(2, 2)), torch.ones(2, 2), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="no temperature"):
        sample(Straight(), torch.zeros(2, 2), temperature=0.3)
