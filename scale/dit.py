"""The diffusers DiT (Peebles and Xie 2023) as a flow-matching teacher, and as the network of a policy student.

Both wrap `DiTTransformer2DModel` and leave its forward pass alone. A student reads the tokens that enter the last
projection with heads of its own, which start as that projection:

    velocities  [B, L, V, C]  the projection, V times over (for a mixture: apart by noise in the bias)
    factor      [B, L, E]     zero: equal log-weights
    sample      [B, P]        SiLU, Linear, SiLU, Linear on the detached time embedding; starts at log 0.05

A token is a patch of p x p latent pixels, and a factor is one pixel or one whole patch. Within a token, a head's
channels come pixel slowest, then component, then channel, as in the published ImageNet weights; where the patch is
the factor, they come component slowest, then the channels of `patchwise`.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pitools.draws import normal
from pitools.policies import Head, HeadSizes, Outputs
from pitools.types import PIXELWISE, Conditions, Factorisation, patchwise

Factor = Literal["pixel", "patch"]
LOG_STD = math.log(0.05)
TIMESTEPS = 1000
"""The scale on which the transformer's time embedding was made: it sees 1000 t."""


@dataclass(frozen=True)
class DiTHead:
    """Recipe section `[backbone.head]`: what a student adds to the transformer.

    factor: what one mixture of a policy covers, a latent "pixel" or a whole "patch".  spread: standard deviation of
    the noise that tells the components of a mixture apart at the start.  log_std_width: of that head's hidden layer.
    """

    factor: Factor = "pixel"
    spread: float = 0.05
    log_std_width: int = 1024

    def __post_init__(self) -> None:
        if self.factor not in get_args(Factor):
            raise ValueError(f'factor must be "pixel" or "patch", got {self.factor!r}')
        if self.log_std_width < 1:
            raise ValueError(f"log_std_width must be at least 1, got {self.log_std_width}")
        if not self.spread >= 0:
            raise ValueError(f"spread must not be negative, got {self.spread}")


@dataclass(frozen=True)
class DiT:
    """Recipe section `[backbone]` with `name = "dit"`: a DiT with random weights, to be trained from scratch.

    channels, size: of the square latents `[B, channels, size, size]`.  patch: p.  layers, heads, head_width: of the
    transformer, whose width is heads x head_width.  classes: of `class_labels`; one more label, `classes`, means
    "no class".  head: of students.
    """

    channels: int = 4
    size: int = 32
    patch: int = 2
    layers: int = 28
    heads: int = 16
    head_width: int = 72
    classes: int = 1000
    head: DiTHead = field(default_factory=DiTHead)

    def __post_init__(self) -> None:
        for name in ("channels", "size", "patch", "layers", "heads", "head_width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        if self.heads * self.head_width % 4:
            raise ValueError(
                f"heads {self.heads} x head_width {self.head_width} must be a multiple of 4: sines and cosines of two "
                "coordinates fill the width"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one latent."""
        return self.channels, self.size, self.size

    @property
    def factorisation(self) -> Factorisation:
        """How a policy sees a latent."""
        return PIXELWISE if self.head.factor == "pixel" else patchwise(self.patch)

    def teacher(self, generator: torch.Generator) -> DiTVelocity:
        """A DiT that answers with a velocity, its weights drawn from `generator`, which lives on the CPU."""
        try:
            from diffusers import DiTTransformer2DModel
        except ImportError as error:
            raise ImportError(
                f'the backbone "dit" needs diffusers ({error}): run `pip install "pitools[scale]"`'
            ) from error

        model: Any = DiTTransformer2DModel
        with torch.random.fork_rng(devices=[]):  # modules draw from the global state as they are made
            torch.set_rng_state(generator.get_state())
            transformer = model(
                num_attention_heads=self.heads,
                attention_head_dim=self.head_width,
                in_channels=self.channels,
                out_channels=self.channels,
                num_layers=self.layers,
                sample_size=self.size,
                patch_size=self.patch,
                num_embeds_ada_norm=self.classes,
                attention_bias=True,
                norm_num_groups=1,
            )
            _initialise_teacher(transformer)
            generator.set_state(torch.get_rng_state())
        return DiTVelocity(transformer)

    def student(self, teacher: nn.Module, head: Head, generator: torch.Generator) -> DiTPolicy:
        """A network for `head` that starts as a copy of the teacher. `ValueError` for another kind of teacher."""
        if not isinstance(teacher, DiTVelocity):
            raise ValueError(f"a DiT student starts from a DiT teacher, not from a {type(teacher).__name__}")
        return DiTPolicy(
            copy.deepcopy(teacher.transformer).requires_grad_(True), head.sizes, self.head, generator=generator
        )


class _Wrapped(nn.Module):
    """A DiT without randomness of its own: labels are dropped by whoever trains it, for each sample once."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        for module in transformer.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        self.transformer: Any = transformer

    def _call(self, x: Tensor, t: Tensor, conditions: Conditions | None) -> Tensor:
        if conditions is None or "class_labels" not in conditions:
            raise ValueError('a DiT is class-conditional: pass conditions={"class_labels": [B]}')
        patch = self.transformer.config.patch_size
        if x.shape[-1] != x.shape[-2] or x.shape[-1] % patch:
            raise ValueError(f"a DiT takes square latents of whole {patch} x {patch} patches, got {tuple(x.shape)}")
        labels = conditions["class_labels"]
        return cast(Tensor, self.transformer(x, timestep=t * TIMESTEPS, class_labels=labels, return_dict=False)[0])

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        self.transformer.enable_gradient_checkpointing()

    def shards(self) -> list[nn.Module]:
        """What to shard apart, inner modules first. The first block's embedding is called outside of it, too."""
        blocks = self.transformer.transformer_blocks
        return [blocks[0].norm1.emb, *blocks]


class DiTVelocity(_Wrapped):
    """Latents to a velocity: a teacher's network."""

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The velocity `[B, C, H, W]` at latents of that shape, t `[B]`, `class_labels` `[B]`."""
        return self._call(x_t, t, conditions)


class DiTPolicy(_Wrapped):
    """Latents to the outputs that a policy's head reads.

    transformer: trained in place, but for its last projection.  generator: on the CPU.
    """

    def __init__(self, transformer: Any, sizes: HeadSizes, head: DiTHead, generator: torch.Generator) -> None:
        super().__init__(transformer)
        self.sizes, self.factor = sizes, head.factor
        base: nn.Linear = transformer.proj_out_2
        base.requires_grad_(False)  # its output goes nowhere
        self.patch, self.channels = transformer.config.patch_size, transformer.config.in_channels
        pixels = self.patch**2 if head.factor == "pixel" else 1
        width, like = base.in_features, base.weight

        def linear(inputs: int, outputs: int) -> nn.Linear:
            # Unlike `nn.Linear` itself, this draws nothing from the global state.
            return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, device=like.device, dtype=like.dtype))

        self.velocities = linear(width, base.out_features * sizes.velocities)
        self.factors = linear(width, pixels * sizes.factor) if sizes.factor else None
        self.samples = None
        if sizes.sample:
            inner, outer = linear(width, head.log_std_width), linear(head.log_std_width, sizes.sample)
            self.samples = nn.Sequential(nn.SiLU(), inner, nn.SiLU(), outer)
        self._tokens: Tensor | None = None
        base.register_forward_pre_hook(self._tap)
        self._initialise_heads(base, head.spread, generator)

    def forward(self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None) -> Outputs:
        """The head's outputs at latents `[B, C, H, W]`, t_src `[B]`, `class_labels` `[B]`."""
        self._call(x_src, t_src, conditions)
        tokens, self._tokens = self._tokens, None
        assert tokens is not None
        rows = x_src.shape[-2] // self.patch
        velocities = self.velocities(tokens)
        factor = tokens[..., :0] if self.factors is None else self.factors(tokens)
        if self.factor == "pixel":
            velocities = self._by_factor(velocities, "v c", rows, c=self.channels)
            factor = self._by_factor(factor, "e", rows, e=self.sizes.factor)
        else:
            velocities = rearrange(velocities, "b n (v f) -> b n v f", v=self.sizes.velocities)
        sample = tokens[:, 0, :0] if self.samples is None else self.samples(self._embedding(t_src, conditions))
        return Outputs(velocities, factor, sample)

    def _tap(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self._tokens = arguments[0]

    def _embedding(self, t: Tensor, conditions: Conditions | None) -> Tensor:
        """The transformer's embedding of time and class `[B, width]`, detached."""
        assert conditions is not None
        embed = self.transformer.transformer_blocks[0].norm1.emb
        with torch.no_grad():
            dtype = self.velocities.weight.dtype
            return cast(Tensor, embed(t * TIMESTEPS, conditions["class_labels"], hidden_dtype=dtype))

    def _by_factor(self, outputs: Tensor, inner: str, rows: int, **sizes: int) -> Tensor:
        """`[B, tokens, pixels x inner]` to `[B, L, inner]`, L in the order of the latent's pixels."""
        pattern = f"b (h w) (p q {inner}) -> b (h p w q) {inner}"
        return rearrange(outputs, pattern, h=rows, p=self.patch, q=self.patch, **sizes)

    @torch.no_grad()
    def _initialise_heads(self, base: nn.Linear, spread: float, generator: torch.Generator) -> None:
        order = {"pixel": "(p q v c)", "patch": "(v c p q)"}[self.factor]
        sizes = {"p": self.patch, "q": self.patch, "c": self.channels}
        count = self.sizes.velocities
        weight: Tensor = repeat(base.weight, f"(p q c) i -> {order} i", v=count, **sizes)
        bias: Tensor = repeat(base.bias, f"(p q c) -> {order}", v=count, **sizes)
        if self.sizes.start == "spread" and self.factor == "pixel":
            noise = normal((count, self.channels), generator, like=bias)  # the pixels of a patch start alike
            bias = bias + spread * repeat(noise, f"v c -> {order}", **sizes)
        elif self.sizes.start == "spread":
            bias = bias + spread * normal(bias.shape, generator, like=bias)
        elif self.sizes.start == "first":
            first: Tensor = repeat(torch.eye(count)[0].to(bias), f"v -> {order}", **sizes)
            weight, bias = weight * first.unsqueeze(1), bias * first
        self.velocities.weight.copy_(weight)
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


@torch.no_grad()
def _initialise_teacher(transformer: Any) -> None:
    """As DiT does it, the patch embedding apart: every block starts as the identity, and the velocity at zero."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        embed = block.norm1.emb
        for layer in (embed.timestep_embedder.linear_1, embed.timestep_embedder.linear_2):
            nn.init.normal_(layer.weight, std=0.02)
        nn.init.normal_(embed.class_embedder.embedding_table.weight, std=0.02)
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
