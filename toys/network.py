"""The toy student: a residual MLP that looks once at (x_src, t_src) and answers with a policy.

Its last layer predicts denoised states x̂, which the heads take as velocities u = (x_src - x̂)/t_src; so the
network need not learn to copy its input, and every policy gets the same help.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

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
