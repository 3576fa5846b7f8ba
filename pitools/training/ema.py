"""The power-function moving average of weights (Karras et al. 2024, section 3.1).

    θ̂ ← β θ̂ + (1 - β) θ,    β_n = (1 - 1/n)^(γ + 1)

at step n = 1, 2, ...: the average weights step i by i^γ, so that it forgets the start without a warm-up.
Near the end of a run 1 - β is about (γ + 1)/n, far below bfloat16's rounding: the average has its own precision.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from pitools.training.checkpoint import check_keys, placed
from pitools.training.optimiser import is_sharded, like_shard, local

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


PREFIX = "averages/"


class EMA:
    """Averages the trainable floating-point parameters of a module; it keeps no copy of what is frozen.

    steps: how many updates the averages hold.

    module: whose weights are followed; if FSDP2 shards it, then before, and each process averages its own shards.
    gamma: γ >= 0; the larger, the shorter the memory.
    dtype: of the averages; None for each parameter's own.  device: where they live; None for each parameter's own.
    On another device, a weight is copied there at each update, and an average to the weight's where it is applied.
    Raises `ValueError` for a negative gamma, a dtype that is not floating-point, or nothing to average.
    """

    def __init__(
        self,
        module: nn.Module,
        gamma: float = 7.0,
        dtype: torch.dtype | None = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point type, or None for each parameter's own, got {dtype}")
        followed = {
            name: parameter.detach()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        if not followed:
            raise ValueError("module has no floating-point parameter that requires a gradient: nothing to average")
        self.gamma = gamma
        self.steps = 0
        self._own = {
            name: local(value).to(device or value.device, dtype or value.dtype, copy=True)
            for name, value in followed.items()
        }
        self._sharded = {name: cast("DTensor", value) for name, value in followed.items() if is_sharded(value)}

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """Parameter name -> its average, of its shape; sharded as it is, and then put together as it is asked for."""
        return _Averages("", self._own, self._sharded)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of `module` after an optimiser step. `ValueError` if it lacks one of them."""
        parameters = self._parameters(module)
        self.steps += 1
        beta = (1 - 1 / self.steps) ** (self.gamma + 1)
        for name, average in self._own.items():
            value = local(parameters[name]).to(average.device, average.dtype)
            if beta == 0:
                average.copy_(value)
            else:
                average.add_(value - average, alpha=1 - beta)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into the parameters of `module`, in the parameters' dtype. `ValueError` if it lacks one.

        Nothing else of the module changes: neither buffers, nor parameters that were frozen.
        """
        for name, parameter in self._parameters(module).items():
            local(parameter).copy_(self._own[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Within it, `module` has the averages; after it, also after an error, its own values, bit for bit."""
        parameters = self._parameters(module)
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            self.copy_to(module)
            yield
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(own[name])

    def state_dict(self) -> Mapping[str, Tensor]:
        """The tensors "steps", 0-d int64, and "averages/NAME" of each parameter, which are not copied."""
        steps = {"steps": torch.tensor(self.steps)}
        return ChainMap(steps, cast("dict[str, Tensor]", _Averages(PREFIX, self._own, self._sharded)))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a `state_dict`, whole or sharded. `CheckpointError` names keys too many or missing, and shapes."""
        check_keys("the EMA's state", self.state_dict(), state)
        for name, average in self._own.items():
            like = self._sharded.get(name, average)
            average.copy_(local(placed(state[PREFIX + name], like, PREFIX + name)))
        self.steps = int(state["steps"])

    def _parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        # By name and not by requires_grad: switching adapters off also switches their gradients off.
        parameters = dict(module.named_parameters())
        missing = [name for name in self._own if name not in parameters]
        if missing:
            raise ValueError(f"module has no parameter {missing[0]!r}; pass the module that the EMA was made from")
        return {name: parameters[name] for name in self._own}


class _Averages(Mapping[str, Tensor]):
    """Averages by prefixed names, sharded ones put together as they are asked for: at no time are all on a device."""

    def __init__(self, prefix: str, own: Mapping[str, Tensor], sharded: Mapping[str, DTensor]) -> None:
        self.prefix, self.own, self.sharded = prefix, own, sharded

    def __getitem__(self, key: str) -> Tensor:
        name = key.removeprefix(self.prefix)
        if not key.startswith(self.prefix) or name not in self.own:
            raise KeyError(key)
        return like_shard(self.own[name], self.sharded[name]) if name in self.sharded else self.own[name]

    def __iter__(self) -> Iterator[str]:
        return (self.prefix + name for name in self.own)

    def __len__(self) -> int:
        return len(self.own)
