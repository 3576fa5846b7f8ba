"""Random mixtures, states and an error scale, for property tests. Everything is float64."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from pitools import GaussianMixture


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Case:
    """A prior over data and a batch of states on its path, seen from (x_src, t_src)."""

    prior: GaussianMixture
    x_src: Tensor  # [B, C]
    t_src: Tensor  # [B]
    x_t: Tensor  # [B, C]
    t: Tensor  # [B]


@st.composite
def cases(
    draw: st.DrawFn,
    variance: str = "any",
    t_min: float = 1e-3,
    t_src_min: float = 0.01,
    batch: int = 16,
    max_components: int = 12,
    max_channels: int = 5,
) -> Case:
    """Priors of every kind: variance shared, own, zero or any; means apart or together; scales 0.1 to 10."""
    seed = draw(st.integers(0, 2**31))
    components, channels = draw(st.integers(1, max_components)), draw(st.integers(1, max_channels))
    kind = draw(st.sampled_from(["shared", "own", "zero"])) if variance == "any" else variance
    scale = draw(st.sampled_from([0.1, 1.0, 10.0]))
    spread = draw(st.sampled_from([0.0, 0.3, 1.0]))
    g = random(seed)
    means = scale * (torch.randn(channels, generator=g).double() + spread * randn(g, components, channels))
    weights = 2 * randn(g, components)
    values = {
        "shared": scale**2 * 10 ** (-3 * rand(g, 1)),
        "own": scale**2 * 10 ** (-3 * rand(g, components)),
        "zero": torch.zeros(1, dtype=torch.float64),
    }[kind]
    prior = GaussianMixture(means, weights, values)
    t_src = 10 ** (torch.log10(torch.tensor(t_src_min)) * rand(g, batch))
    t = t_src * (t_min / t_src).clamp(max=1) ** rand(g, batch)
    t = torch.where(rand(g, batch) < 0.1, t_src, t)
    x_0, noise = prior.sample((batch,), generator=g), randn(g, batch, channels)
    x_src, x_t = on_path(x_0, noise, t_src), on_path(x_0, noise, t)
    return Case(prior, x_src, t_src, x_t, t)


def on_path(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    return (1 - t[:, None]) * x_0 + t[:, None] * noise


def randn(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def rand(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def velocity_scale(case: Case) -> Tensor:
    """(‖x‖ + max‖μ‖)/t, `[B, 1]`: what errors of a velocity are measured against."""
    largest = case.prior.means.norm(dim=-1).max()
    return ((case.x_t.norm(dim=-1) + largest) / case.t)[:, None]
