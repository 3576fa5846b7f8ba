"""Processes, devices and precision: one process, DDP or FSDP2, as the launcher and the recipe say.

accelerate knows how the run was launched. DDP, FSDP2 and autocast are torch's own: accelerate shards on GPUs only,
keeps every model that it has wrapped, where a distillation has one student after another, and has one precision for
the life of a process. Weights stay in their own dtype and only a network's forward pass is autocast, so that a
policy sees float32.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from pitools.training.checkpoint import Form
from pitools.training.config import RecipeError
from pitools.types import Conditions

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclass(frozen=True)
class EngineSection:
    """The recipe's section [engine].

    device: "cpu", "cuda" or "auto".  precision: of a network's forward pass; weights keep their own.  parallel: how
    several processes share a network.  checkpoints: FSDP2's are written by the main process, or by each process its
    shards; either goes on on any number.  gradient_checkpointing: recompute activations in the backward pass.
    compile: `torch.compile` the student's network.  tensorboard: also log there.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["float32", "bf16"] = "float32"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    checkpoints: Form = "consolidated"
    gradient_checkpointing: bool = False
    compile: bool = False
    tensorboard: bool = True


class Shardable(Protocol):
    """What a network may have for FSDP2: which of its modules to shard apart, and weights that are read afterwards."""

    def shards(self) -> list[nn.Module]:
        """The modules to shard apart, inner ones first."""
        ...

    def materialise(self, device: torch.device) -> None:
        """Give the parameters that are still on the meta device their values, each process its shard of them."""
        ...


class Engine:
    """How this process takes part in a run. `RecipeError` for a device that is not here."""

    def __init__(self, section: EngineSection) -> None:
        from accelerate import Accelerator, InitProcessGroupKwargs

        if section.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError('[engine] device is "cuda", and torch sees no GPU; use "auto" or "cpu"')
        self.section = section
        self.accelerator: Accelerator = Accelerator(
            cpu=section.device == "cpu" or not torch.cuda.is_available(),
            # One process may download weights, or train a teacher, while the others wait for it.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
        )
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether parameters are split between processes."""
        return self.world > 1 and self.section.parallel == "fsdp2"

    def check(self, network: nn.Module) -> None:
        """`RecipeError` for what the recipe asks of a network that cannot do it."""
        if self.section.gradient_checkpointing and not hasattr(network, "checkpoint_gradients"):
            raise RecipeError(
                f"[engine] gradient_checkpointing is not supported by a {type(network).__name__}; set it to false"
            )

    def place(self, network: nn.Module) -> nn.Module:
        """The network itself on this device, unless some of its weights are not read before it is sharded."""
        later = self.sharded and any(value.is_meta for value in network.parameters())
        return network if later else network.to(self.device)

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network on this device, wrapped as the recipe says. Its parameters keep their names within it."""
        self.check(network)
        self.place(network)
        if self.section.gradient_checkpointing:
            cast(Any, network).checkpoint_gradients()
        if self.section.compile:
            network.compile()
        if self.sharded:
            return self._sharded(network)
        if self.world == 1:
            return network
        # Buffers are the same everywhere already: they come with the weights, and no forward pass changes them.
        devices = None if self.device.type == "cpu" else [self.device]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            return nn.parallel.DistributedDataParallel(network, devices, broadcast_buffers=False)

    def _sharded(self, network: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # A head's outputs are views; nothing changes them in place.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in cast(Shardable, network).shards() if hasattr(network, "shards") else []:
            fully_shard(module, mesh=mesh)
        # The outermost, too: by default it would stay whole after a forward pass that no backward pass follows,
        # and the next step would see the averaged weights of a sheet.
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        if hasattr(network, "materialise"):
            cast(Shardable, network).materialise(self.device)
        return network

    def call(self, network: nn.Module, x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Any:
        """The network's answer, its forward pass in the recipe's precision."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.section.precision == "bf16"):
            return network(x, t, conditions)

    @contextmanager
    def syncing(self, network: nn.Module, wanted: bool) -> Iterator[None]:
        """Within it, a forward and backward pass exchanges gradients with the other processes only if `wanted`."""
        if self.sharded:
            cast(Any, network).set_requires_gradient_sync(wanted)
        skip = self.world > 1 and not self.sharded and not wanted
        with cast(Any, network).no_sync() if skip else nullcontext():
            yield

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        return cast(Tensor, self.accelerator.reduce(values, reduction="mean")) if self.world > 1 else values

    def agreed(self, value: int) -> bool:
        """Whether every process has this value; also waits until all have one."""
        if self.world == 1:
            return True
        everyone = self.accelerator.gather(torch.tensor([value], device=self.device))
        return bool((everyone == value).all())

    def on_each(self, action: Callable[[], T]) -> list[T]:
        """Do `action` on each process; what each returned, by rank. An error on one is raised on all."""
        results: list[Any] = [None]
        errors: list[Exception | None] = [None]
        try:
            results = [action()]
        except Exception as raised:
            errors = [raised]
        own = errors[0]
        if self.world > 1:
            from torch.distributed import all_gather_object

            everyone: list[Any] = [None] * self.world
            all_gather_object(everyone, (results[0], own and _sendable(own)))
            results, others = (list(each) for each in zip(*everyone, strict=True))
            errors = [own, *others]  # its own first: it knows where it came from
        for error in errors:
            if error is not None:
                raise error
        return results

    def on_main(self, action: Callable[[], object]) -> None:
        """Do `action` on the main process while the others wait; an error there is raised on all of them."""

        def there() -> None:
            if self.main:
                action()

        self.on_each(there)

    def rows(self, batch: int, accumulation: int) -> list[range]:
        """This process's rows of the global batch, for each accumulation step.

        `ValueError` for a batch that does not divide evenly.
        """
        parts = self.world * accumulation
        if batch < parts or batch % parts:
            raise ValueError(
                f"batch {batch} does not divide among {self.world} processes x {accumulation} accumulation steps; "
                f"use a multiple of {parts}"
            )
        size = batch // parts
        return [range(start, start + size) for start in range(self.rank * size, batch, self.world * size)]


def _sendable(error: Exception) -> Exception:
    """The error itself, or its text where it does not survive the way to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
