"""One conformance suite over every public policy. A new policy is listed in `POLICIES`."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random
from torch import Tensor

import pitools.policies
from pitools import DXPolicy, GaussianMixture, GMPolicy, Policy, PolynomialPolicy, ShortcutPolicy, integrate
from pitools.policies import DXHead, GMHead, Head, Outputs, PolynomialHead, Segment, ShortcutHead
from pitools.types import Time

B, L, C, N = 3, 5, 2, 4
T_SRC = torch.tensor([1.0, 0.8, 0.3], dtype=torch.float64)


def gm(g: torch.Generator, x_src: Tensor, t_src: Time, dtype: torch.dtype) -> GMPolicy:
    u_means, logits = randn(g, B, L, N, C).to(dtype), randn(g, B, L, N).to(dtype)
    return GMPolicy.from_velocity(u_means, logits, randn(g, B).to(dtype) - 1, x_src, t_src)


def discrete_gm(g: torch.Generator, x_src: Tensor, t_src: Time, dtype: torch.dtype) -> GMPolicy:
    return GMPolicy(GaussianMixture(randn(g, B, L, N, C).to(dtype), randn(g, B, L, N).to(dtype), 0.0), x_src, t_src)


def dx(g: torch.Generator, x_src: Tensor, t_src: Time, dtype: torch.dtype) -> DXPolicy:
    return DXPolicy.from_velocity(randn(g, B, N, L, C).to(dtype), x_src, t_src, 0.1, shift=3.2)


def polynomial(g: torch.Generator, x_src: Tensor, t_src: Time, dtype: torch.dtype) -> PolynomialPolicy:
    return PolynomialPolicy.from_velocity(randn(g, B, N, L, C).to(dtype), x_src, t_src, shift=3.2)


def shortcut(g: torch.Generator, x_src: Tensor, t_src: Time, dtype: torch.dtype) -> ShortcutPolicy:
    return ShortcutPolicy.from_velocity(randn(g, B, L, C).to(dtype), x_src, t_src)


POLICIES = {build.__name__: build for build in (gm, discrete_gm, dx, polynomial, shortcut)}
HEADS: list[Head] = [GMHead(3), DXHead(4), PolynomialHead(3), ShortcutHead()]

everywhere = pytest.mark.parametrize("build", POLICIES.values(), ids=POLICIES.keys())
Build = Callable[[torch.Generator, Tensor, Time, torch.dtype], Policy]


def make(build: Build, t_src: Time = T_SRC, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Policy, Tensor]:
    g = random(seed)
    x_src = randn(g, B, L, C).to(dtype)
    return build(g, x_src, t_src, dtype), x_src


def test_every_public_policy_is_listed() -> None:
    public = {name for name in dir(pitools.policies) if name.endswith("Policy")}
    assert public == {type(make(build)[0]).__name__ for build in POLICIES.values()}
    assert {name for name in dir(pitools.policies) if name.endswith("Head")} - {"Head"} == {
        type(h).__name__ for h in HEADS
    }


@everywhere
def test_argument_names(build: Build) -> None:
    policy, _ = make(build)
    assert list(inspect.signature(policy.velocity).parameters) == ["x_t", "t"]
    assert list(inspect.signature(policy.detach).parameters) == []


@everywhere
@given(st.integers(0, 2**31), st.floats(0.01, 1))
def test_velocity_has_the_states_shape_and_each_sample_its_own_time(build: Build, seed: int, share: float) -> None:
    policy, _ = make(build, seed=seed)
    x, t = randn(random(seed + 1), B, L, C), share * float(T_SRC.min()) * torch.tensor([1.0, 0.5, 0.2]).double()
    together = policy.velocity(x, t)
    assert together.shape == (B, L, C)
    assert together.dtype == torch.float64
    for b in range(B):
        torch.testing.assert_close(together[b], policy.velocity(x, float(t[b]))[b], rtol=1e-9, atol=1e-9)


@everywhere
def test_a_number_a_0d_tensor_and_a_vector_are_the_same_time(build: Build) -> None:
    policy, x = make(build, t_src=0.9)
    answers = [
        policy.velocity(x, t)
        for t in (0.4, torch.tensor(0.4, dtype=torch.float64), torch.full((B,), 0.4, dtype=torch.float64))
    ]
    assert torch.equal(answers[0], answers[1])
    torch.testing.assert_close(answers[0], answers[2], rtol=1e-14, atol=1e-14)


@everywhere
def test_velocity_does_not_depend_on_the_other_samples(build: Build) -> None:
    policy, x = make(build)
    changed = x.clone()
    changed[1:] += 1
    assert torch.equal(policy.velocity(x, 0.5 * T_SRC)[0], policy.velocity(changed, 0.5 * T_SRC)[0])


@everywhere
def test_nothing_is_changed_in_place(build: Build) -> None:
    policy, x = make(build)
    before, kept = policy.velocity(x, 0.2), x.clone()
    integrate(policy, x, T_SRC, 0.0, step_size=1 / 16)
    policy.detach()
    assert torch.equal(x, kept)
    assert torch.equal(policy.velocity(x, 0.2), before)


@everywhere
def test_detach_keeps_the_field_and_drops_the_graph(build: Build) -> None:
    g = random(0)
    x_src = randn(g, B, L, C).requires_grad_()
    policy = build(g, x_src, T_SRC, torch.float64)
    x = randn(random(1), B, L, C)
    if policy.velocity(x, 0.2).requires_grad:  # a mixture over x_0 given as such may not depend on x_src's graph
        assert not policy.detach().velocity(x, 0.2).requires_grad
    torch.testing.assert_close(
        policy.detach().velocity(x, 0.2), policy.velocity(x, 0.2).detach(), rtol=1e-13, atol=1e-13
    )


@everywhere
def test_rolls_out_to_zero_in_float32_and_lands_on_its_denoised_state(build: Build) -> None:
    policy, x = make(build, dtype=torch.float32, t_src=1.0)
    assert policy.velocity(x, 1.0).dtype == torch.float32
    last = integrate(policy, x, 0.01, 0.0, step_size=1.0)
    torch.testing.assert_close(last, x - 0.01 * policy.velocity(x, 0.01), rtol=1e-5, atol=1e-6)
    end = integrate(policy, x, 1.0, 0.0)
    assert torch.isfinite(end).all()


@everywhere
def test_half_precision_is_lifted(build: Build) -> None:
    policy, x = make(build, dtype=torch.bfloat16, t_src=1.0)
    assert policy.velocity(x, 0.3).dtype == torch.float32


@everywhere
def test_bad_questions_are_refused(build: Build) -> None:
    policy, x = make(build)
    for t in (0.0, -0.1, 0.5, 1.1, math.nan, torch.full((L,), 0.1)):  # 0.5 is above the third sample's t_src
        with pytest.raises(ValueError, match=r"t must|t_src"):
            policy.velocity(x, t)
    for wrong in (x[:, :-1], x[..., :1], x[0], x[:1]):
        with pytest.raises(ValueError, match="x_t must"):
            policy.velocity(wrong, 0.1)
    with pytest.raises(ValueError, match="t_src"):
        make(build, t_src=0.0)
    with pytest.raises(ValueError, match="t_src"):
        make(build, t_src=torch.full((L,), 0.5))


@everywhere
def test_nan_parameters_are_refused(build: Build) -> None:
    g = random(0)
    with pytest.raises(ValueError, match="NaN"):
        build(g, torch.full((B, L, C), math.nan), T_SRC, torch.float64)


@pytest.mark.parametrize("head", HEADS, ids=lambda head: type(head).__name__)
def test_heads_read_what_they_ask_for(head: Head) -> None:
    g, sizes = random(0), head.sizes
    velocities = randn(g, B, L, sizes.velocities, C).requires_grad_()
    outputs = Outputs(velocities, randn(g, B, L, sizes.factor), randn(g, B, sizes.sample))
    x = randn(g, B, L, C)
    policy = head.read(outputs, x, T_SRC, Segment(length=0.25))
    u = policy.velocity(x, T_SRC)
    u.sum().backward()
    assert velocities.grad is not None
    assert velocities.grad.abs().sum() > 0
    equal = Outputs(velocities[:, :, :1].detach().expand_as(velocities), outputs.factor, outputs.sample)
    if not isinstance(head, PolynomialHead):  # of equal velocities, any policy starts with that velocity
        same = head.read(equal, x, T_SRC, Segment(length=0.25)).velocity(x, T_SRC)
        torch.testing.assert_close(same, velocities[:, :, 0].detach())


def test_heads_refuse_a_size_of_zero() -> None:
    for head in (GMHead, DXHead, PolynomialHead):
        with pytest.raises(ValueError, match="at least 1"):
            head(0)
