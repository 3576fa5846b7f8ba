"""The toy networks: a residual MLP that looks once at a state, and answers with a policy or with a mean velocity.

Its last layer predicts denoised states x̂, which the heads take as velocities u = (x_src - x̂)/t_src, and a flow map
as F(x_t, t, s) = (x_t - x̂)/t, so that f = (s/t) x_t + (1 - s/t) x̂. The network need not learn to copy its input, and
every method gets the same help.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pitools.objectives.rivals import TwoTimes, jump
from pitools.path import align, as_time
from pitools.policies import GMHead, Head, Outputs, Segment
from pitools.types import Conditions, Factorisation, Policy, Schedule, Time

FREQUENCIES = 8
OCTAVES = 4


class ToyStudent(nn.Module):
    """A student for latents of one small shape.

    head: what the policy needs.  shape: of a latent, without the batch.  classes: of `class_labels`, or 0.
    scale: how far apart the denoised states of a mixture's components start, a data set's own width.
    """

    def __init__(
        self,
        head: Head,
        schedule: Schedule,
        factorisation: Factorisation,
        shape: tuple[int, ...],
        classes: int = 0,
        width: int = 256,
        depth: int = 2,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.head, self.schedule, self.factorisation = head, schedule, factorisation
        self.sizes = head.sizes
        _, self.factors, self.channels = factorisation.pack(torch.zeros(1, *shape)).shape
        self.classes = classes
        self.inlet = nn.Linear(math.prod(shape) * (1 + 2 * OCTAVES) + 2 * FREQUENCIES, width)
        self.label = nn.Embedding(classes, width) if classes else None
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outlet = nn.Linear(width, sum(self._widths))
        self._initialise(scale, generator)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Outputs that are denoised states, numbers for each factor, and numbers for each sample."""
        return (
            self.factors * self.channels * self.sizes.velocities,
            self.factors * self.sizes.factor,
            self.sizes.sample,
        )

    @torch.no_grad()
    def _initialise(self, scale: float, generator: torch.Generator | None) -> None:
        for layer in (self.inlet, *self.blocks, self.outlet):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(layer.bias)
        if self.label is not None:
            nn.init.normal_(self.label.weight, generator=generator)
        self.outlet.weight.mul_(0.1)
        if isinstance(self.head, GMHead):
            # Equal components would stay equal: they start apart, and narrow.
            states, _, samples = self._widths
            self.outlet.bias[:states] = scale * torch.randn(states, generator=generator)
            self.outlet.bias[-samples:] = math.log(0.1)

    def forward(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        """The policy at latents `x_src` `[B, *shape]`, t_src in (0, 1]: float, 0-d or `[B]`."""
        batch = len(x_src)
        time = as_time("t_src", t_src, x_src)
        times = time.expand(batch)
        hidden = self.inlet(torch.cat([_waves(x_src.flatten(1), times), _embed(times)], dim=1))
        if self.label is not None:
            if conditions is None or "class_labels" not in conditions:
                raise ValueError('this student is class-conditional: pass conditions={"class_labels": [B]}')
            hidden = hidden + self.label(conditions["class_labels"])
        hidden = nn.functional.silu(hidden)
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        states, factor, sample = self.outlet(hidden).split(self._widths, dim=1)

        packed = self.factorisation.pack(x_src)
        # Components innermost, the layout in which a mixture sums over channels.
        denoised = states.reshape(batch, self.factors, self.channels, self.sizes.velocities).mT
        velocities = (packed.unsqueeze(2) - denoised) / align(time, denoised)
        outputs = Outputs(velocities, factor.reshape(batch, self.factors, -1), sample)
        return self.head.read(outputs, packed, time, Segment(self.schedule.segment, self.schedule.shift))


class ToyFlowMap(nn.Module):
    """The mean velocity from one time down to another, for latents of one small shape; at s = t, the velocity itself.

    shape: of a latent, without the batch.  classes: of `class_labels`, or 0.  guided: whether it takes `guidance`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 0,
        guided: bool = False,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.classes = classes
        self.inlet = nn.Linear(math.prod(shape) * (1 + 2 * OCTAVES) + 4 * FREQUENCIES, width)
        self.label = nn.Embedding(classes, width) if classes else None
        self.guidance = nn.Linear(2 * FREQUENCIES, width) if guided else None
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outlet = nn.Linear(width, math.prod(shape))
        with torch.no_grad():
            for layer in (self.inlet, *self.blocks, self.outlet):
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                nn.init.zeros_(layer.bias)
            if self.label is not None:
                nn.init.normal_(self.label.weight, generator=generator)
            if self.guidance is not None:
                nn.init.zeros_(self.guidance.weight)
                nn.init.zeros_(self.guidance.bias)
            self.outlet.weight.mul_(0.1)

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, conditions: Conditions | None = None) -> Tensor:
        """F `[B, *shape]` at latents x_t `[B, *shape]`, 0 <= s <= t <= 1 and t > 0, both `[B]`.

        Raises `ValueError` for a condition that is missing.
        """
        given = conditions or {}
        flat = x_t.flatten(1)
        hidden = self.inlet(torch.cat([_waves(flat, torch.zeros_like(t)), _embed(t), _embed(s)], dim=1))
        for name, layer in (("class_labels", self.label), ("guidance", self.guidance)):
            if layer is None:
                continue
            if name not in given:
                raise ValueError(f'this network is conditioned on {name}: pass conditions={{"{name}": [B]}}')
            hidden = hidden + layer(_embed(given[name]) if name == "guidance" else given[name])
        hidden = nn.functional.silu(hidden)
        for block in self.blocks:
            hidden = hidden + nn.functional.silu(block(hidden))
        x_0: Tensor = self.outlet(hidden).reshape(x_t.shape)
        return (x_t - x_0) / align(t, x_t)


@dataclass(frozen=True, eq=False)
class FromNoise:
    """A flow map between any two times as one that starts from noise, F(z, δ)."""

    network: TwoTimes

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        """F from t = 1 to 1 - δ, δ `[B]`."""
        return self.network(noise, torch.ones_like(delta), 1 - delta, conditions)


@dataclass(frozen=True, eq=False)
class AtOnce:
    """A flow map between any two times as a velocity field, from each time to itself."""

    network: TwoTimes

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The velocity at latents x_t, t."""
        times = as_time("t", t, x_t).expand(len(x_t))
        return self.network(x_t, times, times, conditions)


@torch.no_grad()
def one_step(network: TwoTimes, noise: Tensor, conditions: Conditions | None = None) -> Tensor:
    """The end points f(z, 1, 0) `[B, ...]` from noise z `[B, ...]`."""
    one = noise.new_ones(len(noise))
    return jump(network, noise, one, torch.zeros_like(one), conditions)


def _waves(x: Tensor, t: Tensor) -> Tensor:
    """`[B, D]` with sines and cosines of 1, 2, 4 and 8 x, scaled by the signal's share 1 - t: `[B, (1 + 2 O) D]`.

    Among many modes, which one a state belongs to changes faster in x than a small MLP can follow; pure noise
    has no such detail to show.
    """
    angles = torch.cat([2**octave * x for octave in range(OCTAVES)], dim=1)
    return torch.cat([x, align(1 - t, x) * torch.cat([angles.sin(), angles.cos()], dim=1)], dim=1)


def _embed(t: Tensor) -> Tensor:
    """`[B]` to sines and cosines `[B, 2 F]` of frequencies from 1 to about 30."""
    angles = t.unsqueeze(1) * torch.logspace(0, 1.5, FREQUENCIES, dtype=t.dtype, device=t.device)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
