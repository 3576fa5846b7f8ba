"""π-ID's one segment: exact policies cost nothing, and the loss is the one that an independent loop computes."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from mixtures import rand, randn, random
from torch import Tensor

from pitools import (
    DXPolicy,
    GaussianMixture,
    GMPolicy,
    PolynomialPolicy,
    ShortcutPolicy,
    imitation_loss,
    integrate,
    shift_time,
    unshift_time,
)
from pitools.objectives import mixed_intervals
from pitools.rollout import visit
from pitools.types import PIXELWISE, POINTS, Conditions, Policy, Time

PRIOR = GaussianMixture(2 * randn(random(0), 5, 2), randn(random(1), 5), 0.1 + rand(random(2), 5))


class Teacher:
    """The exact teacher of PRIOR, on latents `[B, 2]`; it remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor, Conditions | None]] = []

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        assert isinstance(t, Tensor)
        self.asked.append((x_t, t, conditions))
        return PRIOR.velocity(x_t, t)


def exact_policy(x_src: Tensor, t_src: Time) -> GMPolicy:
    seen = PRIOR.condition(x_src, t_src)
    means, weights = seen.means.unsqueeze(1).clone().requires_grad_(), seen.log_weights.unsqueeze(1)
    return GMPolicy(GaussianMixture(means, weights, seen.variance.unsqueeze(1)), x_src.unsqueeze(1), t_src)


def wrong_policy(x_src: Tensor, t_src: Time, seed: int = 3) -> tuple[GMPolicy, Tensor]:
    means = (2 * randn(random(seed), len(x_src), 1, 4, 2)).requires_grad_()
    return GMPolicy(GaussianMixture(means, torch.zeros(len(x_src), 1, 4), 0.2), x_src.unsqueeze(1), t_src), means


@pytest.mark.parametrize(("t_src", "t_dst"), [(1.0, 0.0), (0.7, 0.2)])
def test_an_exact_policy_has_no_loss_and_no_gradient(t_src: float, t_dst: float) -> None:
    x_src = randn(random(4), 64, 2)
    policy = exact_policy(x_src, t_src)
    result = imitation_loss(
        Teacher(), policy, x_src, t_src, t_dst, factorisation=POINTS, states=3, floor=0.02, generator=random(5)
    )
    assert result.loss.shape == (64,)
    assert result.loss.max() < 1e-20
    (gradient,) = torch.autograd.grad(result.loss.sum(), policy.mixture.means)
    assert gradient.abs().max() < 1e-8
    torch.testing.assert_close(result.x_dst, integrate(PRIOR, x_src, t_src, t_dst), rtol=0, atol=1e-2)


def test_the_loss_is_that_of_an_independent_loop() -> None:
    x_src, t_src, t_dst = randn(random(4), 16, 2), 0.9, 0.3
    teacher = Teacher()
    policy, means = wrong_policy(x_src, t_src)
    result = imitation_loss(teacher, policy, x_src, t_src, t_dst, factorisation=POINTS, states=2, generator=random(5))
    expected = torch.zeros(16, dtype=torch.float64)
    for x_t, t, _ in teacher.asked:
        for b in range(16):
            x, now, row = x_src[b : b + 1], t_src, slice(b, b + 1)
            one = GaussianMixture(means[row], torch.zeros(1, 1, 4), 0.2)
            earlier = [float(s[b]) for _, s, _ in teacher.asked if float(s[b]) > float(t[b])]
            for stop in [*earlier, float(t[b])]:
                count = -(-(now - stop) * 128 // 1)
                for i in range(int(count)):
                    a, z = now + (stop - now) * i / count, now + (stop - now) * (i + 1) / count
                    x = x + (z - a) * one.velocity(x[:, None], a, x_src[row, None], t_src)[:, 0].detach()
                now = stop
            torch.testing.assert_close(x_t[row], x, rtol=0, atol=1e-10)
            mine = one.velocity(x[:, None], float(t[b]), x_src[row, None], t_src)[:, 0]
            expected[b] += (PRIOR.velocity(x, float(t[b])) - mine).square().mean() / 2 / 2
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), means, retain_graph=True)[0] for loss in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-10)


def test_the_rollout_carries_no_gradient() -> None:
    x_src = randn(random(4), 16, 2).requires_grad_()
    policy, _ = wrong_policy(x_src, 0.9)
    result = imitation_loss(Teacher(), policy, x_src, 0.9, 0.3, factorisation=POINTS, generator=random(5))
    assert not result.x_dst.requires_grad
    assert result.loss.requires_grad


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_states_are_even_in_raw_time_and_inside_the_segment(shift: float) -> None:
    from scipy.stats import kstest

    teacher, x_src = Teacher(), randn(random(4), 2000, 2)
    policy, _ = wrong_policy(x_src, 0.9)
    imitation_loss(
        teacher,
        policy,
        x_src,
        0.9,
        0.2,
        factorisation=POINTS,
        states=3,
        shift=shift,
        step_size=0.1,
        generator=random(5),
    )
    t = torch.stack([t for _, t, _ in teacher.asked])
    assert t.shape == (3, 2000)
    assert (t.diff(dim=0) <= 0).all()
    assert ((t >= 0.2) & (t <= 0.9)).all()
    low, high = unshift_time(0.2, shift), unshift_time(0.9, shift)
    share = (unshift_time(t.flatten(), shift) - low) / (high - low)
    assert kstest(share.numpy(), "uniform").pvalue > 0.01


def test_no_state_lies_below_the_floor() -> None:
    teacher, x_src = Teacher(), randn(random(4), 4000, 2)
    policy, _ = wrong_policy(x_src, 1.0)
    imitation_loss(
        teacher, policy, x_src, 1.0, 0.0, factorisation=POINTS, floor=0.1, step_size=0.1, generator=random(5)
    )
    lowest = min(float(t.min()) for _, t, _ in teacher.asked)
    assert 0.1 <= lowest < 0.11


def test_no_draw_lands_on_zero_or_leaves_the_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    t_src = torch.rand(500, generator=random(0)).clamp(min=1e-3)
    x_src = torch.randn(500, 2, generator=random(1))
    policy = GMPolicy(GaussianMixture(torch.zeros(500, 1, 1, 2), torch.zeros(500, 1, 1), 1.0), x_src[:, None], t_src)
    for share in (0.0, 2**-24, 1 - 2**-24):  # the ends of what torch.rand draws in float32
        monkeypatch.setattr(torch, "rand", lambda shape, share=share, **_: torch.full(shape, share))
        for shift, t_dst, ratio in itertools.product((1.0, 3.2), (torch.zeros(500), t_src / 3), (0.0, 0.3, 1.0)):
            teacher = Teacher()
            imitation_loss(
                teacher,
                policy,
                x_src,
                t_src,
                t_dst,
                factorisation=POINTS,
                shift=shift,
                step_size=0.5,
                teacher_ratio=ratio,
            )
            for _, t, _ in teacher.asked:
                assert t.dtype == torch.float32
                assert ((t > 0) & (t >= t_dst) & (t <= t_src)).all()


def test_states_that_all_but_meet_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shift does not keep the order of all neighbouring float32 numbers."""
    x_src, draws = torch.randn(2000, 2, generator=random(1)), torch.rand(2000, generator=random(0)).clamp(1e-3, 0.9)
    policy = ShortcutPolicy(x_src[:, None], 1.0)
    pair = torch.stack([draws, torch.nextafter(draws, torch.ones(2000))], dim=1)
    raw = 1 - pair
    assert (shift_time(raw, 3.2).diff(dim=1) > 0).any()
    monkeypatch.setattr(torch, "rand", lambda shape, **_: pair)
    teacher = Teacher()
    imitation_loss(teacher, policy, x_src, 1.0, 0.0, factorisation=POINTS, shift=3.2, step_size=0.5)
    assert (teacher.asked[1][1] <= teacher.asked[0][1]).all()


def test_an_interval_of_no_length_beside_a_long_one_gives_no_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = {2: torch.tensor([[0.2, 0.6], [0.3, 0.7]]).double(), 1: torch.tensor([[0.0], [0.5]]).double()}
    x_src, (policy, means) = randn(random(4), 2, 2), wrong_policy(randn(random(4), 2, 2), 0.9)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: draws[shape[1]])
    result = imitation_loss(Teacher(), policy, x_src, 0.9, 0.3, factorisation=POINTS, teacher_ratio=0.5)
    assert result.loss.isfinite().all()
    with torch.autograd.set_detect_anomaly(True, check_nan=True):  # none on the way either
        (gradient,) = torch.autograd.grad(result.loss.sum(), means)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax((1, 2, 3)) > 0).all()


def test_every_sample_may_have_its_own_segment() -> None:
    x_src = randn(random(4), 8, 2)
    t_src, t_dst = torch.linspace(0.5, 1.0, 8).double(), torch.linspace(0.0, 0.4, 8).double()
    result = imitation_loss(
        Teacher(),
        exact_policy(x_src, t_src),
        x_src,
        t_src,
        t_dst,
        factorisation=POINTS,
        floor=0.02,
        generator=random(5),
    )
    assert result.loss.max() < 1e-20


def test_dropout_perturbs_the_rollout_and_not_the_policy_that_is_matched() -> None:
    x_src = randn(random(4), 400, 2)
    plain, rough = Teacher(), Teacher()
    policy = exact_policy(x_src, 1.0)
    imitation_loss(plain, policy, x_src, 1.0, 0.2, factorisation=POINTS, generator=random(5))
    result = imitation_loss(rough, policy, x_src, 1.0, 0.2, factorisation=POINTS, dropout=0.5, generator=random(5))
    for teacher, off_path in ((plain, False), (rough, True)):
        gaps = [(x - integrate(PRIOR, x_src, 1.0, t)).abs().max() for x, t, _ in teacher.asked]
        assert (max(gaps) > 0.1) == off_path
    assert result.loss.max() < 1e-20  # the exact policy is exact off its path too
    for dropout in (0.0, 0.5):
        mixed = Teacher()
        kwargs = {"teacher_ratio": 0.5, "dropout": dropout, "generator": random(5)}
        imitation_loss(mixed, policy, x_src, 1.0, 0.2, factorisation=POINTS, **kwargs)
        x, t, _ = mixed.asked[0]  # which a mixed path reaches by the policy alone
        assert bool((x - integrate(PRIOR, x_src, 1.0, t)).abs().max() > 0.1) == (dropout > 0)
    with pytest.raises(ValueError, match="no components"):
        imitation_loss(plain, ShortcutPolicy(x_src[:, None], 1.0), x_src, 1.0, 0.0, factorisation=POINTS, dropout=0.1)


def test_images_go_to_the_teacher_as_images_with_their_conditions() -> None:
    class Images:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            assert x_t.shape == (2, 3, 4, 4)
            assert conditions == {"label": 7}
            return torch.zeros_like(x_t)

    x_src = randn(random(0), 2, 3, 4, 4)
    policy = ShortcutPolicy(PIXELWISE.pack(x_src), 1.0)
    result = imitation_loss(Images(), policy, x_src, 1.0, 0.0, factorisation=PIXELWISE, conditions={"label": 7})
    torch.testing.assert_close(result.x_dst, x_src)  # a shortcut to where it stands does not move
    assert result.loss.max() < 1e-20


def test_bad_arguments_are_refused() -> None:
    x_src = randn(random(4), 8, 2)
    policy = exact_policy(x_src, 0.5)
    for kwargs, message in itertools.zip_longest(
        [
            {"states": 0},
            {"t_dst": 0.5},
            {"t_dst": 0.7},
            {"floor": 0.6},
            {"window": 0.5},
            {"t_dst": 0.3, "window": 0.3},
            {"window": -0.1},
            {"teacher_ratio": 1.1},
            {"generator": [random(0)] * 7},
        ],
        ["states", "empty", "t_dst", "floor", "shorter than the segment", "shorter", "window", "ratio", "7 generators"],
    ):
        with pytest.raises(ValueError, match=message):
            imitation_loss(Teacher(), policy, x_src, 0.5, **{"t_dst": 0.0, "factorisation": POINTS, **kwargs})


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_the_rollout_is_even_in_raw_time(shift: float) -> None:
    x_src, stops = randn(random(4), 8, 2), []

    class Spy(Teacher):
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            stops.append(t)
            return super().velocity(x_t, t, conditions)

    result = imitation_loss(Spy(), exact_policy(x_src, 0.9), x_src, 0.9, 0.1, factorisation=POINTS, shift=shift)
    grid = torch.stack([*stops, torch.full_like(stops[0], 0.1)])
    expected = visit(PRIOR, x_src, 0.9, grid, shift=shift)[-1]
    torch.testing.assert_close(result.x_dst, expected, rtol=0, atol=1e-9)


def test_a_teacher_that_answers_another_shape_is_refused() -> None:
    class Careless:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            return x_t[:1]

    x_src = randn(random(4), 8, 2)
    with pytest.raises(ValueError, match="the teacher answered"):
        imitation_loss(Careless(), exact_policy(x_src, 0.9), x_src, 0.9, 0.1, factorisation=POINTS)


def substeps(raw_from: float, raw_to: float, step_size: float) -> list[tuple[float, float]]:
    count = max(math.ceil((raw_from - raw_to) / step_size - 1e-4), 1) if raw_from > raw_to else 0
    raw = [raw_from + (raw_to - raw_from) * i / max(count, 1) for i in range(count + 1)]
    return list(itertools.pairwise(raw))


def reference(
    velocity: Callable[[Tensor, float], Tensor],
    x_src: Tensor,
    raw_src: float,
    raw_dst: float,
    starts: list[float],
    ends: list[float],
    window: float,
    step_size: float,
    shift: float,
) -> tuple[Tensor, Tensor]:
    """One sample's loss and end point in plain Python, by Euler; `velocity(x, t)` is the policy's, with its graph."""

    def roll(x: Tensor, raw_from: float, raw_to: float) -> Tensor:
        for a, b in substeps(raw_from, raw_to, step_size):
            x = x + (shift_time(b, shift) - shift_time(a, shift)) * velocity(x, shift_time(a, shift))
        return x

    x, now, loss = x_src, raw_src, torch.zeros((), dtype=torch.float64)
    for a, b in zip(starts, ends, strict=True):
        x = roll(x, now, a).detach()
        t_a, t_b, t_c = (shift_time(raw, shift) for raw in (a, b, b - window))
        u = PRIOR.velocity(x, t_a)
        if a - b + window < (2 - 1e-4) * step_size:
            mine = velocity(x, t_a)
        else:
            mine = (roll(x, a, b - window) - x) / (t_c - t_a)
        loss = loss + (mine - u).square().mean() / 2 / len(starts)
        x, now = (x + (t_b - t_a) * u).detach(), b
    return loss, roll(x, now, raw_dst).detach()


@pytest.mark.parametrize("shift", [1.0, 3.2])
@pytest.mark.parametrize(
    ("ratio", "window"),
    [(0.0, 0.0), (0.0, 3.2 / 32), (0.3, 0.0), (0.3, 1 / 32), (1.0, 0.0), (1.0, 3 / 32), (0.05, 0.05)],
)
def test_every_kind_of_loss_is_that_of_an_independent_loop(ratio: float, window: float, shift: float) -> None:
    batch, states, step_size = 6, 3, 1 / 32
    x_src = randn(random(4), batch, 2)
    raw_src, raw_dst = torch.linspace(0.6, 1.0, batch).double(), torch.linspace(0.0, 0.3, batch).double()
    t_src = shift_time(raw_src, shift)
    teacher = Teacher()
    policy, means = wrong_policy(x_src, t_src)
    result = imitation_loss(
        teacher,
        policy,
        x_src,
        t_src,
        shift_time(raw_dst, shift),
        factorisation=POINTS,
        states=states,
        teacher_ratio=ratio,
        window=window,
        step_size=step_size,
        shift=shift,
        generator=random(5),
    )
    drawn = mixed_intervals(raw_src, raw_dst, states, ratio, window, 0.0, random(5))
    losses = []
    for b in range(batch):
        one, x = GaussianMixture(means[b], torch.zeros(1, 4), 0.2), x_src[b : b + 1]
        loss, x_dst = reference(
            lambda x_t, t, one=one, x=x, b=b: one.velocity(x_t, t, x, float(t_src[b])),
            x,
            float(raw_src[b]),
            float(raw_dst[b]),
            drawn.starts[:, b].tolist(),
            drawn.ends[:, b].tolist(),
            window,
            step_size,
            shift,
        )
        losses.append(loss)
        torch.testing.assert_close(result.x_dst[b], x_dst[0], rtol=0, atol=1e-11)
    expected = torch.stack(losses)
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), means, retain_graph=True)[0] for loss in (result.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    assert len(teacher.asked) == states


def test_short_and_long_spans_meet_in_one_batch_without_a_nan() -> None:
    """Each sample of a mixed batch has the loss and the gradient that it has alone, where no `where` is needed."""
    x_src, generators = randn(random(4), 24, 2), lambda: [random(seed) for seed in range(24)]
    policy, means = wrong_policy(x_src, 0.9)

    def losses(rows: slice) -> Tensor:
        part = GMPolicy(
            GaussianMixture(means[rows], policy.mixture.log_weights[rows], 0.2), x_src[rows, None], policy.t_src
        )
        return imitation_loss(
            Teacher(),
            part,
            x_src[rows],
            0.9,
            0.5,
            factorisation=POINTS,
            teacher_ratio=0.25,
            generator=generators()[rows],
        ).loss

    drawn = mixed_intervals(
        torch.full((24,), 0.9).double(), torch.full((24,), 0.5).double(), 2, 0.25, 0.0, 0.0, generators()
    )
    short = drawn.starts - drawn.ends < 2 / 128
    assert all(row.any() and not row.all() for row in short)  # both kinds, for both states
    together, alone = losses(slice(0, 24)), torch.cat([losses(slice(b, b + 1)) for b in range(24)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss.sum(), means, retain_graph=True)[0] for loss in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-11)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("ratio", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", ["gm", "dx", "polynomial", "shortcut"])
def test_on_straight_paths_windows_and_mixing_cost_nothing(kind: str, ratio: float) -> None:
    point, x_src, t_src = randn(random(1), 2), randn(random(4), 32, 2), 0.9

    class Straight:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            return GaussianMixture(point[None], torch.zeros(1), 0.0).velocity(x_t, t)

    x0 = point.expand(32, 1, 2).clone().requires_grad_()
    policies: dict[str, Policy] = {
        "gm": GMPolicy(GaussianMixture(x0[:, :, None], torch.zeros(32, 1, 1), 0.0), x_src[:, None], t_src),
        "dx": DXPolicy(x0[:, None].expand(32, 5, 1, 2), t_src, 0.0, 3.2),
        "polynomial": PolynomialPolicy.from_velocity(
            (x_src[:, None] - x0)[:, None] / t_src, x_src[:, None], t_src, 3.2
        ),
        "shortcut": ShortcutPolicy(x0, t_src),
    }
    for window, t_dst in ((0.0, 0.2), (3 / 128, 0.0), (0.1, 0.2)):
        result = imitation_loss(
            Straight(),
            policies[kind],
            x_src,
            t_src,
            t_dst,
            factorisation=POINTS,
            teacher_ratio=ratio,
            window=window,
            shift=3.2,
            floor=0.01,
            generator=random(5),
        )
        assert result.loss.max() < 1e-20
        (gradient,) = torch.autograd.grad(result.loss.sum(), x0, retain_graph=True)
        assert gradient.abs().max() < 1e-10
        torch.testing.assert_close(result.x_dst, point + t_dst / t_src * (x_src - point), rtol=0, atol=1e-12)


@pytest.mark.parametrize("what", ["window", "teacher_ratio"])
def test_on_curved_paths_the_loss_of_an_exact_policy_falls_as_the_square_of_the_span(what: str) -> None:
    x_src, losses = randn(random(4), 16, 2), []
    spans = np.array([0.04, 0.02, 0.01])
    for span in spans:
        kwargs = {"window": span} if what == "window" else {"teacher_ratio": span / 0.3}
        result = imitation_loss(
            Teacher(),
            exact_policy(x_src, 0.9),
            x_src,
            0.9,
            0.6,
            factorisation=POINTS,
            states=1,
            step_size=1 / 512,
            method="heun",
            generator=random(5),
            **kwargs,
        )
        losses.append(float(result.loss.detach().mean()))
    assert losses[0] > 1e-8
    slope = np.polyfit(np.log(spans), np.log(losses), 1)[0]
    assert abs(slope - 2) < 0.2


@pytest.mark.parametrize("window", [1 / 128, 2 / 128])
def test_a_window_of_one_substep_is_the_instantaneous_loss(window: float) -> None:
    """By Euler it is, and below two substeps no roll-out is made; two differ, unless they are of no length."""
    x_src, asked = randn(random(4), 8, 2), []

    class Counting(GMPolicy):
        def velocity(self, x_t: Tensor, t: Time) -> Tensor:
            asked.append(torch.is_grad_enabled())
            return super().velocity(x_t, t)

    wrong, _ = wrong_policy(x_src, 0.9)
    policy = Counting(wrong.mixture, wrong.x_src, wrong.t_src)
    kwargs = {"factorisation": POINTS, "states": 3}
    teacher = Teacher()
    result = imitation_loss(teacher, policy, x_src, 0.9, 0.3, window=window, generator=random(5), **kwargs)
    at_states = [
        (policy.velocity(x[:, None], t)[:, 0] - PRIOR.velocity(x, t)).square().mean(1) / 2 for x, t, _ in teacher.asked
    ]
    expected = torch.stack(at_states).mean(0)
    asked_with_graph = sum(asked) - 3  # less the loop's own
    if window == 1 / 128:
        torch.testing.assert_close(result.loss, expected, rtol=0, atol=1e-14)
        assert asked_with_graph == 3
    else:
        assert (result.loss - expected).abs().min() > 1e-6
        assert asked_with_graph == 6  # two substeps for each state


def test_on_policy_all_states_come_from_one_rollout() -> None:
    """Samples that stop at different times share its substeps: a roll-out to each stop in turn would take more."""
    x_src, asked = randn(random(4), 32, 2), []

    class Counting(GMPolicy):
        def velocity(self, x_t: Tensor, t: Time) -> Tensor:
            asked.append(torch.is_grad_enabled())
            return super().velocity(x_t, t)

    wrong, _ = wrong_policy(x_src, 1.0)
    policy = Counting(wrong.mixture, wrong.x_src, wrong.t_src)
    imitation_loss(Teacher(), policy, x_src, 1.0, 0.5, factorisation=POINTS, states=4, window=0.1, generator=random(5))
    assert asked.count(False) <= 64 + 4


def test_at_teacher_ratio_one_the_path_is_the_teachers_alone() -> None:
    x_src, generator, rolled = randn(random(4), 16, 2), random(5), []

    class Spy(GMPolicy):
        def velocity(self, x_t: Tensor, t: Time) -> Tensor:
            rolled.append(not torch.is_grad_enabled())
            return super().velocity(x_t, t)

    t_src, ends = 0.6 + 0.4 * rand(random(6), 16), 0.5 * rand(random(7), 16)
    for shift, t_dst in itertools.product((1.0, 3.2), (torch.zeros_like(ends), ends)):
        teacher, wrong = Teacher(), wrong_policy(x_src, t_src)[0]
        result = imitation_loss(
            teacher,
            Spy(wrong.mixture, wrong.x_src, wrong.t_src),
            x_src,
            t_src,
            t_dst,
            factorisation=POINTS,
            states=4,
            teacher_ratio=1.0,
            shift=shift,
            generator=generator,
        )
        times = [t for _, t, _ in teacher.asked]
        assert torch.equal(times[0], t_src)
        x = x_src
        for (x_t, t, _), t_next in zip(teacher.asked, [*times[1:], t_dst], strict=True):
            torch.testing.assert_close(x_t, x, rtol=0, atol=1e-12)
            x = x + (t_next - t)[:, None] * PRIOR.velocity(x, t)
        torch.testing.assert_close(result.x_dst, x, rtol=0, atol=1e-12)
    assert rolled
    assert not any(rolled)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_no_path_carries_a_gradient_and_windows_stay_in_the_segment(ratio: float) -> None:
    x_src, asked = randn(random(4), 64, 2).requires_grad_(), []

    class Watched(GMPolicy):
        def velocity(self, x_t: Tensor, t: Time) -> Tensor:
            asked.append(torch.as_tensor(t))
            return super().velocity(x_t, t)

    teacher, (wrong, means) = Teacher(), wrong_policy(x_src.detach(), 0.9)
    policy = Watched(wrong.mixture, wrong.x_src, wrong.t_src)
    result = imitation_loss(
        teacher,
        policy,
        x_src,
        0.9,
        0.7,
        factorisation=POINTS,
        teacher_ratio=ratio,
        window=0.1,
        dropout=0.2,
        generator=random(5),
    )
    assert not result.x_dst.requires_grad
    assert not any(x.requires_grad for x, _, _ in teacher.asked)
    assert torch.autograd.grad(result.loss.sum(), x_src, allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(result.loss.sum(), means)[0].abs().max() > 0
    assert all((t > 0.7).all() for t in asked)  # a field is asked at the starts of substeps
    assert all((t >= 0.8).all() for _, t, _ in teacher.asked)


@pytest.mark.parametrize(("ratio", "window", "dropout"), [(0.0, 0.0, 0.0), (0.0, 3 / 128, 0.3), (0.5, 3 / 128, 0.3)])
def test_with_one_generator_for_each_sample_a_batch_may_be_cut(ratio: float, window: float, dropout: float) -> None:
    x_src = randn(random(4), 8, 2)

    def parts(*slices: slice) -> tuple[Tensor, Tensor]:
        results = [
            imitation_loss(
                Teacher(),
                exact_policy(x_src[rows] + 1, 0.9),
                x_src[rows],
                0.9,
                0.3,
                factorisation=POINTS,
                teacher_ratio=ratio,
                window=window,
                dropout=dropout,
                generator=[random(seed) for seed in range(8)[rows]],
            )
            for rows in slices
        ]
        return torch.cat([result.loss for result in results]), torch.cat([result.x_dst for result in results])

    for whole, cut in zip(parts(slice(0, 8)), parts(slice(0, 4), slice(4, 8)), strict=True):
        torch.testing.assert_close(whole, cut, rtol=0, atol=1e-12)


def test_half_precision_latents_are_followed_in_float32() -> None:
    x_src = torch.randn(8, 2, generator=random(4)).bfloat16()

    class Coarse:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            assert x_t.dtype == torch.float32
            return x_t.bfloat16()

    policy = ShortcutPolicy(x_src[:, None].float() + 1, 1.0)
    for ratio in (0.0, 0.5, 1.0):
        result = imitation_loss(
            Coarse(), policy, x_src, 1.0, 0.5, factorisation=POINTS, teacher_ratio=ratio, window=0.1
        )
        assert result.loss.dtype == result.x_dst.dtype == torch.float32
