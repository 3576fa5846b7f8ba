"""One step of π-ID: which segments, from where, with which weights, and one graph at a time."""

import math
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from mixtures import rand, randn, random
from scipy.stats import chisquare
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, Schedule, imitation_loss, integrate, segments, shift_time, unshift_time
from pitools.objectives import PiID, draw_segments, segment_losses, teacher_ratio
from pitools.policies import DXHead, GMHead, PolynomialHead, ShortcutHead
from pitools.types import POINTS, Conditions, Factorisation, Time

PRIOR = GaussianMixture(2 * randn(random(0), 5, 2), randn(random(1), 5), 0.1 + rand(random(2), 5))
SCHEDULE = Schedule(nfe=4, shift=3.2, final_step_scale=0.5)


class Teacher:
    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        assert conditions == {"label": 7}
        return PRIOR.velocity(x_t, t)


class WrongStudent:
    """The exact policy of PRIOR with its means scaled and moved by parameters; it remembers what it was asked."""

    def __init__(self, schedule: Schedule = SCHEDULE) -> None:
        self.schedule: Schedule = schedule
        self.factorisation: Factorisation = POINTS
        self.parameters = torch.tensor([0.9, 0.3], dtype=torch.float64, requires_grad=True)
        self.asked: list[tuple[Tensor, Tensor, GMPolicy]] = []
        self.graphs: list[weakref.ref[Tensor]] = []  # losses that must be gone before the next call

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> GMPolicy:
        assert conditions == {"label": 7}
        assert all(loss() is None for loss in self.graphs)
        seen = PRIOR.condition(x_src, t_src)
        means = self.parameters[0] * seen.means + self.parameters[1]
        mixture = GaussianMixture(means.unsqueeze(1), seen.log_weights.unsqueeze(1), seen.variance.unsqueeze(1))
        policy = GMPolicy(mixture, x_src.unsqueeze(1), t_src)
        self.asked.append((x_src, torch.as_tensor(t_src, dtype=torch.float64), policy))
        return policy


def backward(student: WrongStudent) -> Tensor:
    assert student.parameters.grad is not None
    return student.parameters.grad


def test_data_free_training_visits_every_segment_one_graph_at_a_time() -> None:
    objective = PiID(
        data_free=True, states=2, window=3 / 128, dropout=0.1, loss_scale=30.0, step_size=1 / 64, floor=0.01
    )
    student, noise = WrongStudent(), randn(random(3), 16, 2)
    seen = []
    for segment in segment_losses(objective, Teacher(), student, noise, {"label": 7}, 0, random(5)):
        seen.append(segment)
        assert len(student.asked) == len(seen)  # the next policy is not asked for before this one's graph may go
        segment.loss.backward()
        seen[-1] = replace(segment, loss=segment.loss.detach())
        student.graphs.append(weakref.ref(segment.loss))
        del segment
    raw = segments(4, 0.5)
    assert [(s.index, s.raw_src, s.raw_dst, s.last) for s in seen] == [
        (i, a, b, i == 3) for i, (a, b) in enumerate(pairwise(raw))
    ]
    assert torch.equal(student.asked[0][0], noise)

    # The same by hand, with one generator drawn from in the same order.
    other, x, total, generator = WrongStudent(), noise, torch.zeros((), dtype=torch.float64), random(5)
    for (a, b), (x_src, t_src, _), segment in zip(pairwise(raw), student.asked, seen, strict=True):
        assert not x_src.requires_grad
        torch.testing.assert_close(x_src, x, rtol=0, atol=1e-12)
        assert float(t_src) == pytest.approx(shift_time(a, 3.2))
        result = imitation_loss(
            Teacher(),
            other(x, t_src, {"label": 7}),
            x,
            t_src,
            shift_time(b, 3.2),
            factorisation=POINTS,
            conditions={"label": 7},
            window=3 / 128,
            dropout=0.1,
            step_size=1 / 64,
            shift=3.2,
            floor=0.01,
            generator=generator,
        )
        expected = 30 * (a - b) * result.loss.mean()
        torch.testing.assert_close(segment.loss, expected, rtol=1e-12, atol=1e-12)
        total, x = total + expected, result.x_dst
    (gradient,) = torch.autograd.grad(total, other.parameters)
    torch.testing.assert_close(backward(student), gradient, rtol=1e-10, atol=1e-12)


def test_a_segment_starts_where_the_detached_rollout_before_it_ended() -> None:
    student = WrongStudent(Schedule(nfe=3, shift=3.2))
    objective = PiID(data_free=True, floor=0.01, step_size=1 / 512)
    list(segment_losses(objective, Teacher(), student, randn(random(3), 16, 2), {"label": 7}, 0, random(5)))
    for (x_src, t_src, policy), (x_next, t_next, _) in pairwise(student.asked):
        end = integrate(policy.detach(), x_src[:, None], t_src, t_next, step_size=1 / 512, shift=3.2)[:, 0]
        # The training roll-out stops at the intermediate states too, and so its substeps are a little finer.
        torch.testing.assert_close(x_next, end, rtol=0, atol=1e-2)
        assert (x_next - x_src).abs().max() > 0.1


def test_data_dependent_training_starts_from_noised_data() -> None:
    objective, student = PiID(loss_scale=3.0, floor=0.01), WrongStudent()
    x_0 = 100 + 0 * randn(random(3), 500, 2)
    (segment,) = segment_losses(objective, Teacher(), student, x_0, {"label": 7}, 0, random(5))
    assert (segment.index, segment.last) == (0, True)
    ((x_src, t_src, policy),) = student.asked
    raw_src, raw_dst = torch.as_tensor(segment.raw_src), torch.as_tensor(segment.raw_dst)
    pairs = {(round(a, 6), round(b, 6)) for a, b in zip(raw_src.tolist(), raw_dst.tolist(), strict=True)}
    assert pairs == {(round(a, 6), round(b, 6)) for a, b in pairwise(segments(4, 0.5))}
    torch.testing.assert_close(t_src, shift_time(raw_src, 3.2))
    noise = (x_src - (1 - t_src[:, None]) * x_0) / t_src[:, None]
    assert abs(float(noise.mean())) < 0.15
    assert abs(float(noise.std()) - 1) < 0.15

    generator = random(5)
    torch.rand(500, generator=generator, dtype=torch.float64)  # the segments
    drawn = torch.randn(500, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(noise, drawn, rtol=0, atol=1e-9)
    result = imitation_loss(
        Teacher(),
        policy,
        x_src,
        t_src,
        shift_time(raw_dst, 3.2),
        factorisation=POINTS,
        conditions={"label": 7},
        shift=3.2,
        floor=0.01,
        generator=generator,
    )
    torch.testing.assert_close(segment.loss, 3 * result.loss.mean(), rtol=1e-12, atol=1e-12)
    segment.loss.backward()
    assert backward(student).abs().min() > 0


def test_segments_are_drawn_in_proportion_to_their_length() -> None:
    raw = segments(4, 0.5)
    raw_src, raw_dst = draw_segments(SCHEDULE, 20000, random(0), like=torch.zeros(1, dtype=torch.float64))
    counts = []
    for a, b in pairwise(raw):
        chosen = (raw_src == a) & (raw_dst == b)
        counts.append(int(chosen.sum()))
    assert sum(counts) == 20000
    assert chisquare(counts, [20000 * (a - b) for a, b in pairwise(raw)]).pvalue > 0.01


def test_the_ends_of_what_is_drawn_are_segments_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for draw, expected in ((0.0, (1 / 7, 0.0)), (1 / 7, (1 / 7, 0.0)), (0.2, (3 / 7, 1 / 7)), (1 - 2**-24, (1, 5 / 7))):
        monkeypatch.setattr(torch, "rand", lambda shape, draw=draw, **_: torch.full(shape, draw))
        drawn = draw_segments(SCHEDULE, 1, None, like=torch.zeros(1))
        assert [x.dtype for x in drawn] == [torch.float32] * 2
        assert torch.cat(drawn).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("data_free", [True, False])
def test_the_teacher_ratio_follows_its_schedule(data_free: bool) -> None:
    """At ratio 1 the first state of a segment is its start; at ratio 0 it is not."""
    objective = PiID(data_free=data_free, teacher_ratio=1.0, decay_steps=10, floor=0.01)

    class Watched(Teacher):
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            asked.append((x_t, torch.as_tensor(t)))
            return super().velocity(x_t, t, conditions)

    for step in (0, 10):
        asked: list[tuple[Tensor, Tensor]] = []
        student = WrongStudent(Schedule(nfe=1))
        list(segment_losses(objective, Watched(), student, randn(random(3), 8, 2), {"label": 7}, step, random(5)))
        ratio = teacher_ratio(step, 1.0, 10)
        assert torch.equal(asked[0][0], student.asked[0][0]) == (ratio == 1)
        assert bool((unshift_time(asked[0][1], 1.0) == 1).all()) == (ratio == 1)


@pytest.mark.parametrize("data_free", [True, False])
def test_with_one_generator_for_each_sample_a_batch_may_be_cut(data_free: bool) -> None:
    objective = PiID(
        data_free=data_free, window=3 / 128, dropout=0.3, teacher_ratio=0.8, decay_steps=4, loss_scale=3.0, floor=0.01
    )
    latents = randn(random(3), 8, 2)

    def gradient(*slices: slice) -> tuple[float, Tensor]:
        student, total = WrongStudent(), 0.0
        for rows in slices:
            generators = [random(seed) for seed in range(8)[rows]]
            losses = segment_losses(objective, Teacher(), student, latents[rows], {"label": 7}, 2, generators)
            for segment in losses:
                loss = segment.loss / len(slices)
                loss.backward()
                total += float(loss.detach())
        return total, backward(student)

    whole, cut = gradient(slice(0, 8)), gradient(slice(0, 4), slice(4, 8))
    assert whole[0] == pytest.approx(cut[0], rel=1e-12)
    torch.testing.assert_close(whole[1], cut[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"states": 0}, "states must be a whole number of at least 1, got 0"),
        ({"states": 1.5}, "states"),
        ({"decay_steps": -1}, "decay_steps"),
        ({"window": -0.1}, r"window must lie in \[0, 1\), got -0.1"),
        ({"window": math.nan}, "window"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"floor": 1.0}, "floor"),
        ({"loss_scale": 0.0}, "loss_scale must be a positive number, got 0.0"),
        ({"step_size": math.inf}, "step_size"),
        ({"teacher_ratio": 1.5, "decay_steps": 1}, r"teacher_ratio must lie in \[0, 1\], got 1.5"),
        ({"teacher_ratio": 1.0}, "teacher_ratio 1.0 needs decay_steps"),
    ],
)
def test_bad_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PiID(**values)  # type: ignore[arg-type]


def test_what_disagrees_is_refused_before_training() -> None:
    published = PiID(window=3 / 128, dropout=0.1, states=4, teacher_ratio=1.0, decay_steps=2000, loss_scale=60.0)
    published.check(SCHEDULE, GMHead(8))
    for head in (DXHead(10), PolynomialHead(3), ShortcutHead()):
        PiID(window=3 / 128).check(SCHEDULE, head)
        with pytest.raises(ValueError, match=f"dropout must be 0 for a {type(head).__name__}, got 0.1"):
            published.check(SCHEDULE, head)
    with pytest.raises(ValueError, match=r"window 0.15 must be shorter than the shortest segment, 0.142857"):
        PiID(window=0.15).check(SCHEDULE, GMHead(8))
    PiID(window=0.15).check(Schedule(nfe=4), GMHead(8))
    with pytest.raises(ValueError, match=r"floor 0.2 must lie below the last segment's start, 0.142857"):
        PiID(floor=0.2).check(SCHEDULE, GMHead(8))
