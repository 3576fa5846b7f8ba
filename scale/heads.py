"""The heads that turn a transformer's tokens into a policy's outputs. They start as its last projection:

    velocities  [B, L, V, C]  the projection, V times over (for a mixture: apart by noise in the bias)
    factor      [B, L, E]     zero: equal log-weights
    sample      [B, P]        SiLU, Linear, SiLU, Linear on the detached time embedding; starts at log 0.05

A token is a patch of p x q latent pixels of c channels, and a factor is one pixel or one whole patch. Backbones
differ in the order of a token's channels, which a `Layout` writes as einops axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pitools.draws import normal
from pitools.policies import HeadSizes, Outputs

LOG_STD = math.log(0.05)


@dataclass(frozen=True)
class Layout:
    """The channels of one token, slowest first: c of a latent pixel, p and q its place, v a velocity, e a number.

    base: of the transformer's own projection.  velocities, factor: of the heads.  by_patch: the patch is the factor,
    whose channels `velocities` then orders, too, and which has its numbers once.
    """

    base: str
    velocities: str
    factor: str
    by_patch: bool = False


class PolicyHeads(nn.Module):
    """Tokens and time embeddings to what a policy's head reads.

    base: the transformer's last projection, which stays as it is.  channels, patch: of a token.  spread: standard
    deviation of the noise that tells a mixture's components apart.  log_std_width: of that head's hidden layer.
    generator: on the CPU.  dtype: of the weights; None for the base's.
    """

    def __init__(
        self,
        base: nn.Linear,
        sizes: HeadSizes,
        layout: Layout,
        *,
        channels: int,
        patch: int,
        spread: float,
        log_std_width: int,
        generator: torch.Generator,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.layout, self.channels, self.patch = sizes, layout, channels, patch
        width, device = base.in_features, base.weight.device
        dtype = dtype or base.weight.dtype
        per_token = 1 if layout.by_patch else patch**2

        def linear(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
            # Unlike `nn.Linear` itself, this draws nothing from the global state.
            return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias, device=device, dtype=dtype))

        biased = base.bias is not None or sizes.start == "spread"
        self.velocities = linear(width, channels * patch**2 * sizes.velocities, biased)
        self.factors = linear(width, per_token * sizes.factor) if sizes.factor else None
        self.samples = None
        if sizes.sample:
            self.samples = nn.Sequential(
                nn.SiLU(), linear(width, log_std_width), nn.SiLU(), linear(log_std_width, sizes.sample)
            )
        self._initialise(base, spread, generator)

    def forward(self, tokens: Tensor, embedding: Tensor, rows: int) -> Outputs:
        """Outputs for tokens `[B, rows x columns, width]` and time embeddings `[B, width]`."""
        velocities = self.velocities(tokens)
        factor = tokens[..., :0] if self.factors is None else self.factors(tokens)
        axes = {"p": self.patch, "q": self.patch, "h": rows}
        if self.layout.by_patch:
            velocities = rearrange(velocities, "b n (v f) -> b n v f", v=self.sizes.velocities)
        else:
            velocities = rearrange(
                velocities, f"b (h w) ({self.layout.velocities}) -> b (h p w q) v c", c=self.channels, **axes
            )
            factor = rearrange(factor, f"b (h w) ({self.layout.factor}) -> b (h p w q) e", e=self.sizes.factor, **axes)
        sample = tokens[:, 0, :0] if self.samples is None else self.samples(embedding.detach())
        return Outputs(velocities, factor, sample)

    @torch.no_grad()
    def _initialise(self, base: nn.Linear, spread: float, generator: torch.Generator) -> None:
        order = f"({self.layout.velocities})"
        sizes = {"p": self.patch, "q": self.patch, "c": self.channels}
        count = self.sizes.velocities
        like = self.velocities.weight
        own = torch.zeros(base.out_features, device=like.device) if base.bias is None else base.bias
        weight: Tensor = repeat(base.weight.to(like.dtype), f"({self.layout.base}) i -> {order} i", v=count, **sizes)
        bias: Tensor = repeat(own.to(like.dtype), f"({self.layout.base}) -> {order}", v=count, **sizes)
        if self.sizes.start == "spread" and not self.layout.by_patch:
            noise = normal((count, self.channels), generator, like=bias)  # the pixels of a patch start alike
            bias = bias + spread * repeat(noise, f"v c -> {order}", **sizes)
        elif self.sizes.start == "spread":
            bias = bias + spread * normal(bias.shape, generator, like=bias)
        elif self.sizes.start == "first":
            first: Tensor = repeat(torch.eye(count)[0].to(bias), f"v -> {order}", **sizes)
            weight, bias = weight * first.unsqueeze(1), bias * first
        self.velocities.weight.copy_(weight)
        if self.velocities.bias is not None:
            self.velocities.bias.copy_(bias)
        if self.factors is not None:
            nn.init.zeros_(self.factors.weight)
            nn.init.zeros_(self.factors.bias)
        if self.samples is not None:
            inner, outer = cast(nn.Linear, self.samples[1]), cast(nn.Linear, self.samples[3])
            drawn = torch.empty(inner.weight.shape)  # where the generator lives
            inner.weight.copy_(nn.init.trunc_normal_(drawn, std=inner.in_features**-0.5, generator=generator))
            nn.init.zeros_(inner.bias)
            nn.init.zeros_(outer.weight)
            nn.init.constant_(outer.bias, LOG_STD)
