"""What is timed: roll-outs, single velocities, gradients and sampling, fused and not, at the shapes that matter.

    floating-point operations of a row = B L K (2·2 C + 20),    bytes of a roll-out = 4 B L (K C + K + 1 + 3 C)

two products of the means for each of the R rows and about twenty operations for an exponential; every number of the
mixture, x_src, x and the end point once. It is what the result needs, however a side gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from pitools import kernels
from pitools.bench.elementwise import Elementwise, image, packed
from pitools.bench.timing import SHORTEST, interleaved
from pitools.kernels import eager, gm
from pitools.kernels.programme import rows_of
from pitools.mixture import GaussianMixture
from pitools.path import segments, substep_grid
from pitools.policies import GMPolicy
from pitools.rollout import integrate, mean_velocity, velocity
from pitools.sampling import sample
from pitools.solvers import SOLVERS, RungeKutta
from pitools.types import PIXELWISE, Conditions, Factorisation, Schedule, Time

NFE, SEGMENT_SUBSTEPS, WINDOW = 4, 32, 4

Sides: TypeAlias = dict[str, Callable[[], Tensor]]
"""What is timed in turns, by name; all answer the same."""


@dataclass(frozen=True)
class Shape:
    """A batch of latents, one factor for each pixel, and the Euler substeps of a roll-out from t = 1 to t = 0."""

    name: str
    batch: int
    height: int
    width: int
    components: int
    channels: int
    substeps: int

    @property
    def sizes(self) -> dict[str, int]:
        return {"B": self.batch, "L": self.height * self.width, "K": self.components, "C": self.channels}

    def policy(self, device: torch.device) -> GMPolicy:
        """A random one at t_src = 1, in float32."""
        batch, factors, components, channels = self.sizes.values()
        g = torch.Generator().manual_seed(0)
        means = 0.5 * torch.randn(batch, factors, components, channels, generator=g)
        log_weights = torch.randn(batch, factors, components, generator=g)
        x_src = torch.randn(batch, factors, channels, generator=g)
        variance = torch.full((batch, 1, 1), 0.01)
        mixture = GaussianMixture(means.to(device), log_weights.to(device), variance.to(device))
        return GMPolicy(mixture, x_src.to(device), 1.0)

    def flops(self, rows: int) -> float:
        batch, factors, components, channels = self.sizes.values()
        return float(rows * batch * factors * components * (4 * channels + 20))

    @property
    def bytes(self) -> float:
        batch, factors, components, channels = self.sizes.values()
        return 4.0 * batch * factors * (components * channels + components + 1 + 3 * channels)


SHAPES = (
    Shape("DiT-XL/2", 4, 32, 32, 32, 4, 128),
    Shape("FLUX, Qwen 512²", 1, 64, 64, 8, 16, 128),
    Shape("FLUX, Qwen 1024²", 1, 128, 128, 8, 16, 32),
    Shape("2-D toys", 4096, 1, 1, 32, 2, 128),
)
TINY = (Shape("tiny", 2, 3, 2, 4, 3, 8), Shape("tiny points", 5, 1, 1, 3, 2, 8))


@dataclass(frozen=True)
class Settings:
    """rounds: turns of each side.  shortest: seconds of a turn.  batch: of a training step, None the recipe's.
    steps: of training, in a turn.
    """

    device: torch.device
    shapes: Sequence[Shape] = SHAPES
    rounds: int = 7
    shortest: float = SHORTEST
    batch: int | None = None
    steps: int = 6


@dataclass(frozen=True)
class Row:
    """milliseconds: of each side, a median.  ratios: "a/b" is a's time over b's.  by: what "fused" was, or why not.

    gflops, gbytes: a second, of the fused side.  difference: ‖fused - plain‖ / ‖plain‖.  policy_milliseconds and
    policy_share: in a training step.
    """

    part: str
    name: str
    sizes: Mapping[str, int]
    substeps: int
    by: str
    milliseconds: Mapping[str, float]
    ratios: Mapping[str, float]
    gflops: float | None = None
    gbytes: float | None = None
    difference: float | None = None
    policy_milliseconds: Mapping[str, float] = field(default_factory=dict)
    policy_share: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row, still to be measured."""

    label: str
    measure: Callable[[], Row]


def rollouts(settings: Settings) -> list[Case]:
    """From t = 1 to t = 0."""
    return [Case(shape.name, partial(_rollout, settings, shape)) for shape in settings.shapes]


def velocities(settings: Settings) -> list[Case]:
    """One velocity at t = 0.5."""
    return [Case(shape.name, partial(_velocity, settings, shape)) for shape in settings.shapes]


def backward(settings: Settings) -> list[Case]:
    """A velocity, and a mean velocity over a window, with the gradients of the mixture."""
    return [
        Case(f"{shape.name}, {what}", partial(_backward, settings, shape, what))
        for shape in settings.shapes
        for what in ("velocity", "window")
    ]


def sampling(settings: Settings) -> list[Case]:
    """`pitools.sample` without a network: the roll-outs of all segments."""
    return [Case(shape.name, partial(_sampling, settings, shape)) for shape in settings.shapes]


def _rollout(settings: Settings, shape: Shape) -> Row:
    policy = shape.policy(settings.device)
    x, written, steps = policy.x_src, Elementwise.of(policy, shape.height, shape.width), shape.substeps
    latent = image(x, shape.height, shape.width)

    def library() -> Tensor:
        return integrate(policy, x, 1.0, 0.0, "euler", step_size=1 / steps)

    sides: Sides = {
        "elementwise": lambda: packed(written.rollout(latent, 1.0, 0.0, steps)),
        "plain": partial(plainly, library),
        "fused": library,
    }
    if settings.device.type == "cpu":
        sides["no compiler"] = partial(_without_compiler, policy, x, steps)
    return _row("rollouts", shape, shape.name, settings, policy, sides, steps, steps)


def _velocity(settings: Settings, shape: Shape) -> Row:
    policy = shape.policy(settings.device)
    x, written = policy.x_src, Elementwise.of(policy, shape.height, shape.width)
    latent = image(x, shape.height, shape.width)

    def library() -> Tensor:
        return velocity(policy, x, 0.5)

    sides: Sides = {
        "elementwise": lambda: packed(written.velocity(latent, 0.5)),
        "plain": partial(plainly, library),
        "fused": library,
    }
    return _row("velocity", shape, shape.name, settings, policy, sides, 1, 1)


def _backward(settings: Settings, shape: Shape, what: str) -> Row:
    policy = shape.policy(settings.device)
    q, x = policy.mixture, policy.x_src
    leaves = [value.detach().clone().requires_grad_() for value in (q.means, q.log_weights, q.variance)]

    def library() -> Tensor:
        own = GMPolicy(GaussianMixture(*leaves), x, 1.0)
        if what == "velocity":
            u = velocity(own, x, 0.5)
        else:
            u = mean_velocity(own, x, 0.5, 0.5 - WINDOW / 128, "euler", step_size=1 / 128)
        return torch.cat([value.flatten() for value in torch.autograd.grad(u.square().mean(), leaves)])

    sides: Sides = {"plain": partial(plainly, library), "fused": library}
    return _row("backward", shape, f"{shape.name}, {what}", settings, policy, sides, WINDOW if what == "window" else 1)


@dataclass(frozen=True)
class _Ready:
    """A student without a network: the same mixture wherever it is asked."""

    mixture: GaussianMixture
    schedule: Schedule
    factorisation: Factorisation = PIXELWISE

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> GMPolicy:
        return GMPolicy(self.mixture, self.factorisation.pack(x_src), t_src)


def _sampling(settings: Settings, shape: Shape) -> Row:
    policy = shape.policy(settings.device)
    student, bounds = _Ready(policy.mixture, Schedule(nfe=NFE)), segments(NFE)
    latent = image(policy.x_src, shape.height, shape.width)
    noise = latent.squeeze(1)
    mixture = Elementwise.of(policy, shape.height, shape.width)

    def library() -> Tensor:
        return PIXELWISE.pack(sample(student, noise, method="euler", step_size=1 / (NFE * SEGMENT_SUBSTEPS)))

    def written() -> Tensor:
        x = latent
        for t_src, t_dst in pairwise(bounds):
            own = Elementwise(mixture.means, mixture.log_weights, mixture.variance, x, t_src)
            x = own.rollout(x, t_src, t_dst, SEGMENT_SUBSTEPS)
        return packed(x)

    sides: Sides = {"elementwise": written, "plain": partial(plainly, library), "fused": library}
    substeps = NFE * SEGMENT_SUBSTEPS
    return _row("sampling", shape, shape.name, settings, policy, sides, substeps, substeps, NFE)


def plainly(call: Callable[[], Tensor]) -> Tensor:
    """What `call` answers on the library's plain path."""
    with kernels.plain():
        return call()


def _without_compiler(policy: GMPolicy, x: Tensor, substeps: int) -> Tensor:
    """`integrate` from 1 to 0 as it is where there is no compiler."""
    euler = SOLVERS["euler"]
    assert isinstance(euler, RungeKutta)
    grid = substep_grid(x.new_ones(()), x.new_zeros(1), 1 / substeps)
    return gm.factors_of(policy, eager.Rollout.apply, x).run(x, rows_of(euler, grid.times, grid.stops))[0]


def _row(
    part: str,
    shape: Shape,
    name: str,
    settings: Settings,
    policy: GMPolicy,
    sides: Sides,
    substeps: int,
    rows: int | None = None,
    calls: int = 1,
) -> Row:
    """The sides' times. rows: evaluations to count operations of, in `calls` roll-outs; None counts none."""
    kernel = kernels.choose(policy, policy.x_src, policy.x_src.new_ones(1))
    fused, plain = sides["fused"](), sides["plain"]()
    taken = interleaved(sides, settings.device, settings.rounds, settings.shortest)
    return Row(
        part,
        name,
        shape.sizes,
        substeps,
        kernel if isinstance(kernel, str) else kernel.name,
        taken,
        ratios(taken),
        None if rows is None else shape.flops(rows) / taken["fused"] / 1e6,
        None if rows is None else calls * shape.bytes / taken["fused"] / 1e6,
        float((fused - plain).norm() / plain.norm()),
    )


def ratios(milliseconds: Mapping[str, float]) -> dict[str, float]:
    """Of the slower sides to the faster ones, as far as they were measured."""
    pairs = (("elementwise", "fused"), ("plain", "fused"), ("elementwise", "no compiler"))
    return {f"{a}/{b}": milliseconds[a] / milliseconds[b] for a, b in pairs if a in milliseconds and b in milliseconds}
