"""Targets with exact teachers: a mixture over data is its own flow model (GaussianMixture at t_src = 1).

Points in the plane are latents `[B, 2]`; handwritten digits are latents `[B, 1, 8, 8]` in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from pitools.mixture import GaussianMixture
from pitools.path import as_time
from pitools.rollout import velocity as velocity_at
from pitools.types import POINTS, Conditions, Factorisation, Time


@dataclass(frozen=True)
class Modes:
    """Well-separated modes: `means` `[K, D]` and their common standard deviation."""

    means: Tensor
    std: float


@dataclass(frozen=True)
class Target:
    """A data distribution and its exact velocity.

    priors: one mixture over flattened latents, or one for each class.  shape: of a latent.
    factorisation: how a student's policy sees a latent.  shift: m of a student's schedule.
    modes: where they are well separated.
    """

    name: str
    priors: tuple[GaussianMixture, ...]
    shape: tuple[int, ...]
    factorisation: Factorisation
    shift: float = 1.0
    modes: Modes | None = None

    @property
    def classes(self) -> int:
        """The number of classes; 0 where there is nothing to condition on."""
        return len(self.priors) if len(self.priors) > 1 else 0

    @property
    def device(self) -> torch.device:
        return self.priors[0].means.device

    def to(self, device: torch.device) -> Target:
        """The same target on a device."""
        priors = tuple(
            GaussianMixture(q.means.to(device), q.log_weights.to(device), q.variance.to(device)) for q in self.priors
        )
        modes = Modes(self.modes.means.to(device), self.modes.std) if self.modes else None
        return replace(self, priors=priors, modes=modes)

    @cached_property
    def scale(self) -> float:
        """Root mean square over the elements of a data point, about the mean of the data."""
        means = torch.cat([q.means for q in self.priors])
        within = torch.stack([q.variance.mean() for q in self.priors]).mean()
        return float((means.var(0, correction=0).mean() + within).sqrt())

    def labels(self, count: int, device: torch.device) -> Conditions | None:
        """`count` classes in turn, as conditions; None where the target has no classes."""
        return {"class_labels": torch.arange(count, device=device) % self.classes} if self.classes else None

    def draw_labels(self, count: int, generator: torch.Generator) -> dict[str, Tensor] | None:
        """`count` classes at random, as conditions; None where the target has no classes."""
        if not self.classes:
            return None
        device = generator.device
        return {"class_labels": torch.randint(self.classes, (count,), generator=generator, device=device)}

    def sample(self, count: int, generator: torch.Generator, conditions: Conditions | None = None) -> Tensor:
        """`count` data points as latents, of the classes in `conditions` if there are any."""
        prior = self.priors[0]
        draws = torch.empty(count, prior.channels, dtype=prior.means.dtype, device=prior.means.device)
        for prior, rows in self._groups(count, conditions):
            draws[rows] = prior.sample((len(draws[rows]),), generator=generator)
        return draws.reshape(count, *self.shape)

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The exact marginal velocity at latents x_t `[B, ...]`, t (Eq. 1); float32 or better."""
        flat = x_t.flatten(1).to(torch.promote_types(x_t.dtype, self.priors[0].means.dtype))
        time = as_time("t", t, flat).expand(len(flat))
        velocity = torch.empty_like(flat)
        for prior, rows in self._groups(len(flat), conditions):
            velocity[rows] = velocity_at(prior, flat[rows], time[rows])
        return velocity.reshape(x_t.shape)

    def _groups(self, count: int, conditions: Conditions | None) -> list[tuple[GaussianMixture, Tensor | slice]]:
        """Each prior that is asked for, with the rows that it serves."""
        if not self.classes:
            return [(self.priors[0], slice(None))]
        if conditions is None or "class_labels" not in conditions:
            raise ValueError(f'the target {self.name} is class-conditional: pass conditions={{"class_labels": [B]}}')
        labels = conditions["class_labels"]
        if labels.shape != (count,) or not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(
                f"class_labels must be {count} integers in 0..{self.classes - 1}, got {tuple(labels.shape)}"
            )
        groups = [(prior, (labels == label).nonzero().squeeze(1)) for label, prior in enumerate(self.priors)]
        return [(prior, rows) for prior, rows in groups if len(rows)]


def ring8() -> Target:
    """Eight equal modes on a circle of radius 2, standard deviation 0.1."""
    angle = torch.arange(8) * (2 * math.pi / 8)
    return _separated("ring8", 2 * torch.stack([angle.cos(), angle.sin()], dim=-1), std=0.1)


def grid25() -> Target:
    """5 x 5 equal modes at spacing 1, standard deviation 0.08."""
    axis = torch.arange(-2.0, 3.0)
    return _separated("grid25", torch.cartesian_prod(axis, axis), std=0.08)


def spiral() -> Target:
    """A spiral of two turns, thicker outwards: 100 components, a variance for each."""
    turn = torch.linspace(0.1, 1, 100)
    angle, radius = 4 * math.pi * turn, 2.5 * turn
    means = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return _plane("spiral", GaussianMixture(means, radius.log(), (0.03 + 0.07 * turn).square()))


def moons() -> Target:
    """Two interleaved half-circles of 40 components each."""
    angle = torch.linspace(0, math.pi, 40)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=-1)
    return _plane("moons", GaussianMixture(torch.cat([upper, -upper]) * 1.5, torch.zeros(80), 0.12**2))


def checkerboard() -> Target:
    """The eight dark squares of a 4 x 4 board of side 4: 8 x 8 points in each, as a weighted point set."""
    axis = (torch.arange(32) + 0.5) / 8 - 2
    points = torch.cartesian_prod(axis, axis)
    dark = points.floor().sum(-1) % 2 == 0
    return _plane("checkerboard", GaussianMixture(points[dark], torch.zeros(int(dark.sum())), 0.0))


def digits() -> Target:
    """scikit-learn's 1,797 handwritten 8 x 8 digits: zero-variance components, one mixture for each class."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.data, dtype=torch.float32) / 8 - 1
    labels = torch.as_tensor(data.target)
    priors = tuple(GaussianMixture(x, torch.zeros(len(x)), 0.0) for x in (images[labels == c] for c in range(10)))
    # The whole image is one factor, and the schedule is shifted: of the settings tried, these kept most of the
    # teacher's variety within a class. With 2 x 2 patches, unshifted, students gave about one image a class.
    return Target("digits", priors, (1, 8, 8), Factorisation("b c h w -> b 1 (c h w)"), shift=4.0)


TARGETS: Mapping[str, Callable[[], Target]] = MappingProxyType(
    {target.__name__: target for target in (ring8, grid25, spiral, moons, checkerboard, digits)}
)


def load_target(name: str) -> Target:
    """The target of that name. `ValueError` names the known ones."""
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}; the targets are {', '.join(TARGETS)}")
    return TARGETS[name]()


def _separated(name: str, means: Tensor, std: float) -> Target:
    return _plane(name, GaussianMixture(means, torch.zeros(len(means)), std**2), Modes(means, std))


def _plane(name: str, prior: GaussianMixture, modes: Modes | None = None) -> Target:
    return Target(name, (prior,), (2,), POINTS, modes=modes)
