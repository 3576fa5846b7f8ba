"""Gaussian-mixture maths against quadrature, other parametrisations and limits."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from mixtures import Case, cases, on_path, rand, randn, random, velocity_scale
from scipy import integrate as quadrature
from torch import Tensor

from pitools import GaussianMixture


def f64(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def posterior_at(case: Case) -> GaussianMixture:
    """The mixture over x_0 seen from (x_src, t_src): one for each state."""
    return case.prior.condition(case.x_src, case.t_src)


@given(cases())
def test_oracle_posterior_has_the_priors_velocity_everywhere(case: Case) -> None:
    policy = posterior_at(case)
    # Off the path too: a policy is a field, not a curve.
    off = case.x_t + case.t[:, None] * randn(random(0), *case.x_t.shape)
    for x in (case.x_t, off):
        mine = policy.velocity(x, case.t, case.x_src, case.t_src)
        exact = case.prior.velocity(x, case.t)
        assert ((mine - exact).abs() / velocity_scale(case)).max() < 1e-9


@given(cases(), st.floats(0.05, 0.95))
def test_conditioning_in_two_steps_equals_one(case: Case, share: float) -> None:
    between = case.t + share * (case.t_src - case.t)
    x_between = on_path(case.x_t, case.x_src, torch.full_like(between, share))
    source = posterior_at(case)
    halfway = source.condition(x_between, between, case.x_src, case.t_src)
    twice = halfway.condition(case.x_t, case.t, x_between, between)
    once = source.condition(case.x_t, case.t, case.x_src, case.t_src)
    scale = case.prior.means.norm(dim=-1).max() + case.x_t.norm(dim=-1).max() + 1e-3
    assert (twice.mean() - once.mean()).abs().max() / scale < 1e-9
    torch.testing.assert_close(twice.variance, once.variance, rtol=1e-8, atol=1e-14)


@given(cases())
def test_conditioning_where_it_stands_is_the_identity(case: Case) -> None:
    policy = posterior_at(case)
    same = policy.condition(case.x_src, case.t_src, case.x_src, case.t_src)
    torch.testing.assert_close(same.means, policy.means, rtol=0, atol=0)
    torch.testing.assert_close(same.log_weights, policy.log_weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same.variance, policy.variance, rtol=0, atol=0)


@given(cases())
def test_denoise_and_velocity_are_those_of_the_posterior(case: Case) -> None:
    x_0 = case.prior.condition(case.x_t, case.t).mean()
    assert ((case.prior.denoise(case.x_t, case.t) - x_0).abs() / velocity_scale(case) / case.t[:, None]).max() < 1e-12
    u = (case.x_t - x_0) / case.t[:, None]
    assert ((case.prior.velocity(case.x_t, case.t) - u).abs() / velocity_scale(case)).max() < 1e-12


def quadrature_1d(weight: Callable[[float], float], centre: float, width: float) -> tuple[float, ...]:
    """The mass, mean and second moment of an unnormalised density on the line."""
    points = np.linspace(centre - width, centre + width, 41)
    return tuple(
        sum(
            quadrature.quad(lambda z, p=p: z**p * weight(z), a, b, epsabs=0, epsrel=1e-10)[0]
            for a, b in pairwise(points)
        )
        for p in range(3)
    )


@pytest.mark.parametrize("variances", [[0.3, 0.3, 0.3], [0.05, 0.5, 1.2]])
@pytest.mark.parametrize(("t_src", "t"), [(1.0, 0.7), (1.0, 0.2), (0.8, 0.5), (0.6, 0.59)])
def test_posterior_moments_and_density_agree_with_quadrature_in_1d(
    variances: list[float], t_src: float, t: float
) -> None:
    means, weights = [-1.5, 0.2, 1.0], [0.5, 0.2, 0.3]
    gm = GaussianMixture(f64(means)[:, None], f64(weights).log(), f64(variances))
    x_src, x_t = f64([[0.4]]), f64([[0.25]])

    def normal(z: float, mean: float, variance: float) -> float:
        return math.exp(-((z - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)

    def weight(z: float) -> float:
        q = sum(w * normal(z, m, v) for w, m, v in zip(weights, means, variances, strict=True))
        ratio = normal(float(x_t), (1 - t) * z, t**2) / normal(float(x_src), (1 - t_src) * z, t_src**2)
        return q * ratio

    mass, first, second = quadrature_1d(weight, 0.0, 9.0)
    posterior = gm.condition(x_t, t, x_src, t_src)
    assert float(posterior.mean()) == pytest.approx(first / mass, rel=1e-8)
    assert float(gm.velocity(x_t, t, x_src, t_src)) == pytest.approx((0.25 - first / mass) / t, rel=1e-8)
    spread = posterior.log_weights.exp() @ (posterior.means.squeeze(-1).square() + posterior.variance).mT
    assert float(spread) == pytest.approx(second / mass, rel=1e-8)
    for z in (-1.0, 0.1, 0.7):
        density = math.exp(float(posterior.log_prob(f64([[z]]))))
        assert density == pytest.approx(weight(z) / mass, rel=1e-8)


@pytest.mark.parametrize("variances", [[0.4, 0.4], [0.1, 0.6]])
def test_posterior_mean_and_density_agree_with_quadrature_in_2d(variances: list[float]) -> None:
    means = np.array([[-0.8, 0.3], [0.9, -0.4]])
    gm = GaussianMixture(torch.tensor(means), f64([0.3, 0.7]).log(), f64(variances))
    x_src, x_t, t_src, t = np.array([0.3, -0.5]), np.array([0.1, -0.2]), 0.9, 0.5

    def weight(y: float, x: float) -> float:
        z = np.array([x, y])
        q = sum(
            w / v * math.exp(-((z - m) @ (z - m)) / (2 * v))
            for w, m, v in zip([0.3, 0.7], means, variances, strict=True)
        )
        near = ((x_t - (1 - t) * z) ** 2).sum() / t**2 - ((x_src - (1 - t_src) * z) ** 2).sum() / t_src**2
        return q * math.exp(-near / 2)

    box = (-6, 6, -6, 6)
    mass = quadrature.dblquad(weight, *box, epsrel=1e-7)[0]
    mean = [quadrature.dblquad(lambda y, x, i=i: (x, y)[i] * weight(y, x), *box, epsrel=1e-7)[0] / mass for i in (0, 1)]
    posterior = gm.condition(torch.tensor(x_t)[None], t, torch.tensor(x_src)[None], t_src)
    np.testing.assert_allclose(posterior.mean()[0].numpy(), mean, rtol=1e-5)
    for point in ([0.2, -0.3], [-0.7, 0.4]):
        assert math.exp(float(posterior.log_prob(f64([point])))) == pytest.approx(weight(*point[::-1]) / mass, rel=1e-5)


@given(cases(variance="shared"))
def test_velocity_agrees_with_the_score_of_the_diffused_mixture(case: Case) -> None:
    prior, alpha, x = case.prior, (1 - case.t)[:, None], case.x_t.clone().requires_grad_()
    variance = alpha**2 * prior.variance + case.t[:, None] ** 2
    distance = (x[:, None] - alpha[:, None] * prior.means).square().sum(-1)
    log_density = torch.logsumexp(prior.log_weights - distance / (2 * variance), dim=-1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    mine = -(case.x_t + alpha * prior.velocity(case.x_t, case.t)) / case.t[:, None]
    assert ((mine - score).abs() * case.t[:, None] / velocity_scale(case)).max() < 1e-9


@given(cases(variance="own"))
def test_log_prob_agrees_with_torch_distributions(case: Case) -> None:
    prior = case.prior
    normal = torch.distributions.Normal(prior.means, prior.variance.sqrt()[:, None])
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=prior.log_weights), torch.distributions.Independent(normal, 1)
    )
    torch.testing.assert_close(prior.log_prob(case.x_src), mixture.log_prob(case.x_src), rtol=1e-9, atol=1e-9)


def test_samples_have_the_mixtures_moments_and_follow_the_generator() -> None:
    means, weights = torch.tensor([[0.0, 0.0], [4.0, 1.0], [-2.0, 3.0]]), torch.tensor([0.2, 0.5, 0.3])
    gm = GaussianMixture(means, weights.log(), torch.tensor([0.1, 0.4, 0.0]))
    x = gm.sample((40_000,), generator=random(1))
    assert x.shape == (40_000, 2)
    torch.testing.assert_close(x.mean(0), gm.mean(), rtol=0, atol=0.05)
    near = torch.cdist(x, means).argmin(1)
    torch.testing.assert_close(near.bincount() / len(x), weights, rtol=0, atol=0.01)
    torch.testing.assert_close(x[near == 1].var(0), torch.tensor([0.4, 0.4]), rtol=0.05, atol=0)
    assert (x[near == 2] == means[2]).all()
    assert torch.equal(x, gm.sample((40_000,), generator=random(1)))
    batch = GaussianMixture(means.expand(5, 7, 3, 2), weights.log().expand(5, 7, 3), 0.1)
    assert batch.sample((4, 2), generator=random(1)).shape == (4, 2, 5, 7, 2)


@given(cases(variance="own", t_min=0.05))
def test_zero_variance_is_the_limit_of_small_ones(case: Case) -> None:
    def velocity(variance: float) -> Tensor:
        return GaussianMixture(case.prior.means, case.prior.log_weights, variance).velocity(case.x_t, case.t)

    scale = case.prior.means.abs().max() + 0.1
    gaps = [float((velocity(v * float(scale) ** 2) - velocity(0.0)).abs().max()) for v in (1e-8, 1e-10)]
    assert gaps[1] <= max(0.02 * gaps[0], 1e-9 * float(velocity_scale(case).max()))


@given(cases(variance="own", max_components=1))
def test_one_component_is_linear_and_gaussian(case: Case) -> None:
    mean, variance, alpha = case.prior.means[0], case.prior.variance, (1 - case.t)[:, None]
    total = alpha**2 * variance + case.t[:, None] ** 2
    x_0 = mean + alpha * variance / total * (case.x_t - alpha * mean)
    assert ((case.prior.denoise(case.x_t, case.t) - x_0).abs() / velocity_scale(case) / case.t[:, None]).max() < 1e-12
    conditioned = case.prior.condition(case.x_t, case.t)
    torch.testing.assert_close(conditioned.variance, variance * case.t[:, None] ** 2 / total, rtol=1e-10, atol=0)


@given(cases())
def test_equivariant_under_permutation_shift_and_rotation(case: Case) -> None:
    prior, policy = case.prior, posterior_at(case)
    u = policy.velocity(case.x_t, case.t, case.x_src, case.t_src)
    tolerance = 1e-9 * velocity_scale(case)
    order = torch.randperm(prior.components, generator=random(0))
    variance = policy.variance.expand(policy.log_weights.shape)
    permuted = GaussianMixture(policy.means[:, order], policy.log_weights[:, order], variance[:, order])
    assert ((permuted.velocity(case.x_t, case.t, case.x_src, case.t_src) - u).abs() < tolerance).all()

    offset = case.prior.means.abs().max() * randn(random(1), prior.channels)
    moved = GaussianMixture(policy.means + offset, policy.log_weights, policy.variance)
    x_t, x_src = (x + (1 - t)[:, None] * offset for x, t in ((case.x_t, case.t), (case.x_src, case.t_src)))
    assert ((moved.velocity(x_t, case.t, x_src, case.t_src) + offset - u).abs() < 10 * tolerance).all()

    turn = torch.linalg.qr(randn(random(2), prior.channels, prior.channels)).Q
    turned = GaussianMixture(policy.means @ turn, policy.log_weights, policy.variance)
    assert (
        (turned.velocity(case.x_t @ turn, case.t, case.x_src @ turn, case.t_src) - u @ turn).abs() < tolerance
    ).all()


@given(cases())
def test_temperature_one_is_the_identity(case: Case) -> None:
    same = case.prior.tempered(1.0)
    torch.testing.assert_close(same.log_weights, case.prior.log_weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same.variance, case.prior.variance, rtol=0, atol=0)
    torch.testing.assert_close(same.means, case.prior.means, rtol=0, atol=0)


@given(cases(variance="own", max_components=1), st.floats(0.1, 3.0))
def test_temperature_is_exact_for_one_component(case: Case, temperature: float) -> None:
    tempered = case.prior.tempered(temperature)
    points = case.prior.sample((5,), generator=random(0))
    ratio = tempered.log_prob(points) - case.prior.log_prob(points) / temperature
    torch.testing.assert_close(ratio, ratio[:1].expand(5), rtol=1e-9, atol=1e-9)  # log-densities differ by a constant


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
@pytest.mark.parametrize("variances", [[0.02, 0.02, 0.02], [0.01, 0.05, 0.2]])
def test_temperature_approaches_the_normalised_power_of_far_components(
    temperature: float, variances: list[float]
) -> None:
    means = f64([-12.0, 0.0, 9.0])[:, None]
    gm = GaussianMixture(means, f64([0.2, 0.5, 0.3]).log(), f64(variances))

    def power(z: float) -> float:
        return math.exp(float(gm.log_prob(f64([z]))) / temperature)

    pieces = [quadrature.quad(power, m - 4, m + 4, points=[m], epsabs=0, epsrel=1e-9)[0] for m in (-12.0, 0.0, 9.0)]
    tempered = gm.tempered(temperature)
    np.testing.assert_allclose(tempered.log_weights.exp().numpy(), np.array(pieces) / sum(pieces), rtol=1e-6)
    for z in (-12.1, 0.1, 9.2):
        density = math.exp(float(tempered.log_prob(f64([z]))))
        assert density == pytest.approx(power(z) / sum(pieces), rel=1e-6)


@given(cases())
def test_low_temperature_picks_the_heaviest_component(case: Case) -> None:
    prior = case.prior
    height = prior.log_weights - (prior.channels / 2 * prior.variance.log() if float(prior.variance.min()) > 0 else 0)
    top = height.sort(descending=True).values
    assume(len(top) == 1 or float(top[0] - top[1]) > 0.1)
    tempered = prior.tempered(1e-3)
    assert int(tempered.log_weights.argmax()) == int(height.argmax())
    assert float(tempered.log_weights.max()) > -1e-6


@given(st.integers(0, 2**31), st.integers(1, 6), st.floats(0.0, 0.99))
def test_dropout_is_one_mask_a_sample_never_drops_all_and_renormalises(seed: int, components: int, rate: float) -> None:
    g = random(seed)
    gm = GaussianMixture(randn(g, 50, 3, components, 2), randn(g, 50, 3, components), 0.1)
    dropped = gm.dropped(rate, generator=g)
    kept = dropped.log_weights > -math.inf
    assert kept.any(-1).all()
    assert (kept == kept[:, :1]).all()
    torch.testing.assert_close(dropped.log_weights.exp().sum(-1), torch.ones(50, 3).double())
    ratio = (dropped.log_weights - gm.log_weights).masked_fill(~kept, math.nan)
    spread = ratio.nan_to_num(-math.inf).amax(-1) - ratio.nan_to_num(math.inf).amin(-1)
    assert spread.abs().max() < 1e-9  # what is left keeps its proportions


def test_dropout_drops_at_its_rate_and_only_among_components_that_are_there() -> None:
    gm = GaussianMixture(randn(random(0), 4000, 1, 8, 2), torch.zeros(4000, 1, 8), 0.1)
    share = (gm.dropped(0.3, generator=random(1)).log_weights == -math.inf).double().mean()
    assert float(share) == pytest.approx(0.3, abs=0.01)
    half_gone = torch.zeros(200, 2, 2)
    half_gone[:, 0, 0] = half_gone[:, 1, 1] = -math.inf
    left = GaussianMixture(randn(random(0), 200, 2, 2, 1), half_gone, 0.1).dropped(0.9, generator=random(2))
    assert (left.log_weights > -math.inf).any(-1).all()


@pytest.mark.parametrize("variance", [0.0, 0.2, "own"])
def test_gradients_pass_gradcheck(variance: float | str) -> None:
    g = random(3)
    means, logits = randn(g, 2, 2, 4, 3).requires_grad_(), randn(g, 2, 2, 4).requires_grad_()
    x_t, x_src, t = randn(g, 2, 2, 3).requires_grad_(), randn(g, 2, 2, 3).requires_grad_(), f64([0.3, 0.8])
    own = rand(g, 2, 2, 4).requires_grad_() if variance == "own" else torch.tensor(variance, dtype=torch.float64)
    t.requires_grad_()

    def velocity(*args: Tensor) -> Tensor:
        means, logits, own, x_t, x_src, t = args
        return GaussianMixture(means, logits, own).velocity(x_t, t, x_src, 0.9)

    def everything(*args: Tensor) -> Tensor:
        means, logits, own, x_t, x_src, t = args
        posterior = GaussianMixture(means, logits, own).tempered(0.7).condition(x_t, t, x_src, 0.9)
        return torch.cat([posterior.means.flatten(), posterior.log_weights.flatten(), posterior.variance.flatten()])

    inputs = (means, logits, own, x_t, x_src, t)
    assert torch.autograd.gradcheck(velocity, inputs)
    assert torch.autograd.gradcheck(everything, inputs)
    assert torch.autograd.gradgradcheck(velocity, inputs)


@given(cases(t_min=1 / 128))
def test_float32_is_accurate_on_the_path(case: Case) -> None:
    single = posterior_at(case)
    single = GaussianMixture(single.means.float(), single.log_weights.float(), single.variance.float())
    inputs = [z.float() for z in (case.x_t, case.t, case.x_src, case.t_src)]
    mine = single.velocity(*inputs)
    assert mine.dtype == torch.float32
    # The reference sees the same rounded numbers: what is measured is the formula, not the rounding.
    double = GaussianMixture(single.means.double(), single.log_weights.double(), single.variance.double())
    x_t, t, x_src, t_src = (z.double() for z in inputs)
    exact = double.velocity(x_t, t, x_src, t_src)
    scale = velocity_scale(case)
    # A decision boundary is where half a unit in the last place of the input already moves the answer.
    nudge = 6e-8 * randn(random(0), *x_t.shape).sign() * x_t.abs()
    decided = ((double.velocity(x_t + nudge, t, x_src, t_src) - exact).abs() / scale).amax(-1) < 2e-6
    assert decided.double().mean() > 0.5
    assert ((mine - exact).abs() / scale)[decided].max() < 1e-5


@given(
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1e-4, 1 / 128, 0.3, 1.0]),
    st.sampled_from([0.01, 0.1, 1.0]),
    st.sampled_from([0.0, 1e-6, 0.1, 10.0]),
    st.sampled_from([0.0, 1.0, 100.0]),
)
def test_float32_is_finite_everywhere(seed: int, share: float, t_src: float, variance: float, spread: float) -> None:
    g = random(seed)
    gm = GaussianMixture(spread * torch.randn(64, 8, 3, generator=g), torch.randn(64, 8, generator=g), variance)
    x_src, x_t = torch.randn(2, 64, 3, generator=g).unbind()
    t = max(1e-6, share * t_src)
    for velocity in (gm.velocity(x_t, t, x_src, t_src), gm.velocity(x_src, t_src, x_src, t_src)):
        assert torch.isfinite(velocity).all()
    posterior = gm.condition(x_t, t, x_src, t_src)
    assert torch.isfinite(posterior.means).all()
    assert torch.isfinite(posterior.mean()).all()


def test_half_precision_comes_out_as_float32_and_float64_stays() -> None:
    half = GaussianMixture(torch.randn(4, 2).bfloat16(), torch.zeros(4).bfloat16(), 0.1)
    assert half.means.dtype == torch.float32
    assert half.velocity(torch.randn(3, 2).bfloat16(), 0.5).dtype == torch.float32
    double = GaussianMixture(torch.randn(4, 2).double(), torch.zeros(4), 0.1)
    assert double.velocity(torch.randn(3, 2), 0.5).dtype == torch.float64


def test_time_is_aligned_with_the_leading_dimension() -> None:
    g = random(5)
    gm = GaussianMixture(randn(g, 4, 4, 3, 2), randn(g, 4, 4, 3), 0.2)  # B = L = 4: a wrong broadcast would pass
    x, t = randn(g, 4, 4, 2), f64([0.2, 0.4, 0.6, 0.8])
    alone = [GaussianMixture(gm.means[i], gm.log_weights[i], 0.2).velocity(x[i], float(t[i])) for i in range(4)]
    torch.testing.assert_close(gm.velocity(x, t), torch.stack(alone))


BAD = {
    "means without components": lambda: GaussianMixture(torch.zeros(3), torch.zeros(3), 0.1),
    "weights of another shape": lambda: GaussianMixture(torch.zeros(3, 2), torch.zeros(2), 0.1),
    "variance of another shape": lambda: GaussianMixture(torch.zeros(3, 2), torch.zeros(3), torch.ones(2)),
    "negative variance": lambda: GaussianMixture(torch.zeros(3, 2), torch.zeros(3), -0.1),
    "NaN variance": lambda: GaussianMixture(torch.zeros(3, 2), torch.zeros(3), math.nan),
    "NaN means": lambda: GaussianMixture(torch.full((3, 2), math.nan), torch.zeros(3), 0.1),
    "NaN weights": lambda: GaussianMixture(torch.zeros(3, 2), torch.tensor([0.0, math.nan, 0.0]), 0.1),
    "no component left": lambda: GaussianMixture(torch.zeros(3, 2), torch.full((3,), -math.inf), 0.1),
}


@pytest.mark.parametrize("make", BAD.values(), ids=BAD.keys())
def test_a_bad_mixture_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"means|log_weights|variance"):
        make()


def test_bad_questions_are_refused() -> None:
    gm = GaussianMixture(torch.zeros(3, 2), torch.zeros(3), 0.0)
    x = torch.zeros(5, 2)
    questions = {
        "no density": lambda: gm.log_prob(x),
        r"x_t must be": lambda: gm.velocity(torch.zeros(5, 3), 0.5),
        r"must lie in \(0, ": lambda: gm.velocity(x, 0.0),
        r"must lie in \(0, 1\]": lambda: gm.velocity(x, 0.5, x, 1.5),
        "may not exceed": lambda: gm.velocity(x, 0.6, x, 0.5),
        "must lie": lambda: gm.velocity(x, math.nan),
        "x_src is needed": lambda: gm.velocity(x, 0.2, None, 0.5),
        "x_src must have": lambda: gm.velocity(x, 0.2, x[:4], 0.5),
        "one value for each of the 5": lambda: gm.velocity(x, torch.full((4,), 0.5)),
        "temperature": lambda: gm.tempered(0.0),
        "rate": lambda: gm.dropped(1.0),
        "zero and positive": lambda: GaussianMixture(gm.means, gm.log_weights, torch.tensor([0.0, 0.1, 0.1])).tempered(
            0.5
        ),
    }
    for message, question in questions.items():
        with pytest.raises(ValueError, match=message):
            question()


@pytest.mark.parametrize(("mixture", "state"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_mixed_precisions_meet_in_the_better_one(mixture: torch.dtype, state: torch.dtype) -> None:
    g = random(0)
    gm = GaussianMixture(randn(g, 4, 2).to(mixture), torch.zeros(4, dtype=mixture), 0.1)
    x, x_src = randn(g, 3, 2).to(state), randn(g, 3, 2).to(state)
    reference = GaussianMixture(gm.means.double(), gm.log_weights.double(), gm.variance.double())
    u = gm.velocity(x, 0.3, x_src, 0.7)
    assert u.dtype == torch.float64
    torch.testing.assert_close(u, reference.velocity(x.double(), 0.3, x_src.double(), 0.7), rtol=1e-6, atol=1e-6)


def test_a_batch_of_mixtures_meets_states_of_the_same_rank_only() -> None:
    batch = GaussianMixture(torch.zeros(3, 4, 2), torch.zeros(3, 4), 0.1)
    assert batch.velocity(torch.zeros(3, 2), 0.5).shape == (3, 2)
    with pytest.raises(ValueError, match="leading dimensions"):
        batch.velocity(torch.zeros(3, 3, 2), 0.5)  # [B, L, C] with B = L: from the right it would pass


def test_extremes_of_temperature_and_of_sampling() -> None:
    gm = GaussianMixture(torch.randn(3, 2, generator=random(0)), torch.tensor([0.0, 1.0, 0.5]), 0.1)
    assert gm.tempered(1e-39).log_weights.exp().tolist() == [0.0, 1.0, 0.0]
    assert gm.sample((0,)).shape == (0, 2)
    with pytest.raises(ValueError, match="at least one component"):
        GaussianMixture(torch.zeros(0, 2), torch.zeros(0), 0.1)


def test_dropout_keeps_all_of_a_sample_or_one_mask_for_all_its_factors() -> None:
    gone = torch.zeros(300, 2, 3)
    gone[:, 0, :2] = -math.inf  # the first factor has only its last component
    gm = GaussianMixture(randn(random(0), 300, 2, 3, 1), gone, 0.1)
    full = gm.dropped(0.5, generator=random(1)).log_weights[:, 1] > -math.inf  # what became of the other factor
    last_dropped = ~full[:, 2]
    assert not last_dropped.any()  # dropping it would empty the first factor: such samples keep everything
    assert full.all(-1).double().mean() > 0.5
    assert not full.all()


def test_autocast_leaves_the_maths_alone() -> None:
    prior = GaussianMixture(torch.randn(5, 2, generator=random(0)) * 3, torch.zeros(5), 0.1)
    x = torch.randn(64, 2, generator=random(1))
    expected = [prior.velocity(x, 0.3), prior.mean(), prior.log_prob(x)]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = x @ x.T
        found = [prior.velocity(x, 0.3), prior.mean(), prior.log_prob(x)]
    assert rounded.dtype == torch.bfloat16  # autocast was on
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
