"""What a run trains on, and in which order: the position in the data is a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from pitools.training.random import keyed_generator
from pitools.types import Conditions, Student, VelocityField

OnChunk: TypeAlias = Callable[[int, int], None]
"""Told now and then how many samples are drawn, and of how many."""


class Evaluation(Protocol):
    """How students compare with their teacher, from noises that no run's seed changes."""

    def reference(self, step_size: float, shift: float, on_chunk: OnChunk) -> Tensor:
        """The teacher's end points, in Euler steps of `step_size` in raw time."""
        ...

    def student(self, student: Student, nfe: int, on_chunk: OnChunk) -> Tensor:
        """A student's end points from the same noises."""
        ...

    def metrics(self, samples: Tensor, reference: Tensor) -> Mapping[str, float]:
        """Named numbers for a row of the table."""
        ...


@runtime_checkable
class Searching(Protocol):
    """An evaluation with a score of its own, for which students search the teacher's noises."""

    @property
    def best_of(self) -> int:
        """Noises to choose among; 0 for no search."""
        ...

    def search(self, student: Student, nfe: int, step_size: float, on_chunk: OnChunk) -> Tensor:
        """The teacher's end points from the noises that a student likes best."""
        ...


class Data(Protocol):
    """A recipe's section `[data]`, found through the entry points `pitools.data`: name -> frozen dataclass."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        ...

    @property
    def null_conditions(self) -> Conditions:
        """What stands for no condition, one value for each sample."""
        ...

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        """Latents x_0 `[B, *shape]` and their conditions, on the CPU."""
        ...

    def evaluation(self, teacher: VelocityField, device: torch.device | str) -> Evaluation | None:
        """How students of `teacher` compare with it; None where sheets are all there is to see."""
        ...

    def draw_sheet(self, path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
        """Write a picture: a row of samples for each title."""
        ...


@runtime_checkable
class Imaged(Protocol):
    """Data whose latents are images themselves, `[C, H, W]` in [-1, 1]: what `pitools evaluate` takes runs of."""

    @property
    def features(self) -> str:
        """The feature extractor that is for these images: see `pitools.evaluation`."""
        ...

    @property
    def samples(self) -> int:
        """Noises that an evaluation starts from; a field of the dataclass."""
        ...

    def conditions(self, count: int) -> Conditions:
        """Those of the first `count` noises, on the CPU."""
        ...

    def held_out(self) -> tuple[Tensor, Conditions]:
        """Images `[R, C, H, W]` that nothing was trained on and their conditions, on the CPU."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """Data with an order of its own, such as one in which a step's samples are all of one size."""

    def indices(self, seed: int, step: int, batch: int, rows: Sequence[int]) -> Sequence[int]:
        """Which samples the given rows of a step's global batch are; a function of its arguments alone."""
        ...


def data_indices(seed: int, length: int, step: int, batch: int, rows: Sequence[int]) -> list[int]:
    """Which of `length` samples the given rows of a step's global batch are: a new order in every epoch."""
    positions = [step * batch + row for row in rows]
    return [int(_order(seed, length, position // length)[position % length]) for position in positions]


def to_device(conditions: Conditions, device: torch.device) -> dict[str, Any]:
    """The conditions with their tensors on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in conditions.items()}


@lru_cache(maxsize=4)
def _order(seed: int, length: int, epoch: int) -> Tensor:
    return torch.randperm(length, generator=keyed_generator(seed, "data order", epoch))
