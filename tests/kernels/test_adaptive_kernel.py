"""Steps of each factor's own in the native kernel: those of `solve_per_factor`, its states and its errors."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixtures import on_path, rand, randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, integrate, kernels
from pitools.kernels import native, plain
from pitools.solvers import Arrival, PerFactor, solve_per_factor

pytestmark = pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")


def policy_of(seed: int, sizes: tuple[int, int, int, int], kind: str, t_src: Tensor | float = 1.0) -> GMPolicy:
    """A policy like a trained student's, `sizes` B, L, K, C; numbers that float32 has, too."""
    g, (batch, factors, components, channels) = random(seed), sizes
    means = (0.5 * randn(g, *sizes)).float().double()
    log_weights = randn(g, batch, factors, components).float().double()
    if "dropped" in kind:
        log_weights[rand(g, batch, factors, components) < 0.5] = -math.inf
        log_weights[..., 0] = 0.0
    variance = 0.01 + 0.05 * rand(g, *(sizes[:3] if "own" in kind else (batch, 1, 1)))
    variance = torch.zeros(()) if "points" in kind else variance.float().double()
    source = torch.as_tensor(t_src, dtype=torch.float64).expand(batch).float().double()
    x_src = on_path(means[:, :, 0], randn(g, batch, factors, channels), source[:, None]).float().double()
    return GMPolicy(GaussianMixture(means, log_weights, variance), x_src, source)


def single(policy: GMPolicy) -> GMPolicy:
    q = policy.mixture
    mixture = GaussianMixture(q.means.float(), q.log_weights.float(), q.variance.float())
    return GMPolicy(mixture, policy.x_src.float(), torch.as_tensor(policy.t_src).float())


def time(*t: float) -> Tensor:
    return torch.tensor(t if len(t) > 1 else t[0], dtype=torch.float64)


def fused(
    policy: GMPolicy, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor, scale: Tensor | float = 0.1
) -> Arrival:
    found = kernels.adaptive(policy, x, t_src, t_dst, method, scale)
    assert not isinstance(found, str), found
    return found


def reference(
    policy: GMPolicy, x: Tensor, t_src: Tensor, t_dst: Tensor, method: PerFactor, scale: Tensor | float = 0.1
) -> Arrival:
    """By PyTorch alone."""
    each, (batch, factors, _) = policy.factors(), x.shape
    source, end = (t.expand(batch).repeat_interleave(factors) for t in (t_src, t_dst))

    def f(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return each[index].velocity(x.unsqueeze(1), t).squeeze(1)

    return solve_per_factor(f, x.flatten(0, 1), source, end, method, scale)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 12), st.integers(1, 9)),
    st.sampled_from(["shared", "own", "points", "dropped", "dropped, own"]),
    st.integers(2, 6),
    st.sampled_from([1e-2, 1e-3, 1e-4]),
    st.booleans(),
    st.booleans(),
)
def test_it_takes_the_same_steps(
    seed: int, sizes: tuple[int, int, int, int], kind: str, order: int, tol: float, lands_on_data: bool, alike: bool
) -> None:
    g, batch = random(seed), sizes[0]
    t_src = torch.full((batch,), 0.9).double() if alike else (0.2 + 0.8 * rand(g, batch)).float().double()
    t_dst = t_src * (0.0 if lands_on_data else rand(g, batch)).float().double() if not lands_on_data else 0 * t_src
    still = rand(g, batch) < 0.2
    t_dst = torch.where(still, t_src, t_dst)
    policy, method = policy_of(seed, sizes, kind, t_src), PerFactor(tol, order)
    x = policy.x_src + 0.01
    mine, expected = fused(policy, x, t_src, t_dst, method), reference(policy, x, t_src, t_dst, method)
    # A decision within rounding of its limit may fall either way.
    same = mine.evaluations == expected.evaluations
    assert int((~same).sum()) <= len(same) // 50
    assert apart(mine.x_end[same], expected.x_end[same]) < 1e-7
    assert apart(mine.x_end, expected.x_end) < 30 * tol
    stood = still.repeat_interleave(sizes[1])
    assert torch.equal(mine.x_end[stood], x.flatten(0, 1)[stood])
    assert not mine.evaluations[stood].any()
    assert bool((mine.evaluations[~stood] >= 2).all())


@pytest.mark.parametrize("kind", ["shared", "own", "points", "dropped"])
@pytest.mark.parametrize(("t_src", "t_dst"), [(1.0, 0.0), (1.0, 0.76), (0.76, 0.0), (0.3, 0.01)])
def test_states_and_evaluations_at_typical_shapes(kind: str, t_src: float, t_dst: float) -> None:
    policy, ends = policy_of(1, (1, 203, 8, 16), kind, t_src), (time(t_src), time(t_dst))
    ends = ends[0].float().double(), ends[1].float().double()
    mine, expected = (run(policy, policy.x_src, *ends, PerFactor()) for run in (fused, reference))
    assert torch.equal(mine.evaluations, expected.evaluations)
    assert apart(mine.x_end, expected.x_end) < 1e-8
    low = single(policy)
    rough = fused(low, low.x_src, ends[0].float(), ends[1].float(), PerFactor())
    assert rough.x_end.dtype == torch.float32
    errors = (rough.x_end - expected.x_end).abs().amax(1)
    assert float(errors.quantile(0.95)) < 1e-5
    assert float(errors.max()) < 1e-3
    assert float((rough.evaluations == expected.evaluations).double().mean()) > 0.98


@pytest.mark.parametrize("factors", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_need_not_be_full(factors: int, dtype: torch.dtype) -> None:
    policy = policy_of(2, (2, 33, 4, 3), "shared")
    part = GaussianMixture(*(v[:1, :factors] for v in (policy.mixture.means, policy.mixture.log_weights)), 0.02)
    some = GMPolicy(part, policy.x_src[:1, :factors], 1.0)
    some = single(some) if dtype == torch.float32 else some
    mine = fused(some, some.x_src, time(1.0).to(dtype), time(0.0).to(dtype), PerFactor())
    expected = reference(some, some.x_src, time(1.0).to(dtype), time(0.0).to(dtype), PerFactor())
    assert mine.x_end.shape == (factors, 3)
    assert torch.equal(mine.evaluations, expected.evaluations)
    assert apart(mine.x_end, expected.x_end) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("t_src", [0.9, 0.4])
def test_it_may_set_out_later_than_the_policy(t_src: float) -> None:
    policy, ends = policy_of(16, (2, 20, 4, 3), "shared", time(1.0, 0.9)), (time(t_src), time(0.1))
    mine, expected = (run(policy, 0.9 * policy.x_src, *ends, PerFactor()) for run in (fused, reference))
    assert torch.equal(mine.evaluations, expected.evaluations)
    assert apart(mine.x_end, expected.x_end) < 1e-9


def test_each_factor_has_a_scale_of_its_own() -> None:
    policy, scale = policy_of(3, (2, 20, 4, 3), "own"), 0.02 + 0.3 * rand(random(0), 40)
    mine, expected = (run(policy, policy.x_src, time(1.0), time(0.0), PerFactor(), scale) for run in (fused, reference))
    assert torch.equal(mine.evaluations, expected.evaluations)
    assert not torch.equal(mine.evaluations, fused(policy, policy.x_src, time(1.0), time(0.0), PerFactor()).evaluations)
    assert apart(mine.x_end, expected.x_end) < 1e-9


@pytest.mark.parametrize("kind", ["shared", "own", "points"])
def test_integrate_takes_it_and_gives_the_same(kind: str) -> None:
    policy = policy_of(4, (2, 20, 4, 3), kind, time(0.9, 0.5))
    t_dst = time(0.0, 0.5).float().double()
    mine = integrate(policy, policy.x_src, policy.t_src, t_dst, "adaptive")
    with plain():
        assert isinstance(kernels.adaptive(policy, policy.x_src, time(0.5), time(0.0), PerFactor()), str)
        expected = integrate(policy, policy.x_src, policy.t_src, t_dst, "adaptive")
    assert apart(mine, expected) < 1e-9
    assert torch.equal(mine[1], policy.x_src[1])


def test_integrate_asks_for_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(4, (1, 5, 4, 3), "shared")
    told = Arrival(torch.full((5, 3), 7.0, dtype=torch.float64), torch.ones(5, dtype=torch.long))
    monkeypatch.setattr(kernels, "adaptive", lambda *_: told)
    assert bool((integrate(policy, policy.x_src, 1.0, 0.0, "adaptive") == 7).all())


def test_threads_do_not_change_a_bit() -> None:
    policy = single(policy_of(5, (3, 1000, 8, 4), "shared"))
    before = torch.get_num_threads()
    try:
        ends = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            ends.append(fused(policy, policy.x_src, torch.tensor(1.0), torch.tensor(0.0), PerFactor()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ends[0].x_end, ends[1].x_end)
    assert torch.equal(ends[0].evaluations, ends[1].evaluations)


def test_memory_may_lie_in_any_order() -> None:
    policy = policy_of(6, (2, 20, 5, 3), "own")
    out = fused(policy, policy.x_src, time(1.0), time(0.2), PerFactor())
    apart = torch.stack([policy.x_src, policy.x_src], dim=-1)[..., 0]
    spread = replace(policy.mixture)
    object.__setattr__(spread, "means", policy.mixture.means.contiguous())
    object.__setattr__(spread, "log_weights", policy.mixture.log_weights.mT.contiguous().mT)
    for mixture, x in ((policy.mixture, apart), (spread, policy.x_src)):
        other = fused(GMPolicy(mixture, x, 1.0), x, time(1.0), time(0.2), PerFactor())
        assert torch.equal(other.x_end, out.x_end)


def told(run: object, *arguments: object) -> str:
    with pytest.raises(ValueError, match="factor") as caught:
        run(*arguments)  # type: ignore[operator]
    return str(caught.value)


@pytest.mark.parametrize("most", [2, 3, 9, 14])
def test_too_many_evaluations_are_the_same_error(most: int) -> None:
    t_src, t_dst = time(1.0, 0.5, 0.4).float().double(), time(1.0, 0.49, 0.0).float().double()
    policy, method = policy_of(7, (3, 30, 4, 3), "shared", t_src), PerFactor(1e-4, max_evaluations=most)
    arguments = (policy, policy.x_src, t_src, t_dst, method)
    message = told(fused, *arguments)
    assert message == told(reference, *arguments)
    assert f"max_evaluations = {most} for tol = 0.0001" in message
    assert int(re.findall(r"factor (\d+)", message)[0]) >= (30 if most < 9 else 60)
    enough = int(reference(*arguments[:-1], PerFactor(1e-4)).evaluations.max())
    fused(*arguments[:-1], PerFactor(1e-4, max_evaluations=enough))
    assert told(fused, *arguments[:-1], PerFactor(1e-4, max_evaluations=enough - 1)) == told(
        reference, *arguments[:-1], PerFactor(1e-4, max_evaluations=enough - 1)
    )


def test_a_tolerance_below_rounding_is_an_error_and_no_endless_loop() -> None:
    policy = single(policy_of(8, (1, 20, 4, 3), "shared"))
    arguments = (policy, policy.x_src, torch.tensor(1.0), torch.tensor(0.0), PerFactor(1e-12, 4, 60))
    assert "torch.float32 if tol is near its rounding" in told(fused, *arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("factor", [3, 21])
def test_what_is_not_finite_is_the_same_error(value: float, factor: int) -> None:
    policy, x = policy_of(9, (1, 40, 4, 2), "shared"), policy_of(9, (1, 40, 4, 2), "shared").x_src.clone()
    x[0, factor, 1] = value
    arguments = (policy, x, time(1.0), time(0.0), PerFactor())
    message = told(fused, *arguments)
    assert message == told(reference, *arguments)
    assert f"factor {factor} is not finite" in message


def test_the_error_that_comes_first_is_raised() -> None:
    policy = policy_of(10, (1, 40, 4, 2), "shared")
    x = policy.x_src.clone()
    x[0, 30, 0] = math.nan  # found before the first step, but after it in the order of factors
    few = PerFactor(max_evaluations=2)
    for method in (few, PerFactor()):
        arguments = (policy, x, time(1.0), time(0.0), method)
        assert told(fused, *arguments) == told(reference, *arguments)
        assert "factor 30 is not finite" in told(fused, *arguments)
    assert "factor 0 needs more" in told(fused, policy, policy.x_src, time(1.0), time(0.0), few)


def test_integrate_raises_the_error() -> None:
    policy = policy_of(11, (2, 5, 4, 2), "shared")
    with pytest.raises(ValueError, match="factor 0 needs more than max_evaluations = 3"):
        integrate(policy, policy.x_src, 1.0, 0.0, PerFactor(max_evaluations=3))


def test_gradients_take_the_plain_path() -> None:
    policy = policy_of(12, (1, 6, 4, 3), "shared")
    q, weight = policy.mixture, randn(random(1), 1, 6, 3)

    def run(*leaves: Tensor) -> Tensor:
        fresh = GMPolicy(GaussianMixture(leaves[0], leaves[1], q.variance), leaves[2], 1.0)
        return (integrate(fresh, leaves[3], 1.0, 0.1, PerFactor(1e-6)) * weight).sum()

    leaves = [v.detach().clone() for v in (q.means, q.log_weights, policy.x_src, policy.x_src + 0.01)]
    for i in range(4):
        learning = [leaf.requires_grad_(n == i) for n, leaf in enumerate(leaves)]
        (slope,) = torch.autograd.grad(run(*learning), learning[i])
        nudge = 1e-4 * torch.sign(slope)
        with torch.no_grad():
            rise = run(*(v + (n == i) * nudge if n == i else v for n, v in enumerate(leaves)))
            rise = rise - run(*(v - nudge if n == i else v for n, v in enumerate(leaves)))
        assert float(rise) / 2e-4 == pytest.approx(float(slope.abs().sum()), rel=1e-2)


def test_every_reason_for_the_plain_path() -> None:
    policy = policy_of(13, (1, 6, 4, 3), "shared")
    x, ends = policy.x_src, (time(1.0), time(0.0))

    def reason(field: object = policy, x: Tensor = x, t_src: Tensor = ends[0]) -> str:
        why = kernels.adaptive(field, x, t_src, ends[1], PerFactor())
        assert isinstance(why, str)
        return why

    learning = x.clone().requires_grad_()
    assert "no gradient" in reason(x=learning)
    assert "no gradient" in reason(GMPolicy(policy.mixture, learning, 1.0))
    with torch.no_grad():
        assert isinstance(kernels.adaptive(policy, learning, *ends, PerFactor()), Arrival)
    with plain():
        assert "asked for" in reason()
    assert "Gaussian-mixture policy" in reason(GaussianMixture(randn(random(0), 4, 3), torch.zeros(4), 0.1))
    assert "and not (1, 6, 3)" in reason(x=x[:, :2])
    assert "bfloat16" in reason(x=x.bfloat16())
    assert "above t_src" in reason(GMPolicy(policy.mixture, x, 0.5))


def test_without_a_compiler_pytorch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(14, (1, 6, 4, 3), "shared")
    mine = integrate(policy, policy.x_src, 1.0, 0.0, "adaptive")
    monkeypatch.setattr(native, "library", lambda: "no compiler")
    assert "no compiler" in str(kernels.adaptive(policy, policy.x_src, time(1.0), time(0.0), PerFactor()))
    assert apart(integrate(policy, policy.x_src, 1.0, 0.0, "adaptive"), mine) < 1e-8


def test_the_finest_of_the_dtypes_counts() -> None:
    policy = single(policy_of(15, (2, 5, 4, 2), "shared"))
    fine = GMPolicy(policy.mixture, policy.x_src.double(), 1.0)
    mine = integrate(fine, policy.x_src, 1.0, 0.2, "adaptive")
    with plain():
        expected = integrate(fine, policy.x_src, 1.0, 0.2, "adaptive")
    assert mine.dtype == expected.dtype == torch.float64
    assert apart(mine, expected) < 1e-4


def test_no_factors() -> None:
    empty = GMPolicy(GaussianMixture(torch.zeros(0, 3, 4, 2), torch.zeros(0, 3, 4), 0.1), torch.zeros(0, 3, 2), 1.0)
    assert integrate(empty, empty.x_src, 1.0, 0.0, "adaptive").shape == (0, 3, 2)
