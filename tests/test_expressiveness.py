"""Theorem 1: mixtures through given velocities, judged by posterior means in extended precision."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import rand, randn, random
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, InfeasibleError, Realisation, integrate, mixture_through, trajectory
from pitools.expressiveness import _Atoms, _Request, _without_one


@dataclass(frozen=True)
class Path:
    """States and velocities `[N, C]` at times `[N]`, falling."""

    x: Tensor
    u: Tensor
    t: Tensor

    def realised(self) -> Realisation:
        return mixture_through(self.x, self.u, self.t)


def falling_times(g: torch.Generator, count: int) -> Tensor:
    """Times in [0.05, 1], 0.05 apart at least; a fifth of the sets begins at 1."""
    spare = 1 - 0.05 * count
    times = 0.05 * torch.arange(1, count + 1) + spare * rand(g, count).sort().values
    if float(rand(g, 1)) < 0.2:
        times[-1] = 1
    return times.flip(0)


def mixture_path(seed: int, count: int, channels: int) -> Path:
    """A trajectory of a mixture of up to 5 Gaussians, of deviations from 0.3 to 1.2."""
    g = random(seed)
    components = int(torch.randint(1, 6, (), generator=g))
    std = 0.3 + 0.9 * rand(g, components)
    teacher = GaussianMixture(1.5 * randn(g, components, channels), randn(g, components), std.square())
    t, states = falling_times(g, count), [randn(g, 1, channels)]
    for t_from, t_to in pairwise([1.0, *t.tolist()]):
        states.append(integrate(teacher, states[-1], t_from, t_to, method="heun", step_size=1 / 64))
    x = torch.cat(states[1:])
    return Path(x, teacher.velocity(x, t), t)


def gaussian_path(seed: int, count: int, channels: int) -> Path:
    """A trajectory for data N(b, LLᵀ): x_t = αb + S_t z with S_t² = α² LLᵀ + t² I, and its velocity dx_t/dt."""
    g = random(seed)
    factor = 0.3 * torch.eye(channels) + 0.5 * randn(g, channels, channels)
    values, axes = torch.linalg.eigh(factor @ factor.mT)
    centre, z, t = 2 * randn(g, channels), randn(g, channels) @ axes, falling_times(g, count)[:, None]
    root = ((1 - t).square() * values + t.square()).sqrt()
    x = (1 - t) * centre + (root * z) @ axes.mT
    u = -centre + ((t - (1 - t) * values) / root * z) @ axes.mT
    return Path(x, u, t.squeeze(1))


def worst_error(mixture: GaussianMixture, path: Path) -> float:
    """The largest ‖u - u_n‖/‖u_n‖ for a mixture of points, by sums over components in extended precision."""
    means, log_weights, x, u, t = (
        values.numpy().astype(np.longdouble)
        for values in (mixture.means, mixture.log_weights, path.x, path.u, path.t[:, None])
    )
    assert float(mixture.variance) == 0
    distance = ((x[:, None] - (1 - t)[:, None] * means) ** 2).sum(-1)
    logits = log_weights - distance / (2 * t**2)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    posterior_mean = weights @ means / weights.sum(1, keepdims=True)
    error = np.sqrt((((x - posterior_mean) / t - u) ** 2).sum(1) / (u**2).sum(1))
    return float(error.max())


paths = st.builds(
    lambda kind, seed, count, channels: kind(seed, count, channels),
    st.sampled_from([mixture_path, gaussian_path]),
    st.integers(0, 2**31),
    st.integers(1, 8),
    st.integers(1, 4),
)


@given(paths)
def test_a_smooth_teachers_velocities_are_reproduced_by_few_points(path: Path) -> None:
    found = path.realised()
    assert worst_error(found.mixture, path) < 1e-6
    own = (found.mixture.velocity(path.x, path.t) - path.u).norm(dim=1) / path.u.norm(dim=1).clamp(min=1e-3)
    assert found.residual == pytest.approx(float(own.max()), abs=1e-15)
    assert found.atoms <= path.x.numel() + 1
    assert found.reduced == (found.atoms <= path.x.numel())
    assert float(found.mixture.log_weights.exp().sum()) == pytest.approx(1)
    assert torch.isfinite(found.mixture.log_weights).all()


@pytest.mark.slow
def test_how_often_the_last_point_is_removed(record_property: Callable[[str, object], None]) -> None:
    rows = []
    for seed in range(300):
        g = random(seed)
        count, channels = int(torch.randint(1, 9, (), generator=g)), int(torch.randint(1, 5, (), generator=g))
        path = (mixture_path if seed % 3 else gaussian_path)(seed, count, channels)
        found = path.realised()
        rows.append((found.reduced, worst_error(found.mixture, path), found.atoms - path.x.numel()))
    reduced, error, excess = (np.array(column) for column in zip(*rows, strict=True))
    record_property("share_reduced", reduced.mean())
    record_property("worst_error", error.max())
    print(f"reduced {reduced.mean():.3f} of 300, worst error {error.max():.1e}, at most N·C + {excess.max()} points")
    assert error.max() < 1e-6
    assert reduced.mean() >= 0.99  # 1.000 when this was written


@given(st.integers(0, 2**31), st.floats(0.05, 1), st.integers(1, 4))
def test_one_velocity_needs_one_point(seed: int, t: float, channels: int) -> None:
    x, u = randn(random(seed), 2, 1, channels)
    found = mixture_through(x, u, torch.tensor([t], dtype=torch.float64))
    assert found.atoms == 1
    torch.testing.assert_close(found.mixture.means, x - t * u, rtol=0, atol=1e-12)


def test_the_order_of_times_and_their_dtype_do_not_matter() -> None:
    path = mixture_path(3, 5, 2)
    shuffled = torch.tensor([2, 4, 0, 1, 3])
    single = Path(*(values[shuffled].float() for values in (path.x, path.u, path.t)))
    found = single.realised()
    assert found.mixture.means.dtype == torch.float64
    assert worst_error(found.mixture, single) < 1e-6


@pytest.mark.parametrize(("scale", "shift"), [(0.1, 0.0), (10.0, 0.0), (1.0, 100.0)])
def test_data_of_other_sizes_and_far_from_the_origin(scale: float, shift: float) -> None:
    g = random(5)
    teacher = GaussianMixture(scale * randn(g, 3, 2) + shift, torch.zeros(3), scale**2 / 4)
    t = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.05], dtype=torch.float64)
    x = (1 - t)[:, None] * teacher.sample(generator=g) + t[:, None] * randn(g, 2)
    path = Path(x, teacher.velocity(x, t), t)
    found = path.realised()
    assert found.reduced
    assert worst_error(found.mixture, path) < 1e-6


@pytest.mark.parametrize("size", [2, 6])
def test_even_rough_velocities_are_within_reach(size: int) -> None:
    # No teacher is behind them: the theorem asks for none. Half of those of size 6 need a second scale of the kernels.
    for seed in range(5, 10):
        path = replace(mixture_path(seed, 6, 2), u=size * randn(random(seed), 6, 2))
        found = path.realised()
        assert found.reduced
        assert worst_error(found.mixture, path) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_narrow_gaussians_converge_as_the_square_of_their_width(seed: int) -> None:
    path = mixture_path(seed, 4, 2)
    found = path.realised()
    widths = 2.0 ** -torch.arange(8, 14)
    errors = [float((found.narrow(std).velocity(path.x, path.t) - path.u).norm(dim=1).max()) for std in widths.tolist()]
    slope = np.polyfit(widths.log().numpy(), np.log(errors), 1)[0]
    assert slope == pytest.approx(2, abs=0.1)
    assert errors[-1] < 1e-4
    assert torch.equal(found.narrow(0.0).velocity(path.x, path.t), found.mixture.velocity(path.x, path.t))
    for std in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="std must be finite and not negative"):
            found.narrow(std)


def test_a_policy_takes_the_teachers_euler_steps() -> None:
    g = random(11)
    teacher = GaussianMixture(1.5 * randn(g, 4, 3), torch.zeros(4), 0.2)
    path = trajectory(teacher, randn(g, 1, 3), 1.0, 0.0, step_size=1 / 8)  # 8 steps, the last from t = 1/8 to 0
    x, t = path.states[:-1, 0], path.times[:-1]
    found = mixture_through(x, teacher.velocity(x, t), t)
    # From t = 0.75 on, say, where the policy's mixture is the posterior.
    x_src = x[2].reshape(1, 1, 3)
    policy = GMPolicy(found.mixture.condition(x_src, 0.75), x_src, 0.75)
    walked = trajectory(policy, x_src, 0.75, 0.0, step_size=1 / 8)
    torch.testing.assert_close(walked.states[:, 0], path.states[2:], rtol=0, atol=1e-9)


def test_a_point_too_many_is_left_out_and_the_equations_hold() -> None:
    path = mixture_path(2, 3, 2)
    request = _Request.of(path.x, path.u, path.t)
    # Solutions add up: with one that is found in turned coordinates they make one of twice the points.
    turn = torch.linalg.qr(randn(random(0), 2, 2)).Q
    one, other = path.realised().mixture, replace(path, x=path.x @ turn, u=path.u @ turn).realised().mixture
    atoms = _Atoms(torch.cat([one.means, other.means @ turn.mT]), torch.cat([one.log_weights, other.log_weights]))
    assert len(atoms.points) > 9
    while len(atoms.points) > 7:
        fewer = _without_one(request, atoms)
        assert len(fewer.points) == len(atoms.points) - 1
        assert worst_error(GaussianMixture(fewer.points, fewer.log_weights, 0.0), path) < 1e-9
        atoms = fewer


def test_what_is_out_of_reach_is_refused_with_the_time_and_the_error() -> None:
    path = Path(torch.zeros(3, 1), torch.tensor([[100.0], [-100.0], [100.0]]), torch.tensor([0.9, 0.55, 0.2]))
    with pytest.raises(InfeasibleError, match=r"misses that at t = 0\.\d+ \(row \d\) by .* of its size") as error:
        path.realised()
    assert isinstance(error.value, ValueError)
    assert f"at t = {float(path.t[error.value.index]):g} (row {error.value.index}) by" in str(error.value)
    assert error.value.error > 1e-6


def test_a_tolerance_below_rounding_is_refused() -> None:
    with pytest.raises(InfeasibleError):
        mixture_through(*vars(mixture_path(0, 4, 2)).values(), tolerance=0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.tensor([0.5, 0.3, 0.5])}, r"pairwise distinct, got t = 0.5 in rows 0 and 2"),
        ({"t": torch.tensor([0.5, 0.3, 0.0])}, r"t must lie in \(0, 1\]"),
        ({"t": torch.tensor([0.5, 0.3, 1.1])}, r"t must lie in \(0, 1\]"),
        ({"t": torch.tensor([0.5, 0.3, float("nan")])}, r"t must lie in \(0, 1\]"),
        ({"t": torch.tensor([0.5, 0.3])}, r"got \(3, 2\), \(3, 2\) and \(2,\)"),
        ({"u": torch.zeros(3, 1)}, r"x_t and velocity must be \[N, C\]"),
        ({"x": torch.zeros(2, 3, 2)}, r"x_t and velocity must be \[N, C\]"),
        ({"x": torch.tensor([[0.0, 0.0], [0.0, float("nan")], [0.0, 0.0]])}, r"x_t must be finite.* in row 1"),
        ({"u": torch.tensor([[0.0, 0.0], [0.0, 0.0], [float("inf"), 0.0]])}, r"velocity must be finite.* in row 2"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, Tensor], message: str) -> None:
    path = Path(torch.zeros(3, 2), torch.ones(3, 2), torch.tensor([0.9, 0.5, 0.1]))
    with pytest.raises(ValueError, match=message):
        replace(path, **change).realised()
