"""AdamW in 32 or 8 bits, its learning rate, and 8-bit steps on sharded weights.

    lr_s = lr · (s + 1)/warm-up   while s < warm-up,   then lr, or lr · (1 + cos(π (s - warm-up)/(S - warm-up)))/2

at step s = 0, 1, ... of S. Both are pure functions of the step, so that a resumed run needs no scheduler's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Name = Literal["adamw", "adamw8bit"]
Decay = Literal["constant", "cosine"]

SMALLEST_8BIT = 4096
"""bitsandbytes keeps the state of tensors with fewer elements than this in float32."""


@dataclass(frozen=True)
class Optimiser:
    """The recipe's section [training.optimiser].

    name: "adamw", or "adamw8bit" with bitsandbytes' blockwise 8-bit moments.  learning_rate: the peak.
    warmup_steps: of a linear warm-up.  decay: what follows it; "cosine" reaches 0 at the last step.
    clip: the largest gradient norm, from the end of the warm-up on; 0 for never.
    Raises `ValueError` for values outside their ranges.
    """

    name: Name = "adamw"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup_steps: int = 100
    decay: Decay = "constant"
    clip: float = 50.0

    def __post_init__(self) -> None:
        for key, known in (("name", get_args(Name)), ("decay", get_args(Decay))):
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}, got {getattr(self, key)!r}")
        for key in ("learning_rate", "eps"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key} must be a positive number, got {value}")
        for key in ("weight_decay", "clip"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key} must be a number of at least 0, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if not isinstance(self.warmup_steps, int) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a whole number of at least 0, got {self.warmup_steps}")


def learning_rate_at(section: Optimiser, step: int, total_steps: int) -> float:
    """The learning rate of step `step`, counted from 0, of `total_steps`."""
    if step < section.warmup_steps:
        return section.learning_rate * (step + 1) / section.warmup_steps
    if section.decay == "constant":
        return section.learning_rate
    share = (step - section.warmup_steps) / max(total_steps - section.warmup_steps, 1)
    return section.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def clip_at(section: Optimiser, step: int) -> float:
    """The largest gradient norm at step `step`, counted from 0; infinite where gradients are not clipped."""
    return section.clip if section.clip and step >= section.warmup_steps else math.inf


def build_optimiser(section: Optimiser, parameters: Iterable[nn.Parameter], sharded: bool) -> torch.optim.Optimizer:
    """The optimiser of those `parameters` that require a gradient, at the peak learning rate.

    sharded: whether they are FSDP2's DTensors; they must be sharded before this call.
    Raises `ValueError` where no parameter is left, or bitsandbytes is needed and missing.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ValueError("parameters has none that requires a gradient; unfreeze what is to be trained")
    chosen: dict[str, Any] = {
        "lr": section.learning_rate,
        "betas": section.betas,
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    if section.name == "adamw":
        # The batched form of AdamW refuses whole tensors among sharded ones.
        mixed = len({is_sharded(parameter) for parameter in trained}) > 1
        return torch.optim.AdamW(trained, **chosen, foreach=False if mixed else None)
    try:
        adamw8bit: Callable[..., torch.optim.Optimizer] = import_module("bitsandbytes.optim").AdamW8bit
    except ImportError as error:
        raise ValueError(
            f'name = "adamw8bit" needs bitsandbytes ({error}): run `pip install pitools[scale]`, or use "adamw"'
        ) from error
    if sharded:
        return LocalShards(trained, lambda shards: adamw8bit(shards, **chosen))
    return adamw8bit(trained, **chosen)


class LocalShards(torch.optim.Optimizer):
    """Steps an elementwise optimiser that takes no DTensors, as bitsandbytes', on this process's shards.

    A shard is a plain tensor that shares memory with the DTensor, and has its share of the gradient. What the
    inner optimiser decides by the size of a tensor, it decides by the shard's: bitsandbytes' 8-bit states begin at
    4,096 elements *of the shard*, and its blocks of 256 elements begin where the shard does. A shard without
    elements is left out. `state[p]` is the inner state of p's shard.

    parameters: sharded already.  inner: makes the optimiser from one list of plain parameters.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], inner: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        whole = list(parameters)
        shards = [nn.Parameter(local(parameter.detach())) for parameter in whole]
        self.inner = inner(shards)
        super().__init__(whole, dict(self.inner.defaults))
        self._shards = dict(zip(whole, shards, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of the inner optimiser with this optimiser's learning rate and other settings."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in group.items() if key != "params"})
        for parameter, shard in self._shards.items():
            # Taken anew: loading or moving a module gives its parameters other memory.
            shard.data = local(parameter.detach())
            shard.grad = None if parameter.grad is None or not shard.numel() else local(parameter.grad)
            if parameter in self.state:
                self.inner.state[shard] = self.state[parameter]
            else:
                self.inner.state.pop(shard, None)
        self.inner.step()
        for parameter, shard in self._shards.items():
            if shard in self.inner.state:
                self.state[parameter] = self.inner.state[shard]
            own = local(parameter.detach())
            if own.data_ptr() != shard.data_ptr():  # bitsandbytes has copied what was not contiguous
                own.copy_(shard)
            shard.grad = None
        return loss


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; asked without its module, which takes half a second to import."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, in the same memory; any other tensor itself."""
    return cast("DTensor", tensor).to_local() if is_sharded(tensor) else tensor


def like_shard(own: Tensor, like: DTensor) -> Tensor:
    """This process's part of a tensor that is sharded as `like` is, as a DTensor on the device of `like`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        own.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
