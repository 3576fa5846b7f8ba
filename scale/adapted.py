"""One frozen transformer as teacher and as student.

    teacher   u = base(x_t, t, c)
    student   h, e = what enters the base's last norm, with LoRA on;    outputs = heads(norm(h, e), e)

The student's norm and heads are modules of their own beside the base, and LoRA lies within it, where a context
switches it off for the teacher. So there is one copy of the weights, which may be quantised, and the forward pass
stays that of diffusers: what enters its last norm is read by a hook, and what it makes of that goes unused.

Tokens pack a 2 x 2 patch of a latent as (c, p, q), c slowest; the heads' channels come component slowest, then as
in a token, as in the published adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from pitools.policies import HeadSizes, Outputs
from pitools.types import Conditions
from scale.heads import Layout, PolicyHeads
from scale.loading import Files, fill, share

ADAPTER = "pi_flow"
"""What LoRA is called among a transformer's adapters, beside whatever style LoRAs it has."""

PATCH = 2
LAYOUT = Layout(base="c p q", velocities="v c p q", factor="e p q")


@dataclass(frozen=True)
class LoRA:
    """Recipe section `[backbone.lora]`: rank, which alpha equals, and dropout (paper, Table 9)."""

    rank: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


@dataclass(frozen=True)
class Heads:
    """Recipe section `[backbone.head]`: what a student adds to the transformer.

    spread: standard deviation of the noise that tells the components of a mixture apart at the start; None for the
    backbone's own, 0.05, or 0.1 where its last projection has no bias.  log_std_width: of that head's hidden layer.
    """

    spread: float | None = None
    log_std_width: int = 1024

    def __post_init__(self) -> None:
        if self.log_std_width < 1:
            raise ValueError(f"log_std_width must be at least 1, got {self.log_std_width}")
        if self.spread is not None and not self.spread >= 0:
            raise ValueError(f"spread must not be negative, got {self.spread}")


class Form(Protocol):
    """What one family of diffusers transformers differs in: how it is called, and where LoRA goes."""

    @property
    def conditions(self) -> Sequence[str]:
        """The conditions that it cannot do without."""
        ...

    def tokens(self, transformer: Any, packed: Tensor, t: Tensor, grid: tuple[int, int], conditions: Conditions) -> Any:
        """Its forward pass on tokens `[B, rows x columns, 4 C]` of a `grid` (rows, columns), t `[B]`."""
        ...

    def targets(self, transformer: Any) -> list[str]:
        """The names of the modules that LoRA adapts."""
        ...


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` to tokens `[B, H/2 x W/2, 4 C]`. `ValueError` for odd sizes."""
    if latents.ndim != 4 or latents.shape[-2] % PATCH or latents.shape[-1] % PATCH:
        raise ValueError(f"latents must be [B, C, H, W] with even H and W, got {tuple(latents.shape)}")
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=PATCH, q=PATCH)


def unpack(tokens: Tensor, rows: int) -> Tensor:
    """Tokens back to latents, of 2 x `rows` lines."""
    return rearrange(tokens, "b (h w) (c p q) -> b c (h p) (w q)", h=rows, p=PATCH, q=PATCH)


class Base(nn.Module):
    """A transformer as a `VelocityNetwork`: latents `[B, C, H, W]` to their velocity.

    Once a student shares the transformer, this asks `through` the student's module, so that whatever wraps that one
    (FSDP2 does) is in the way of both.

    unread: where the weights lie that are on the meta device until a student's `materialise`; see `scale.loading`.
    """

    def __init__(self, transformer: Any, form: Form, unread: Files | None = None) -> None:
        super().__init__()
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.transformer: Any = transformer
        self.form = form
        self.unread = unread
        self.through: Callable[[Tensor, Tensor, Conditions | None], Tensor] | None = None

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The velocity at latents of that shape, t `[B]`."""
        if self.through is not None:
            return self.through(x_t, t, conditions)
        with lora_off(self.transformer):
            return _velocity(self.transformer, self.form, x_t, t, conditions)

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        self.transformer.enable_gradient_checkpointing()


class AdaptedPolicy(nn.Module):
    """A student on the transformer of `base`: LoRA in it, and a last norm and heads of its own beside it.

    A student that had the transformer before loses it.  targets: where LoRA goes, nowhere if empty; None for all the
    form's own.  dtype: of LoRA, norm and heads.  generator: on the CPU.  guidance: the embedded scale that it is
    trained for.  Raises `ValueError` for a transformer that FSDP2 has sharded, which no other student can have.
    """

    def __init__(
        self,
        base: Base,
        sizes: HeadSizes,
        lora: LoRA,
        heads: Heads,
        generator: torch.Generator,
        targets: Sequence[str] | None = None,
        dtype: torch.dtype = torch.float32,
        guidance: float | None = None,
    ) -> None:
        super().__init__()
        transformer: Any = base.transformer
        if hasattr(transformer.proj_out.weight, "full_tensor"):
            raise ValueError("this transformer was sharded for an earlier student; load it anew for another")
        self.guidance = guidance
        self.transformer, self.form = transformer, base.form
        self._unread = None if base.unread is None else (base.unread, generator)
        transformer.requires_grad_(False)
        self.norm_out = _floating(transformer.norm_out, dtype)
        projection: nn.Linear = transformer.proj_out
        spread = heads.spread
        if spread is None:
            spread = 0.05 if projection.bias is not None else 0.1
        self.heads = PolicyHeads(
            _floating_linear(projection, dtype),
            sizes,
            LAYOUT,
            channels=projection.out_features // PATCH**2,
            patch=PATCH,
            spread=spread,
            log_std_width=heads.log_std_width,
            generator=generator,
        )
        targets = self.form.targets(transformer) if targets is None else targets
        self.has_lora = bool(targets)
        add_lora(transformer, lora, targets, generator, dtype)
        self._tap = new_tap(transformer.norm_out)
        base.through = partial(self, as_teacher=True)  # not a submodule: this one has the transformer, too

    def forward(
        self, x_src: Tensor, t_src: Tensor, conditions: Conditions | None = None, as_teacher: bool = False
    ) -> Outputs | Tensor:
        """The heads' outputs at latents `[B, C, H, W]`, t_src `[B]`; as the teacher, the base's velocity."""
        if as_teacher:
            with lora_off(self.transformer):
                velocity = _velocity(self.transformer, self.form, x_src, t_src, conditions)
            self._tap.seen = None  # nobody asks for it, and it is large
            return velocity
        if self.guidance is not None:
            conditions = {"guidance": torch.full_like(t_src, self.guidance), **(conditions or {})}
        lora_on(self.transformer)
        self._tap.seen = None
        _velocity(self.transformer, self.form, x_src, t_src, conditions)
        hidden, embedding = self._tap.take()
        dtype = self.heads.velocities.weight.dtype
        hidden, embedding = hidden.to(dtype), embedding.to(dtype)
        with torch.autocast(x_src.device.type, enabled=False):
            return cast(Outputs, self.heads(self.norm_out(hidden, embedding), embedding, x_src.shape[-2] // PATCH))

    def checkpoint_gradients(self) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        self.transformer.enable_gradient_checkpointing()

    def shards(self) -> list[nn.Module]:
        """What to shard apart: every transformer block."""
        names = ("transformer_blocks", "single_transformer_blocks")
        return [block for name in names for block in getattr(self.transformer, name, [])]

    def materialise(self, device: torch.device) -> None:
        """Give the base what was left unread and LoRA its start, on `device` and once sharded: this process's share."""
        if self._unread is None:
            return
        (files, generator), self._unread = self._unread, None
        fill(self.transformer, files, device)
        added = {name: value for name, value in self.transformer.named_parameters() if value.is_meta}
        started = {name: share(_lora_start(name, like, generator), like, device) for name, like in added.items()}
        self.transformer.load_state_dict(started, strict=False, assign=True)


class Tap:
    """A hook that keeps what last entered a module."""

    def __init__(self) -> None:
        self.seen: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.seen = cast(tuple[Tensor, Tensor], (*arguments, *named.values()))

    def take(self) -> tuple[Tensor, Tensor]:
        """What entered, handed out once."""
        if self.seen is None:
            raise RuntimeError("this student's transformer was given to a later student; use that one, or build anew")
        seen, self.seen = self.seen, None
        return seen


def new_tap(module: nn.Module) -> Tap:
    """A tap on the module, in the place of an earlier student's."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, Tap)]:
        del hooks[key]
    tap = Tap()
    module.register_forward_pre_hook(tap, with_kwargs=True)
    return tap


def _velocity(transformer: Any, form: Form, x: Tensor, t: Tensor, conditions: Conditions | None) -> Tensor:
    conditions = conditions or {}
    missing = [name for name in form.conditions if conditions.get(name) is None]
    if missing:
        raise ValueError(f"a {type(transformer).__name__} needs conditions {missing}, got {sorted(conditions)}")
    packed = pack(x)
    if packed.shape[-1] != transformer.config.in_channels:
        raise ValueError(
            f"latents must have {transformer.config.in_channels // PATCH**2} channels, got {tuple(x.shape)}"
        )
    rows, columns = x.shape[-2] // PATCH, x.shape[-1] // PATCH
    dtype = computes_in(transformer)
    given = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in conditions.items()
    }
    tokens = form.tokens(transformer, packed.to(dtype), t, (rows, columns), given)
    return unpack(tokens, rows)


def computes_in(transformer: Any) -> torch.dtype:
    """The dtype of its first weight that is neither quantised nor LoRA's; its own attribute may tell LoRA's."""
    weights: Iterator[tuple[str, Tensor]] = transformer.named_parameters()
    return next(
        value.dtype
        for name, value in weights
        if value.is_floating_point() and value.element_size() > 1 and ".lora_" not in name
    )


def add_lora(
    transformer: Any, lora: LoRA, targets: Sequence[str], generator: torch.Generator, dtype: torch.dtype
) -> None:
    """Put LoRA on the named modules, in the place of what an earlier student had; it starts at zero.

    On modules without values, on the meta device, it has none, and nothing is drawn.
    """
    unknown = sorted(set(targets) - {name for name, _ in transformer.named_modules()})
    if unknown:
        raise ValueError(f"{type(transformer).__name__} has no module {unknown[0]!r} for LoRA")
    others = sorted({name for layer in _lora_layers(transformer) for name in layer.active_adapters} - {ADAPTER})
    remove_lora(transformer)
    if not targets:
        return
    unread = torch.device("meta") if transformer.proj_out.weight.is_meta else nullcontext()
    with torch.random.fork_rng(devices=[]), unread:  # peft draws from the global state, and on the CPU unless told
        transformer.add_adapter(lora_config(lora, targets), ADAPTER)
    if others:
        transformer.set_adapter([*others, ADAPTER])
    start_lora(transformer, generator, dtype)


def lora_config(lora: LoRA, targets: Sequence[str]) -> Any:
    """What peft is told."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank,
        lora_dropout=lora.dropout,
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )


def start_lora(transformer: Any, generator: torch.Generator, dtype: torch.dtype) -> None:
    """Let nothing but LoRA train, and start it: in `dtype`, drawn from `generator` on the CPU."""
    for name, parameter in transformer.named_parameters():
        if f".{ADAPTER}." not in name:
            parameter.requires_grad_(False)
            continue
        parameter.data = parameter.data.to(dtype)
        if not parameter.is_meta:  # peft's own draw was rounded to the base's dtype
            parameter.data.copy_(_lora_start(name, parameter, generator))


def _lora_start(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """What a parameter of LoRA starts as, whole and on the CPU: A is drawn, B zero."""
    if ".lora_A." not in name:
        return torch.zeros(like.shape)
    return torch.randn(like.shape, generator=generator) / like.shape[0]


def remove_lora(transformer: Any) -> None:
    """Take an earlier student's LoRA off, if there is one."""
    if ADAPTER in (getattr(transformer, "peft_config", None) or {}):
        transformer.delete_adapters(ADAPTER)


def lora_on(transformer: Any) -> None:
    """Make the student's LoRA one of those in use, if adding or choosing others has put it out.

    It stays so, as backward passes that recompute activations look at what is in use then.
    """
    for layer in _lora_layers(transformer):
        if ADAPTER in getattr(layer, "lora_A", ()) and ADAPTER not in layer.active_adapters:
            layer._active_adapter = [*layer.active_adapters, ADAPTER]


@contextmanager
def lora_off(transformer: Any) -> Iterator[None]:
    """Within it, the transformer is what it is without the student's LoRA; style LoRAs stay.

    Only the layers' lists of what is in use are changed: peft's own way also changes what requires a gradient, which
    wrappers and optimisers rely on.
    """
    layers = _lora_layers(transformer)
    before = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name for name in layer.active_adapters if name != ADAPTER]
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._active_adapter = value


def _lora_layers(transformer: Any) -> list[Any]:
    """The layers that have LoRA. `ValueError` for one that is fused: peft lets no other act beside it."""
    if not getattr(transformer, "peft_config", None):
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    fused = sorted({name for layer in layers for name in layer.merged_adapters})
    if fused:
        raise ValueError(
            f"LoRA {', '.join(fused)} is fused: unfuse it, or unload it once fused and build the student anew"
        )
    return layers


def _floating(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A trainable copy of the last norm in `dtype`, whatever its linear layer is quantised to."""
    linear, hooks = cast(nn.Linear, norm.linear), norm._forward_pre_hooks
    norm._forward_pre_hooks = type(hooks)()  # a copy without the tap
    norm._modules["linear"] = None
    try:
        own = copy.deepcopy(norm)
    finally:
        norm._modules["linear"], norm._forward_pre_hooks = linear, hooks
    own.linear = _floating_linear(linear, dtype)
    return own.requires_grad_(True)


@torch.no_grad()
def _floating_linear(linear: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """A copy of a linear layer in `dtype`, dequantised if need be."""
    weight = linear.weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        from peft.utils.integrations import dequantize_module_weight

        weight = dequantize_module_weight(linear)
    own = nn.utils.skip_init(
        nn.Linear, linear.in_features, linear.out_features, linear.bias is not None, device=weight.device, dtype=dtype
    )
    own.weight.copy_(weight)
    if linear.bias is not None:
        own.bias.copy_(linear.bias)
    return cast(nn.Linear, own)
