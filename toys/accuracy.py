"""Error against evaluations: what each method makes of a policy's ODE, on mixtures like a trained student's.

The error is the root mean square over factors and channels of the end point's, against RK4 with 2,048 steps, all in
float64. An evaluation is one posterior mean of one factor; adaptive steps differ by factor, and count in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pitools import GaussianMixture, GMPolicy, integrate
from pitools.path import diffuse
from pitools.rollout import velocity
from pitools.solvers import SOLVERS, Exponential, PerFactor, RungeKutta, solve_per_factor

STEPS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
AUTO = (4, 6, 8, 12, 16, 24, 32)
MOST = 512


@dataclass(frozen=True)
class Segment:
    """An interval of time."""

    title: str
    t_src: float
    t_dst: float


SEGMENTS = (Segment("from noise to data", 1.0, 0.0), Segment("last of four segments, shift 3.2", 0.348, 0.0))


@dataclass(frozen=True)
class Point:
    """One method on one segment."""

    segment: str
    method: str
    evaluations: float
    error: float


@dataclass
class Counted:
    """A field that counts how often it is asked."""

    policy: GMPolicy
    asked: int = 0

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The policy's."""
        self.asked += 1
        return velocity(self.policy, x_t, t)


def student(t_src: float, factors: int, spread: float, std: float, seed: int) -> GMPolicy:
    """Mixtures of 8 in 16 channels, means `spread` apart and components `std` wide, from states on their paths."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mixture = GaussianMixture(spread * normal(1, factors, 8, 16), normal(1, factors, 8), std**2)
    x_0 = mixture.sample(generator=g)
    return GMPolicy(mixture, diffuse(x_0, normal(1, factors, 16), t_src), t_src)


def curves(factors: int, spread: float = 0.5, std: float = 0.1, seed: int = 0) -> list[Point]:
    """Every method shipped, with grids of 2 to 512 steps, or tolerances from 0.1 to 1e-5."""
    points = []
    for segment in SEGMENTS:
        policy = student(segment.t_src, factors, spread, std, seed)
        x, span = policy.x_src, segment.t_src - segment.t_dst
        exact = integrate(policy, x, segment.t_src, segment.t_dst, "rk4", span / 2048)

        def add(name: str, evaluations: float, end: Tensor, title: str = segment.title, exact: Tensor = exact) -> None:
            points.append(Point(title, name, evaluations, float((end - exact).square().mean().sqrt())))

        for name, method in SOLVERS.items():
            if isinstance(method, Exponential):
                for most in AUTO:
                    field = Counted(policy)
                    planned = Exponential(evaluations=most, step=1e-9)
                    end = integrate(field, x, segment.t_src, segment.t_dst, planned)
                    add(name, field.asked, end)
            elif isinstance(method, PerFactor):
                for tol in TOLERANCES:
                    found = _per_factor(policy, segment, PerFactor(tol=tol))
                    add(name, float(found[1].double().mean()), found[0].reshape(x.shape))
            elif name != "dopri5":  # which knows no evaluations per factor, and has no grid
                stages = len(method.b) if isinstance(method, RungeKutta) else 1
                for steps in STEPS:
                    if steps * stages <= MOST:
                        field = Counted(policy)
                        end = integrate(field, x, segment.t_src, segment.t_dst, method, span / steps)
                        add(name, field.asked, end)
    return points


def _per_factor(policy: GMPolicy, segment: Segment, method: PerFactor) -> tuple[Tensor, Tensor]:
    each = policy.factors()

    def field(x: Tensor, t: Tensor, index: Tensor) -> Tensor:
        return velocity(each[index], x.unsqueeze(1), t).squeeze(1)

    std = each.mixture.variance.sqrt().mean()
    t_src, t_dst = torch.tensor([segment.t_src, segment.t_dst], dtype=torch.float64)
    found = solve_per_factor(field, each.x_src.squeeze(1), t_src, t_dst, method, std)
    return found.x_end, found.evaluations


def fewest(points: list[Point], segment: str, method: str, error: float) -> float | None:
    """The fewest evaluations with which a method comes to at most that error, among those tried."""
    passing = [p.evaluations for p in points if (p.segment, p.method) == (segment, method) and p.error <= error]
    return min(passing, default=None)


def plot(points: list[Point], path: Path) -> None:
    """One panel for each segment, logarithmic both ways."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(SEGMENTS), figsize=(10, 4), sharey=True, layout="constrained")
    for axis, segment in zip(axes, SEGMENTS, strict=True):
        for method in dict.fromkeys(p.method for p in points):
            own = [p for p in points if (p.segment, p.method) == (segment.title, method)]
            own = sorted(own, key=lambda p: p.evaluations)
            bold = method in ("auto", "adaptive")
            axis.loglog(
                [p.evaluations for p in own],
                [p.error for p in own],
                marker="o",
                markersize=4 if bold else 2.5,
                linewidth=2 if bold else 1,
                label=method,
            )
        axis.set_title(segment.title, fontsize=10)
        axis.set_xlabel("evaluations of the policy, per factor")
        axis.grid(which="major", alpha=0.3)
    axes[0].set_ylabel("RMS error of the end point")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
