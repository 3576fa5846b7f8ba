"""π-ID's one segment: exact policies cost nothing, and the loss is the one that an independent loop computes."""

import itertools

import pytest
import torch
from mixtures import rand, randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, ShortcutPolicy, imitation_loss, integrate
from pitools.objectives.imitation import _intermediate_times
from pitools.rollout import visit
from pitools.types import PIXELWISE, POINTS, Conditions, Time

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

    from pitools import unshift_time

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
    for share in (0.0, 1 - 2**-24):  # the ends of what torch.rand draws in float32
        monkeypatch.setattr(torch, "rand", lambda *shape, share=share, **_: torch.full(shape, share))
        for shift in (1.0, 3.2):
            for t_dst in (torch.zeros(500), t_src / 3):
                t = _intermediate_times(t_src, t_dst, 1, 500, shift, 0.0, None)
                assert ((t > 0) & (t >= t_dst) & (t <= t_src)).all()


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
        [{"states": 0}, {"t_dst": 0.5}, {"t_dst": 0.7}, {"floor": 0.6}],
        ["states", "empty", "t_dst", "floor"],
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
