"""Best-of-N: a search by the student's samples, whose winner is the teacher's start."""

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from mixtures import randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, Policy, Schedule, ShortcutPolicy, Student, best_of, integrate, sample
from pitools.guidance import Conditioned
from pitools.types import POINTS, Conditions, Factorisation, Time

MODES = torch.tensor([[2.0, 0.0], [-2.0, 1.0], [0.0, -3.0]], dtype=torch.float64)
PRIOR = GaussianMixture(MODES, torch.zeros(3), 0.1)
NOISES = randn(random(1), 16, 50, 2)
ONE_STEP = Schedule(nfe=1)


class Teacher:
    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        return PRIOR.velocity(x_t, t)


@dataclass
class Mixture:
    """A π-Flow student that is exact."""

    schedule: Schedule = ONE_STEP
    factorisation: Factorisation = POINTS

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        seen = PRIOR.condition(x_src, t_src)
        mixture = GaussianMixture(seen.means[:, None], seen.log_weights[:, None], seen.variance[:, None])
        return GMPolicy(mixture, x_src[:, None], t_src)


@dataclass
class Jump:
    """A student that jumps to the end at once, exactly."""

    schedule: Schedule = ONE_STEP
    factorisation: Factorisation = POINTS

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        return ShortcutPolicy(integrate(PRIOR, x_src, t_src, 0.0)[:, None], t_src)


every_student = pytest.mark.parametrize("student", [Mixture(), Jump()], ids=["mixture", "jump"])


def nearness(latents: Tensor, conditions: Conditions | None) -> Tensor:
    """To the mode that the conditions name, else to the first."""
    mode = MODES[0] if conditions is None else MODES[conditions["mode"]]
    return -(latents - mode).square().sum(-1)


@every_student
def test_the_best_is_the_candidate_that_scores_highest(student: Student) -> None:
    best = best_of(student, NOISES, nearness)
    samples = torch.stack([sample(student, noise) for noise in NOISES])
    scores = nearness(samples, None)
    assert torch.equal(best.score, scores.amax(0))
    assert torch.equal(best.index, scores.argmax(0))
    assert len(best.index.unique()) > 8
    rows = torch.arange(50)
    assert torch.equal(best.sample, samples[best.index, rows])
    assert torch.equal(best.noise, NOISES[best.index, rows])


@every_student
def test_its_noise_is_better_for_the_teacher_than_others(student: Student) -> None:
    teacher = Conditioned(Teacher())
    best = best_of(student, NOISES, nearness)
    found = integrate(teacher, best.noise, 1.0, 0.0)
    torch.testing.assert_close(found, best.sample, rtol=0, atol=1e-3)
    others = integrate(teacher, randn(random(2), 50, 2), 1.0, 0.0)
    assert nearness(found, None).mean() > -0.1
    assert nearness(others, None).mean() < -5


@every_student
def test_the_best_of_one_is_a_sample(student: Student) -> None:
    best = best_of(student, NOISES[:1], nearness, nfe=2, step_size=1 / 16, method="heun")
    expected = sample(student, NOISES[0], 2, step_size=1 / 16, method="heun")
    assert torch.equal(best.sample, expected)
    assert not torch.equal(expected, sample(student, NOISES[0]))
    assert torch.equal(best.noise, NOISES[0])
    assert best.index.eq(0).all()


def test_the_scorer_sees_the_conditions() -> None:
    modes = torch.arange(50) % 3
    best = best_of(Mixture(), NOISES, nearness, {"mode": modes})
    assert torch.equal(torch.cdist(best.sample, MODES).argmin(1), modes)


def test_a_generator_is_asked_for_one_candidate_at_a_time() -> None:
    made: list[weakref.ref[Tensor]] = []

    def noises() -> Iterator[Tensor]:
        for noise in NOISES:
            assert sum(one() is not None for one in made) <= 2
            own = noise.clone()
            made.append(weakref.ref(own))
            yield own
            del own

    found, expected = best_of(Mixture(), noises(), nearness), best_of(Mixture(), NOISES, nearness)
    assert len(made) == 16
    assert torch.equal(found.noise, expected.noise)


def scored(*rows: list[float]) -> Iterator[Tensor]:
    """What a scorer answers to one candidate after the other."""
    return iter(torch.tensor(rows))


@pytest.mark.parametrize(
    ("scores", "index"),
    [
        (([1.0, 1.0], [1.0, 1.0]), [0, 0]),
        (([math.nan, 1.0], [-math.inf, math.nan], [-math.inf, 0.5]), [1, 0]),
        (([math.inf, 0.0], [math.nan, math.nan], [1e9, 1.0]), [0, 2]),
    ],
    ids=["the first of equals", "NaN is below all", "NaN in between"],
)
def test_ties_and_scores_that_are_none(scores: tuple[list[float], ...], index: list[int]) -> None:
    answers = scored(*scores)
    best = best_of(Mixture(), NOISES[: len(scores), :2], lambda *_: next(answers))
    assert best.index.tolist() == index
    assert best.score.tolist() == [scores[n][i] for i, n in enumerate(index)]


def test_whole_numbers_are_scores_too() -> None:
    answers = iter(torch.tensor([[0, 3], [2, 1]]))
    assert best_of(Mixture(), NOISES[:2, :2], lambda *_: next(answers)).index.tolist() == [1, 0]


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="all scores of sample 1 are NaN"):
        best_of(Mixture(), NOISES[:3], lambda x, _: torch.where(torch.arange(len(x)) == 1, math.nan, 0.0))
    with pytest.raises(ValueError, match="at least one candidate, got none"):
        best_of(Mixture(), NOISES[:0], nearness)
    with pytest.raises(ValueError, match=r"must be of one shape, got \(50, 2\) and then \(1, 2\)"):
        best_of(Mixture(), [NOISES[0], NOISES[1, :1]], nearness)
    for answer, got in ((torch.zeros(50, 1), r"\(50, 1\)"), (torch.tensor(1.0), r"\(\)"), ([0.0] * 50, "list")):
        with pytest.raises(ValueError, match=rf"a tensor \[50\], a score for each sample, got {got}"):
            best_of(Mixture(), NOISES, lambda *_, answer=answer: answer)  # type: ignore[misc]
