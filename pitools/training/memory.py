"""How much memory a step of a student takes, told before anything is loaded.

    weights       the teacher's and the student's; what they share counts once, the frozen part as it is stored
    training      of each trained parameter: gradient, optimiser state, average
    network       what autograd keeps of the network's forward pass, or with recomputation of the blocks' inputs and
                  of the largest block
    policy        what it keeps of the policy's velocities at the states of one segment

Networks run on PyTorch's meta device, where nothing is computed and nothing takes memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pitools.policies import NetworkStudent, Outputs
from pitools.training.data import to_device
from pitools.types import Conditions


@dataclass(frozen=True)
class Memory:
    """Bytes, on one process that shares with no other."""

    weights: int
    training: int
    network: int
    policy: int

    @property
    def total(self) -> int:
        """Of all four."""
        return self.weights + self.training + self.network + self.policy


StoredBytes = Callable[[str, Tensor], int]
"""What a frozen parameter takes, by its name in the network that it belongs to."""


def plain_bytes(name: str, value: Tensor) -> int:
    """A parameter as it is."""
    return value.numel() * value.element_size()


def weight_bytes(networks: Sequence[nn.Module], stored: StoredBytes) -> int:
    """All parameters of the networks, each once; the frozen ones as they are stored."""
    seen: dict[int, int] = {}
    for network in networks:
        for name, value in network.named_parameters():
            name = name.removeprefix("transformer.")
            seen[id(value)] = plain_bytes(name, value) if value.requires_grad else stored(name, value)
    return sum(seen.values())


def network_bytes(network: nn.Module, latents: Tensor, conditions: Conditions, recomputed: bool) -> tuple[int, Outputs]:
    """What autograd keeps of one forward pass on the meta device, parameters apart; and the outputs.

    recomputed: whether the activations within each of the network's `shards()` are.
    """
    meta = torch.device("meta")
    network.to(meta)
    own = {value.untyped_storage()._cdata for value in network.parameters()}
    blocks = cast(Any, network).shards() if recomputed and hasattr(network, "shards") else []
    inside = _Inside(blocks)
    kept: dict[int, tuple[int | None, int, Tensor]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept.setdefault(storage._cdata, (inside.block, value.untyped_storage().nbytes(), value))
        return value

    with inside.watched(), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        t = torch.ones(len(latents), device=meta)
        outputs = network(latents.to(meta), t, to_device(conditions, meta))
    by_block: dict[int | None, int] = {}
    for block, size, _ in kept.values():
        by_block[block] = by_block.get(block, 0) + size
    outside = by_block.pop(None, 0)
    if not blocks:
        return outside + sum(by_block.values()), outputs
    return outside + sum(inside.inputs.values()) + max(by_block.values(), default=0), outputs


class _Inside:
    """In which of some modules a forward pass is, and what entered each."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.blocks = blocks
        self.block: int | None = None
        self.inputs: dict[int, int] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, this knows."""
        handles = []
        for index, block in enumerate(self.blocks):
            handles.append(block.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.block = index
            # Only what differs from block to block: states, not what all of them are given.
            given = (value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim > 2)
            self.inputs[index] = sum(plain_bytes("", value) for value in given if value.requires_grad)

        return hook

    def _leave(self, module: nn.Module, arguments: object, answer: object) -> None:
        self.block = None


def policy_bytes(student: NetworkStudent, outputs: Outputs, latents: Tensor, evaluations: int) -> int:
    """What autograd keeps of a policy's velocity, for outputs of these shapes, at so many states."""
    zeros = Outputs(*(torch.zeros(value.shape, requires_grad=True) for value in outputs))
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept.setdefault(storage._cdata, (storage.nbytes(), value))
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        policy = student.read(zeros, latents, torch.ones(len(latents)))
    read = sum(size for size, _ in kept.values())
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        policy.velocity(student.factorisation.pack(latents), 0.9)
    return read + evaluations * sum(size for size, _ in kept.values())


def evaluations(window: float, step_size: float, states: int) -> int:
    """How many velocities of a policy one segment's loss differentiates."""
    return states * max(1, math.ceil(window / step_size - 1e-4))
