"""The diffusers DiT (Peebles and Xie 2023) as a flow-matching teacher, and as the network of a student.

Both wrap `DiTTransformer2DModel` and leave its forward pass alone. A student reads the tokens that enter the last
projection with heads of its own, which start as that projection (`scale.heads`). A flow map, which jumps by δ at once,
and its auxiliary network embed more scalars than the time, which start without effect (FreeFlow, appendix B):

    F(z, δ, c, γ) = transformer(z, embedding(1) + embedding(c) + MLP(δ) + MLP(γ))

A token is a patch of p x p latent pixels, and a factor is one pixel or one whole patch. Within a token, a head's
channels come pixel slowest, then component, then channel, as in the published ImageNet weights; where the patch is
the factor, they come component slowest, then the channels of `patchwise`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import skip_init

from pitools.policies import Head, HeadSizes, Outputs
from pitools.training.random import drawing_from
from pitools.types import PIXELWISE, Conditions, Factorisation, patchwise
from scale.adapted import ADAPTER, Heads, LoRA, lora_config, start_lora
from scale.heads import Layout, PolicyHeads
from scale.loading import is_file, pretrained, tensors_of

Factor = Literal["pixel", "patch"]
LAYOUTS = {
    "pixel": Layout(base="p q c", velocities="p q v c", factor="p q e"),
    "patch": Layout(base="p q c", velocities="v c p q", factor="e", by_patch=True),
}


@dataclass(frozen=True)
class DiTHead(Heads):
    """Recipe section `[backbone.head]`: what a student adds to the transformer.

    factor: what one mixture of a policy covers, a latent "pixel" or a whole "patch".  Others: see `Heads`.
    """

    spread: float = 0.05
    factor: Factor = "pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor not in get_args(Factor):
            raise ValueError(f'factor must be "pixel" or "patch", got {self.factor!r}')


@dataclass(frozen=True)
class DiT:
    """Recipe section `[backbone]` with `name = "dit"`.

    channels, size: of the square latents `[B, channels, size, size]`.  patch: p.  layers, heads, head_width: of the
    transformer, whose width is heads x head_width.  classes: of `class_labels`; one more label, `classes`, means
    "no class".  weights: hub id or folder of one that was trained by flow matching, or a file of it in the published
    layout (see `load_teacher`); "" for random ones, to be trained from scratch; "random" and "tiny" for random ones
    that stand for trained.  timesteps: what t is multiplied by for
    the time embedding, and frequency_shift: that of its frequencies, in which published weights differ.  head: of
    students.
    """

    channels: int = 4
    size: int = 32
    patch: int = 2
    layers: int = 28
    heads: int = 16
    head_width: int = 72
    classes: int = 1000
    weights: str = ""
    timesteps: float = 1000.0
    frequency_shift: float = 1.0
    head: DiTHead = field(default_factory=DiTHead)

    def __post_init__(self) -> None:
        for name in ("channels", "size", "patch", "layers", "heads", "head_width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.timesteps > 0:
            raise ValueError(f"timesteps must be a positive number, got {self.timesteps}")
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

    @property
    def pretrained(self) -> bool:
        """Whether the teacher comes with weights."""
        return bool(self.weights)

    @property
    def stub(self) -> Mapping[str, object]:
        """A [data] section for a tiny DiT."""
        return {"name": "stub-prompts", "backbone": "dit", "height": 64, "width": 64}

    def tiny(self) -> Self:
        """The same with random weights of a size for tests. `ValueError` for one that is to be trained from scratch."""
        if not self.pretrained:
            raise ValueError("a DiT without weights has no tiny form; toys/tiny.toml is a small recipe that trains one")
        head = replace(self.head, log_std_width=min(self.head.log_std_width, 16))
        return replace(self, weights="tiny", size=8, layers=2, heads=2, head_width=16, classes=10, head=head)

    def outline(self) -> DiTVelocity:
        """The teacher without weights in memory, of the sizes that this section says."""
        from accelerate import init_empty_weights

        with init_empty_weights():
            teacher = replace(self, weights="random").teacher(torch.Generator())
        if is_file(self.weights):
            share_embedding(teacher.transformer)
        return teacher

    def example(self, teacher: nn.Module) -> dict[str, Tensor]:
        """Conditions of one sample, for an outline of the teacher."""
        return {"class_labels": torch.zeros(1, dtype=torch.long)}

    def teacher(self, generator: torch.Generator) -> DiTVelocity:
        """A DiT that answers with a velocity; random weights are drawn from `generator`, which lives on the CPU.

        `ValueError` for weights that cannot be had, or that are of another size than this section says.
        """
        try:
            from diffusers import DiTTransformer2DModel
        except ImportError as error:
            raise ImportError(
                f'the backbone "dit" needs diffusers ({error}): run `pip install "pitools[scale]"`'
            ) from error

        model: Any = DiTTransformer2DModel
        if self.weights not in ("", "random", "tiny"):
            try:
                if is_file(self.weights):
                    transformer = self._empty()
                    load_teacher(transformer, tensors_of(self.weights))
                else:
                    transformer = pretrained(model, self.weights)
            except (OSError, ValueError) as error:
                raise ValueError(f"weights {self.weights!r} cannot be loaded: {error}") from error
            self._check(transformer.config)
            return self._wrapped(transformer)
        with drawing_from(generator):
            transformer = model(**self._config, norm_num_groups=1)
            # One to be trained starts at zero velocity; one that stands for trained weights does not.
            _initialise_teacher(transformer, last_zero=not self.pretrained)
        return self._wrapped(transformer)

    def _empty(self) -> Any:
        """The transformer on the meta device, but for its buffers."""
        from accelerate import init_empty_weights
        from diffusers import DiTTransformer2DModel

        model: Any = DiTTransformer2DModel
        with init_empty_weights(include_buffers=False):
            return model(**self._config, norm_num_groups=1)

    def _wrapped(self, transformer: Any) -> DiTVelocity:
        for block in transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = self.frequency_shift
        return DiTVelocity(transformer, self.timesteps)

    @property
    def _config(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_width,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "num_layers": self.layers,
            "sample_size": self.size,
            "patch_size": self.patch,
            "num_embeds_ada_norm": self.classes,
            "attention_bias": True,
        }

    def _check(self, config: Mapping[str, Any]) -> None:
        for key, wanted in self._config.items():
            if config[key] != wanted:
                raise ValueError(
                    f"weights {self.weights!r} have {key} = {config[key]}, and this section says {wanted}"
                    + ("; a DiT that predicts a variance, too, is no velocity" if key == "out_channels" else "")
                )

    def student(
        self, teacher: nn.Module, head: Head, generator: torch.Generator, guidance: float | None = None
    ) -> DiTPolicy:
        """A network for `head` that starts as a copy of the teacher. `ValueError` for another kind of teacher."""
        if not isinstance(teacher, DiTVelocity):
            raise ValueError(f"a DiT student starts from a DiT teacher, not from a {type(teacher).__name__}")
        if guidance is not None:
            raise ValueError(f"a DiT embeds no guidance, got {guidance}")
        return DiTPolicy(
            copy.deepcopy(teacher.transformer).requires_grad_(True),
            head.sizes,
            self.head,
            generator=generator,
            timesteps=teacher.timesteps,
        )

    def flow_map(
        self, teacher: nn.Module, scalars: Sequence[str], generator: torch.Generator, lora: int = 0
    ) -> DiTFlowMap:
        """A network with more `scalars` than the time (see `DiTFlowMap`) that starts as a copy of the teacher.

        lora: rank of the LoRA that trains in the place of the copy's own weights, 0 for these.  generator: on the CPU.
        `ValueError` for another kind of teacher, a negative rank, and scalars that are no names.
        """
        if not isinstance(teacher, DiTVelocity):
            raise ValueError(f"a DiT flow map starts from a DiT teacher, not from a {type(teacher).__name__}")
        if lora < 0:
            raise ValueError(f"lora must be a rank, or 0 for none, got {lora}")
        transformer = copy.deepcopy(teacher.transformer).requires_grad_(True)
        if lora:
            _add_lora(transformer, lora, generator)
        return DiTFlowMap(transformer, scalars, generator, teacher.timesteps)


class _Wrapped(nn.Module):
    """A DiT without randomness of its own: labels are dropped by whoever trains it, for each sample once."""

    def __init__(self, transformer: Any, timesteps: float = 1000.0) -> None:
        super().__init__()
        for module in transformer.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        self.transformer: Any = transformer
        self.timesteps = timesteps

    def _call(self, x: Tensor, t: Tensor, conditions: Conditions | None, added: Tensor | None = None) -> Tensor:
        """The transformer's answer; added: to its embedding of time and class, `[B, width]`, see `_takes_more`."""
        if conditions is None or "class_labels" not in conditions:
            raise ValueError('a DiT is class-conditional: pass conditions={"class_labels": [B]}')
        patch = self.transformer.config.patch_size
        if x.shape[-1] != x.shape[-2] or x.shape[-1] % patch:
            raise ValueError(f"a DiT takes square latents of whole {patch} x {patch} patches, got {tuple(x.shape)}")
        labels, time = conditions["class_labels"], t * self.timesteps
        if added is not None:
            time = torch.cat([time.unsqueeze(1), added], 1)
        return cast(Tensor, self.transformer(x, timestep=time, class_labels=labels, return_dict=False)[0])

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

    def __init__(
        self,
        transformer: Any,
        sizes: HeadSizes,
        head: DiTHead,
        generator: torch.Generator,
        timesteps: float = 1000.0,
    ) -> None:
        super().__init__(transformer, timesteps)
        base: nn.Linear = transformer.proj_out_2
        base.requires_grad_(False)  # its output goes nowhere
        self.patch = transformer.config.patch_size
        self.heads = PolicyHeads(
            base,
            sizes,
            LAYOUTS[head.factor],
            channels=transformer.config.in_channels,
            patch=self.patch,
            spread=head.spread,
            log_std_width=head.log_std_width,
            generator=generator,
        )
        self._tokens: Tensor | None = None
        base.register_forward_pre_hook(self._tap)

    def forward(self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None) -> Outputs:
        """The head's outputs at latents `[B, C, H, W]`, t_src `[B]`, `class_labels` `[B]`."""
        self._call(x_src, t_src, conditions)
        tokens, self._tokens = self._tokens, None
        assert tokens is not None
        # Only a mixture's log-std reads the embedding.
        embedding = self._embedding(t_src, conditions) if self.heads.sizes.sample else tokens[:, 0]
        return cast(Outputs, self.heads(tokens, embedding, x_src.shape[-2] // self.patch))

    def _tap(self, module: nn.Module, arguments: tuple[Tensor]) -> None:
        self._tokens = arguments[0]

    def _embedding(self, t: Tensor, conditions: Conditions | None) -> Tensor:
        """The transformer's embedding of time and class `[B, width]`, detached."""
        assert conditions is not None
        embed = self.transformer.transformer_blocks[0].norm1.emb
        with torch.no_grad():
            dtype = self.heads.velocities.weight.dtype
            return cast(Tensor, embed(t * self.timesteps, conditions["class_labels"], hidden_dtype=dtype))


class DiTFlowMap(_Wrapped):
    """Latents to a velocity that depends on more scalars than the time: FreeFlow's networks (appendix B).

    A flow map F(z, δ, c, γ) has "delta", in [0, 1], and "guidance", γ, and is asked at t = 1; the auxiliary network
    g(x_r, r, c, γ) has "guidance" or nothing.  transformer: trained in place.  generator: on the CPU.
    Raises `ValueError` for scalars that are no names, or are named twice.
    """

    def __init__(
        self, transformer: Any, scalars: Sequence[str], generator: torch.Generator, timesteps: float = 1000.0
    ) -> None:
        super().__init__(transformer, timesteps)
        if len(set(scalars)) < len(scalars) or not all(name.isidentifier() for name in scalars):
            raise ValueError(f'scalars must be different names such as "delta" and "guidance", got {tuple(scalars)}')
        self.scalars = tuple(scalars)
        like = transformer.proj_out_1.weight
        self.embeddings = nn.ModuleDict({name: ScalarEmbedding(like, generator) for name in self.scalars})
        if self.scalars:
            _takes_more(block.norm1.emb for block in transformer.transformer_blocks)

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The velocity `[B, C, H, W]` at latents of that shape, t `[B]`, `class_labels` and each of the scalars `[B]`.

        Scalars may be dual numbers of forward-mode differentiation; the tangent of the answer has no graph.
        Raises `ValueError` for a scalar that is missing, or of another shape.
        """
        values = {name: self._value(name, x_t, conditions) for name in self.scalars}
        parts = {name: forward_ad.unpack_dual(value) for name, value in values.items()}
        if all(part.tangent is None for part in parts.values()):
            return self._velocity(x_t, t, conditions, values)
        # Apart, as what recomputes a block later sees no dual numbers, and fast attention takes none.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            tangent = forward_ad.unpack_dual(self._velocity(x_t, t, conditions, values)).tangent
        primals = {name: part.primal for name, part in parts.items()}
        return cast(Tensor, forward_ad.make_dual(self._velocity(x_t, t, conditions, primals), tangent))

    def _velocity(self, x: Tensor, t: Tensor, conditions: Conditions | None, values: Mapping[str, Tensor]) -> Tensor:
        added = [self.embeddings[name](value) for name, value in values.items()]
        return self._call(x, t, conditions, torch.stack(added).sum(0) if added else None)

    @staticmethod
    def _value(name: str, x: Tensor, conditions: Conditions | None) -> Tensor:
        value = (conditions or {}).get(name)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            got = tuple(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f'this DiT embeds "{name}": pass it in conditions as a tensor [{len(x)}], got {got}')
        return value


class ScalarEmbedding(nn.Module):
    """A scalar `[B]` to `[B, width]`: sines and cosines at 256 / 2 frequencies from 1 down, Linear, SiLU, Linear; zero
    at the start.

    Frequencies are those of time in a SiT, which has it in [0, 1], too; higher ones would make ∂_δ F large.
    like: a weight `[..., width]` whose dtype and device it takes.
    """

    FREQUENCIES = 256

    def __init__(self, like: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        width, where = like.shape[-1], {"device": like.device, "dtype": like.dtype}
        # Unlike `nn.Linear` itself, this draws nothing from the global state.
        self.inner = cast(nn.Linear, skip_init(nn.Linear, self.FREQUENCIES, width, **where))
        self.outer = cast(nn.Linear, skip_init(nn.Linear, width, width, **where))
        with torch.no_grad():
            self.inner.weight.copy_(0.02 * torch.randn(self.inner.weight.shape, generator=generator))  # as DiT's own
            for value in (self.inner.bias, self.outer.weight, self.outer.bias):
                nn.init.zeros_(value)

    def forward(self, value: Tensor) -> Tensor:
        """`[B, width]`, in the weights' dtype, or autocast's."""
        half = self.FREQUENCIES // 2
        exact = value.to(torch.promote_types(value.dtype, torch.float32))
        steps = torch.arange(half, device=value.device, dtype=exact.dtype)
        angles = exact.unsqueeze(1) * torch.exp(-math.log(1e4) / half * steps)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return cast(Tensor, self.outer(nn.functional.silu(self.inner(waves.to(self.inner.weight.dtype)))))


def _takes_more(embeds: Iterable[nn.Module]) -> None:
    """Let embeddings of time and class take `[B, 1 + width]` for the time: it, and what to add to their answer.

    So what is added goes the way of the arguments. Nothing is kept between calls, and what recomputes a block in the
    backward pass sees what the block saw.
    """
    for embed in dict.fromkeys(embeds):  # blocks may share one
        time_proj = cast(nn.Module, embed.time_proj)
        time_proj.register_forward_pre_hook(_time_alone)
        embed.register_forward_hook(_with_added)


def _time_alone(module: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
    return (arguments[0][:, 0],)


def _with_added(module: nn.Module, arguments: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
    return output + arguments[0][:, 1:].to(output.dtype)


def _add_lora(transformer: Any, rank: int, generator: torch.Generator) -> None:
    """LoRA on the linear layers of attention and feed-forward, and nothing else to train."""
    from peft import inject_adapter_in_model

    targets = [
        f"transformer_blocks.{i}.{name}"
        for i in range(len(transformer.transformer_blocks))
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    ]
    weight = transformer.proj_out_1.weight
    unread = torch.device("meta") if weight.is_meta else nullcontext()
    with torch.random.fork_rng(devices=[]), unread:  # peft draws from the global state
        inject_adapter_in_model(lora_config(LoRA(rank, dropout=0.0), targets), transformer, ADAPTER)
    start_lora(transformer, generator, weight.dtype)


def share_embedding(transformer: Any) -> None:
    """Let all blocks have the first one's embedding of time and class, as the published weights do."""
    first, *others = transformer.transformer_blocks
    for block in others:
        block.norm1.emb = first.norm1.emb


SHARED, FIRST = "emb.", "transformer_blocks.0.norm1.emb."
"""Where the published layout has the embedding of time and class, and where a transformer whose blocks share one."""


def load_teacher(transformer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a transformer on the meta device the weights of a published teacher, in float32.

    tensors: named as in diffusers, but for one embedding `emb.` that all blocks share. Where the last projection has
    one more channel for each latent pixel, a log-std, it is left out.
    `ValueError` for tensors that are missing, surplus, or of another shape.
    """
    share_embedding(transformer)
    named = {FIRST + key.removeprefix(SHARED) if key.startswith(SHARED) else key: tensors[key] for key in tensors}
    channels, pixels = transformer.config.in_channels, transformer.config.patch_size**2
    for kind in ("weight", "bias"):
        value = named.get(f"proj_out_2.{kind}")
        if value is not None and len(value) == pixels * (channels + 1):
            rows = value.unflatten(0, (pixels, channels + 1))[:, :-1]
            named[f"proj_out_2.{kind}"] = rows.flatten(0, 1)
    assign(transformer, named)


def assign(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give all parameters of a module these values, in float32; on the meta device before, on the CPU afterwards.

    What modules share is named once, as `named_parameters` does. `ValueError` for tensors that are missing, surplus,
    or of another shape; buffers may be among them, and are left as they are.
    """
    own, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    found = {key: value for key, value in tensors.items() if key not in buffers}
    for what, names in (("misses", own.keys() - found.keys()), ("has surplus", found.keys() - own.keys())):
        if names:
            raise ValueError(f"it {what} {len(names)} weights, {min(names)} first")
    for name, value in found.items():
        if value.shape != own[name].shape:
            raise ValueError(f"{name} must be {tuple(own[name].shape)}, got {tuple(value.shape)}")
        owner, _, key = name.rpartition(".")
        holder = module.get_submodule(owner)
        holder.register_parameter(key, nn.Parameter(value.float(), requires_grad=own[name].requires_grad))


@torch.no_grad()
def _initialise_teacher(transformer: Any, last_zero: bool) -> None:
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
    for layer in (transformer.proj_out_1, transformer.proj_out_2) if last_zero else ():
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
