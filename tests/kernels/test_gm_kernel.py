"""The native roll-out of Gaussian mixtures: equal to the plain one, its gradients too, and refused where it is not."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import Case, cases, on_path, rand, randn, random, velocity_scale
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, integrate
from pitools.kernels import choose, native, plain, states
from pitools.rollout import trajectory, velocity, visit
from pitools.solvers import SOLVERS

pytestmark = pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")
METHODS = ["euler", "midpoint", "heun", "rk4", "auto"]


def policy_of(seed: int, sizes: tuple[int, int, int, int], kind: str, t_src: Tensor | float, dropped: bool) -> GMPolicy:
    """A policy like a trained student's, as seen from a state on its path; numbers that float32 has, too."""
    g = random(seed)
    batch, factors, components, channels = sizes
    means = (0.6 * randn(g, batch, factors, components, channels)).float().double()
    log_weights = randn(g, batch, factors, components).float().double()
    if dropped:
        log_weights[rand(g, batch, factors, components) < 0.5] = -math.inf
        log_weights[..., 0] = 0.0
    variance = {
        "shared": 0.01 + 0.05 * rand(g, batch, 1, 1),
        "own": 0.01 + 0.05 * rand(g, batch, factors, components),
        "zero": torch.zeros(()),
    }[kind]
    source = torch.as_tensor(t_src, dtype=torch.float64).expand(batch)
    x_src = on_path(means[:, :, 0], randn(g, batch, factors, channels), source[:, None]).float().double()
    return GMPolicy(GaussianMixture(means, log_weights, variance.float().double()), x_src, source)


def single(policy: GMPolicy) -> GMPolicy:
    q = policy.mixture
    means = q.means.float()
    return GMPolicy(
        GaussianMixture(means, q.log_weights.float(), q.variance.float()), policy.x_src.float(), policy.t_src
    )


def assert_taken(policy: GMPolicy | GaussianMixture, x: Tensor) -> None:
    assert not isinstance(choose(policy, x, torch.tensor([1e-3])), str)


def relative(mine: Tensor, reference: Tensor) -> float:
    return float((mine.double() - reference).norm() / reference.norm())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 64)),
    st.sampled_from(METHODS),
    st.sampled_from(["shared", "own", "zero"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_it_is_the_plain_rollout(
    seed: int, sizes: tuple[int, int, int, int], method: str, kind: str, own: bool, dropped: bool, hot: bool, zero: bool
) -> None:
    batch, factors, components, channels = sizes
    while batch * factors * components * channels > 60_000:
        batch, factors = (batch + 1) // 2, (factors + 1) // 2
        if batch == factors == 1:
            break
    g = random(seed)
    t_src = (0.2 + 0.8 * rand(g, batch)).float().double() if own else torch.tensor(0.9, dtype=torch.float32).double()
    policy = policy_of(seed, (batch, factors, components, channels), kind, t_src, dropped)
    if hot and kind != "zero":
        policy = policy.tempered(0.3)
    stops = torch.stack([t_src * share for share in (1.0, 0.6, 0.55, 0.0 if zero else 0.1)]).float().double()
    with plain():
        reference = visit(policy, policy.x_src, t_src, stops, method, 1 / 16, shift=2.0)
    mine = visit(policy, policy.x_src, t_src, stops, method, 1 / 16, shift=2.0)
    assert_taken(policy, policy.x_src)
    assert relative(mine, reference) <= 1e-12
    low = single(policy)
    assert_taken(low, low.x_src)
    assert relative(visit(low, low.x_src, t_src.float(), stops.float(), method, 1 / 16, shift=2.0), reference) <= 1e-4


@pytest.mark.parametrize("sizes", [(1, 200, 8, 16), (2, 60, 32, 4), (90, 1, 32, 2), (90, 1, 64, 2)])
@pytest.mark.parametrize("kind", ["shared", "own", "zero"])
@pytest.mark.parametrize("t_dst", [0.5, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_float32_at_typical_shapes(sizes: tuple[int, int, int, int], kind: str, t_dst: float, method: str) -> None:
    policy = policy_of(1, sizes, kind, 1.0, dropped=False)
    low = single(policy)
    with plain():
        reference = integrate(policy, policy.x_src, 1.0, t_dst, method, 1 / 32)
    assert relative(integrate(low, low.x_src, 1.0, t_dst, method, 1 / 32), reference) <= 1e-5


@settings(max_examples=60, deadline=None)
@given(cases(max_components=40, max_channels=20))
def test_float32_holds_in_the_extremes_of_the_core(case: Case) -> None:
    prior, x_src, x_t = case.prior, case.x_src[:, None].float(), case.x_t[:, None].float()
    seen = prior.condition(case.x_src, case.t_src, t_src=1.0)
    mixture = GaussianMixture(
        seen.means[:, None].float(), seen.log_weights[:, None].float(), seen.variance[:, None].float()
    )
    policy = GMPolicy(mixture, x_src, case.t_src.float())
    exact = GMPolicy(
        GaussianMixture(mixture.means.double(), mixture.log_weights.double(), mixture.variance.double()),
        x_src.double(),
        case.t_src.float().double(),
    )
    time = torch.minimum(case.t.float(), case.t_src.float())
    assert_taken(policy, x_t)
    error = velocity(policy, x_t, time).double() - exact.velocity(x_t.double(), time.double())
    scale = velocity_scale(case)[:, 0]
    with plain():
        reference = velocity(policy, x_t, time).double() - exact.velocity(x_t.double(), time.double())
    worst, allowed = error.norm(dim=-1)[:, 0] / scale, reference.norm(dim=-1)[:, 0] / scale
    assert bool((worst <= torch.maximum(torch.tensor(1e-4).double(), 3 * allowed)).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["shared", "own", "zero"])
@pytest.mark.parametrize("sizes", [(2, 19, 5, 3), (19, 1, 8, 2), (1, 4, 33, 1)])
def test_gradients_are_the_plain_ones(method: str, kind: str, sizes: tuple[int, int, int, int]) -> None:
    g = random(1)
    policy = policy_of(7, sizes, kind, 0.4 + 0.5 * rand(g, sizes[0]), dropped=True)
    stops = torch.stack([torch.as_tensor(policy.t_src) * share for share in (1.0, 0.7, 0.0)])
    weight = randn(g, 3, *policy.x_src.shape)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        q = policy.mixture
        values = (q.means, q.log_weights, q.variance, policy.x_src, policy.x_src + 0.01)
        leaves = [value.to(dtype).detach().requires_grad_() for value in values]
        fresh = GMPolicy(GaussianMixture(*leaves[:3]), leaves[3], policy.t_src)
        out = visit(fresh, leaves[4], policy.t_src, stops, method, 1 / 16)
        return list(torch.autograd.grad((out * weight).sum(), leaves))

    with plain():
        reference = gradients(torch.float64)
    for mine, expected in zip(gradients(torch.float64), reference, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()) + 1e-13)
    for mine, expected in zip(gradients(torch.float32), reference, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()) + 1e-5)


def small_function() -> tuple[Callable[..., Tensor], list[Tensor]]:
    policy = policy_of(3, (2, 2, 3, 2), "own", torch.tensor([0.5, 0.8]).double(), dropped=False)
    q = policy.mixture
    leaves = [
        v.detach().requires_grad_() for v in (q.means, q.log_weights, q.variance, policy.x_src, policy.x_src + 0.1)
    ]

    def function(means: Tensor, weights: Tensor, variance: Tensor, x_src: Tensor, x: Tensor) -> Tensor:
        fresh = GMPolicy(GaussianMixture(means, weights, variance), x_src, policy.t_src)
        t_dst = torch.as_tensor(policy.t_src) / 3
        return torch.cat([integrate(fresh, x, policy.t_src, t_dst, "heun", 1 / 8), velocity(fresh, x, t_dst)])

    return function, leaves


def test_gradcheck() -> None:
    assert torch.autograd.gradcheck(*small_function())


def test_second_derivatives_take_the_plain_path() -> None:
    assert torch.autograd.gradgradcheck(*small_function())


@pytest.mark.parametrize("batch", [1, 7, 33])
def test_a_prior_rolls_out_in_a_kernel_too(batch: int) -> None:
    prior = GaussianMixture(randn(random(0), 30, 3), randn(random(1), 30), 0.01 + rand(random(2), 30))
    x, t = randn(random(3), batch, 5, 3), 0.1 + 0.9 * rand(random(4), batch)
    assert_taken(prior, x)
    got = velocity(prior, x, t), integrate(prior, x, t, t / 3), trajectory(prior, x, t, t / 3, "heun", 0.1).states
    with plain():
        expected = (
            velocity(prior, x, t),
            integrate(prior, x, t, t / 3),
            trajectory(prior, x, t, t / 3, "heun", 0.1).states,
        )
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_threads_do_not_change_a_bit() -> None:
    policy = single(policy_of(5, (3, 1000, 8, 4), "shared", 1.0, dropped=False))
    leaf = policy.x_src.clone().requires_grad_()

    def both() -> tuple[Tensor, Tensor]:
        out = integrate(policy, leaf, 1.0, 0.1)
        return out, torch.autograd.grad(out.square().sum(), leaf)[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = both()
        torch.set_num_threads(3)
        three = both()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_memory_may_lie_in_any_order() -> None:
    policy = policy_of(6, (2, 20, 5, 3), "own", 1.0, dropped=False)
    q = policy.mixture
    out = integrate(policy, policy.x_src, 1.0, 0.2)
    apart = torch.stack([policy.x_src, policy.x_src], dim=-1)[..., 0]
    twisted = policy.x_src.transpose(0, 2).contiguous().transpose(0, 2)
    spread = GaussianMixture(q.means, q.log_weights, q.variance)
    object.__setattr__(spread, "means", q.means.contiguous())
    object.__setattr__(spread, "log_weights", q.log_weights.transpose(0, 2).contiguous().transpose(0, 2))
    for mixture, x in ((q, apart), (q, twisted), (spread, policy.x_src)):
        other = GMPolicy(mixture, x, policy.t_src)
        assert_taken(other, x)
        assert torch.equal(integrate(other, x, 1.0, 0.2), out)


def test_what_is_not_finite_stays_with_its_factor() -> None:
    policy = single(policy_of(8, (1, 40, 4, 2), "shared", 1.0, dropped=False))
    good = integrate(policy, policy.x_src, 1.0, 0.2)
    x = policy.x_src.clone()
    x[0, 3, 1] = math.nan
    bad = integrate(policy, x, 1.0, 0.2)
    assert bool(bad[0, 3].isnan().all())
    others = torch.arange(40) != 3
    torch.testing.assert_close(bad[0, others], good[0, others], rtol=1e-5, atol=1e-6)


def test_no_factors_and_no_steps() -> None:
    policy = policy_of(9, (2, 3, 4, 2), "shared", 1.0, dropped=False)
    assert torch.equal(integrate(policy, policy.x_src, 1.0, 1.0), policy.x_src)
    empty = GMPolicy(GaussianMixture(torch.zeros(0, 3, 4, 2), torch.zeros(0, 3, 4), 0.1), torch.zeros(0, 3, 2), 1.0)
    assert integrate(empty, empty.x_src, 1.0, 0.0).shape == (0, 3, 2)


def test_times_above_the_source_are_refused_as_ever() -> None:
    policy = policy_of(10, (2, 3, 4, 2), "shared", 0.5, dropped=False)
    with pytest.raises(ValueError, match="t_src"):
        integrate(policy, policy.x_src, 0.8, 0.2)
    with pytest.raises(ValueError, match="t_src"):
        velocity(policy, policy.x_src, 0.8)


class Louder(GMPolicy):
    def velocity(self, x_t: Tensor, t: Tensor | float) -> Tensor:
        return 2 * super().velocity(x_t, t)


def test_every_reason_for_the_plain_path() -> None:
    policy = single(policy_of(11, (2, 3, 4, 2), "shared", 1.0, dropped=False))
    x, t = policy.x_src, torch.tensor([1.0])

    def reason(field: object = policy, x: Tensor = x, t: Tensor = t) -> str:
        why = choose(field, x, t)
        assert isinstance(why, str)
        return why

    assert not isinstance(choose(policy, x, t), str)
    with plain():
        assert "asked for" in reason()
    assert "Louder" in reason(Louder(policy.mixture, x, 1.0))
    assert "steps" in str(states(policy, x, torch.tensor([1.0, 0.5]), torch.tensor([1]), SOLVERS["dopri5"]))
    assert "and not (2, 3, 2)" in reason(x=x[:, :1])
    assert "bfloat16" in reason(x=x.bfloat16())
    assert "gradient for times" in reason(t=t.clone().requires_grad_())
    assert "strides" in reason(x=torch.imag(torch.complex(x, -x).conj()))
    assert "above t_src" in reason(GMPolicy(policy.mixture, x, 0.5))
    assert "meta" in reason(x=x.to("meta"))
    assert "few numbers" in reason(GaussianMixture(torch.zeros(3000, 2), torch.zeros(3000), 0.1), x)
    assert torch.func.vmap(lambda one: torch.tensor("transforms" in reason(x=one)) | (one.sum() > math.inf))(
        x[None]
    ).all()
    doubled = Louder(policy.mixture, x, 1.0)
    with plain():
        expected = integrate(doubled, x, 1.0, 0.5)
    assert torch.equal(integrate(doubled, x, 1.0, 0.5), expected)


def test_a_source_time_that_learns_keeps_its_gradient() -> None:
    policy = policy_of(12, (2, 3, 4, 2), "shared", 1.0, dropped=False)
    t_dst = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    integrate(policy, policy.x_src, 1.0, t_dst).sum().backward()
    assert t_dst.grad is not None


@pytest.mark.parametrize(
    "shape", [(), (1,), (4,), (3, 1), (3, 4), (1, 1, 1), (1, 1, 4), (1, 3, 1), (5, 1, 1), (5, 3, 4)]
)
@pytest.mark.parametrize("method", ["euler", "auto"])
def test_a_variance_of_any_shape_that_broadcasts(shape: tuple[int, ...], method: str) -> None:
    g = random(20)
    variance = 0.02 + 0.1 * rand(g, max(1, math.prod(shape))).reshape(shape)
    t_src = 0.4 + 0.5 * rand(g, 5)
    means, weights, x_src = 0.5 * randn(g, 5, 3, 4, 2), randn(g, 5, 3, 4), randn(g, 5, 3, 2)
    policy = GMPolicy(GaussianMixture(means, weights, variance), x_src, t_src)
    assert_taken(policy, x_src)
    mine = integrate(policy, x_src, t_src, t_src / 4, method)
    with plain():
        reference = integrate(policy, x_src, t_src, t_src / 4, method)
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_times_of_another_number_of_samples_are_refused() -> None:
    policy = policy_of(21, (4, 3, 2, 2), "shared", 1.0, dropped=False)
    assert "2 samples" in str(choose(policy, policy.x_src, torch.ones(5, 2)))


def test_second_derivatives_of_a_state_that_is_a_view() -> None:
    g = random(22)
    mixture = GaussianMixture(0.5 * randn(g, 1, 4, 3, 2), randn(g, 1, 4, 3), 0.05)
    base, source = (randn(g, 1, 2, 4).requires_grad_() for _ in range(2))

    def function(base: Tensor, source: Tensor) -> Tensor:
        policy = GMPolicy(mixture, source.transpose(1, 2), 0.9)
        return integrate(policy, base.transpose(1, 2), 0.9, 0.3, "euler", 0.2)

    assert torch.autograd.gradgradcheck(function, (base, source))


def test_the_finest_of_the_dtypes_counts() -> None:
    policy = single(policy_of(23, (2, 3, 4, 2), "shared", 1.0, dropped=False))
    fine = GMPolicy(policy.mixture, policy.x_src.double(), 1.0)
    for method in ("euler", "auto"):
        mine = integrate(fine, policy.x_src, 1.0, 0.2, method)
        with plain():
            reference = integrate(fine, policy.x_src, 1.0, 0.2, method)
        assert mine.dtype == reference.dtype == torch.float64
        torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_pads_a_vector_never_counts(dtype: torch.dtype) -> None:
    points = GaussianMixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.2]], dtype=dtype), torch.zeros(3), 0.0)
    x = torch.tensor([[0.2, 0.1]], dtype=dtype)
    for t in (1e-4, 1e-8, 1e-14, 1e-16) if dtype == torch.float64 else (1e-4, 1e-8):
        mine = t * velocity(points, x, t)
        with plain():
            torch.testing.assert_close(mine, t * velocity(points, x, t), rtol=1e-5, atol=1e-6)


def test_a_factor_too_large_for_a_cache_goes_the_plain_way() -> None:
    large = GMPolicy(
        GaussianMixture(torch.zeros(1, 1, 32, 4096), torch.zeros(1, 1, 32), 0.1), torch.ones(1, 1, 4096), 1.0
    )
    assert "no place in a cache" in str(choose(large, large.x_src, torch.ones(1)))


def test_only_the_gradients_that_are_asked_for() -> None:
    policy = policy_of(24, (2, 5, 4, 3), "shared", 1.0, dropped=False)
    x = policy.x_src.clone().requires_grad_()
    (mine,) = torch.autograd.grad(integrate(policy, x, 1.0, 0.2).sum(), x)
    with plain():
        (reference,) = torch.autograd.grad(integrate(policy, x, 1.0, 0.2).sum(), x)
    torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-10)
