"""How much memory a step of a student takes, told before anything is loaded.

    weights     the teacher's and the student's; what they share counts once, the frozen part as it is stored
    training    of each trained parameter: gradient, optimiser state, average
    network     the most that forward and backward passes of the networks take: the graph, or with recomputation
                what is left of it, and what comes and goes
    policy      the most that the objective takes from the network's outputs to their gradients

The most of all at once is less than their sum: the parts take turns.

Networks run on fake tensors, which have shapes and dtypes but no memory, by the kernels and the autocast rules of
the CPU, so that every machine tells the same. Autocast on a GPU keeps norms in float32, and so takes more where
activations are not recomputed. The objective runs on a corner of the latents, and what it takes grows with them.

Left out: what kernels use inside, fragmentation, the CUDA context, and weights of a quantised layer while it runs.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pitools.objectives import PiID, imitation_loss
from pitools.objectives.mixing import teacher_ratio
from pitools.path import segments, shift_time
from pitools.policies import NetworkStudent, Outputs
from pitools.training.optimiser import SMALLEST_8BIT, Optimiser
from pitools.types import Conditions, Time

CORNER = 8
"""Latent pixels along each axis on which the objective runs."""

DRAWS = 4
"""How many times it runs: where the teacher takes steps, their lengths are drawn, and with them the policy's."""


@dataclass(frozen=True)
class Memory:
    """Bytes, on one process that shares with no other.  total: the most at once."""

    weights: int
    training: int
    network: int
    policy: int
    total: int


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
            seen[id(value)] = plain_bytes(name, value) if value.requires_grad else stored(name, value)
    return sum(seen.values())


def state_bytes(optimiser: Optimiser, value: Tensor) -> int:
    """The optimiser's two moments of one trained parameter; those of 8 bits have a scale for each 256."""
    if optimiser.name == "adamw8bit" and value.numel() >= SMALLEST_8BIT:
        return 2 * (value.numel() + 4 * -(-value.numel() // 256))
    return 2 * (4 * value.numel() if optimiser.name == "adamw8bit" else plain_bytes("", value))


class Live(TorchDispatchMode):
    """Counts, within it, the bytes of tensors made there that are alive.

    known: tensors from outside, which do not count.  now, most: at this moment, and at the most since `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known = {value.untyped_storage()._cdata: value.untyped_storage() for value in known}
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> int:
        """Forget what was the most; what there is now."""
        self.most = self.now
        return self.now

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        for value in tree_leaves(answer):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return answer

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[key]
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


@dataclass(frozen=True)
class Passes:
    """Bytes that networks take beyond weights and, with `accumulated`, gradients.

    forward: the student's forward pass at its most.  graph: what is left of it.  teacher: the teacher's forward pass.
    backward: the student's backward pass, its graph included.
    """

    forward: int
    graph: int
    teacher: int
    backward: int

    @property
    def most(self) -> int:
        """While networks run."""
        return max(self.forward, self.graph + self.teacher, self.backward)


def network_passes(
    network: nn.Module,
    teacher: nn.Module,
    latents: Tensor,
    conditions: Conditions,
    *,
    autocast: bool,
    recomputed: bool,
    accumulated: bool,
) -> tuple[Passes, tuple[Tensor, ...]]:
    """What the student's and the teacher's networks take on latents `[B, ...]`; and the student's outputs, fake.

    Both end on the meta device.  autocast: to bf16.  recomputed: whether activations are, in the backward pass.
    accumulated: whether gradients are there already.
    """
    meta = torch.device("meta")
    # As one object, so that what they share stays shared.
    own, other = copy.deepcopy((network.to(meta), teacher.to(meta)))
    if recomputed:
        cast(Any, own).checkpoint_gradients()
    own.train()

    def run(module: nn.Module) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return module(x, t, given)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in nn.ModuleList([own, other]).modules():
            module.to_empty(device="cpu", recurse=False)
        x, t = torch.empty(latents.shape), torch.empty(latents.shape[:1])
        given = {
            name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
            for name, value in conditions.items()
        }
        for value in own.parameters() if accumulated else ():
            value.grad = torch.empty_like(value) if value.requires_grad else None
        weights = [value for module in (own, other) for value in (*module.parameters(), *module.buffers())]
        gradients = [value.grad for value in weights if value.grad is not None]
        inputs = [x, t, *(value for value in given.values() if isinstance(value, Tensor))]
        with Live([*weights, *gradients, *inputs]) as live:
            answer = run(own)
            outputs: tuple[Tensor, ...] = answer if isinstance(answer, tuple) else (answer,)
            forward, graph = live.most, live.restart()
            with torch.no_grad():
                run(other)
            asked = live.most - graph
            live.restart()
            torch.autograd.backward(outputs, [torch.empty_like(value) for value in outputs])
            passes = Passes(forward, graph, asked, live.most)
    return passes, tuple(value.detach() for value in outputs)


def policy_bytes(student: NetworkStudent, outputs: Outputs, latents: Tensor, objective: PiID) -> tuple[int, int]:
    """What the loss of the first segment takes beyond its graph of the network: the most, and while a teacher is asked.

    outputs: of the student's network for `latents` `[B, ...]`; their shapes and dtypes alone are read.
    """
    corner = torch.zeros(*latents.shape[:2], *(min(size, CORNER) for size in latents.shape[2:]))
    batch, factors = student.factorisation.pack(corner).shape[:2]
    given = Outputs(
        torch.zeros(batch, factors, *outputs.velocities.shape[2:], dtype=outputs.velocities.dtype),
        torch.zeros(batch, factors, *outputs.factor.shape[2:], dtype=outputs.factor.dtype),
        torch.zeros(outputs.sample.shape, dtype=outputs.sample.dtype),
    )
    for value in given:
        value.requires_grad_()
    schedule = student.schedule
    end = segments(schedule.nfe, schedule.final_step_scale)[1]
    with Live([*given, corner]) as live:
        still = _Still(live)
        for seed in range(DRAWS):
            loss = imitation_loss(
                still,
                student.read(given, corner, torch.ones(batch)),
                corner,
                1.0,
                shift_time(end, schedule.shift),
                factorisation=student.factorisation,
                states=objective.states,
                dropout=objective.dropout,
                teacher_ratio=teacher_ratio(0, objective.teacher_ratio, objective.decay_steps),
                window=objective.window,
                step_size=objective.step_size,
                shift=schedule.shift,
                floor=objective.floor,
                generator=torch.Generator().manual_seed(seed),
            ).loss
            torch.autograd.grad(loss.mean(), list(given), allow_unused=True)
            del loss
    times = latents.numel() / corner.numel()
    return round(live.most * times), round(still.alive * times)


@dataclass
class _Still:
    """A teacher that answers 0, and knows the most that was alive when it was asked."""

    live: Live
    alive: int = 0

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        self.alive = max(self.alive, self.live.now)
        return torch.zeros_like(x_t)
