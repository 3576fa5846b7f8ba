"""Pictures of a student in training: the teacher's samples above the student's, from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pitools.guidance import Conditioned, Teacher
from pitools.rollout import integrate
from pitools.training.data import Ordered, to_device
from pitools.training.engine import Engine
from pitools.training.jobs import Call
from pitools.training.random import sample_generators
from pitools.training.recipe import Plan
from pitools.types import Conditions

Sampler = Callable[[Call, Tensor, Conditions], Tensor]
"""A student's samples from noise and conditions, with a network in the place of its own."""


@dataclass
class Sheet:
    """Drawn in as many at once as a forward pass of training takes.

    shift: of the teacher's steps.  classes: of labels in turn, where no data is read; None for the data's first.
    """

    plan: Plan
    sampler: Sampler
    title: str
    teacher: Teacher
    engine: Engine
    shift: float = 1.0
    classes: int | None = None
    reference: Tensor | None = field(default=None, init=False)

    @cached_property
    def _chunks(self) -> list[range]:
        training, data = self.plan.recipe.training, self.plan.data
        count = training.sheet_images
        if self.classes is None:
            count = min(count, len(data))
            if isinstance(data, Ordered):
                count = min(count, training.batch)  # one batch is of one size
        at_once = max(1, training.batch // training.accumulation // self.engine.world)
        return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]

    def draw(self, network: Call, path: Path | None) -> None:
        """Draw the student with `network` in the place of its own; every process calls this, one draws."""
        images = torch.cat([self.sampler(network, noise, given) for noise, given in self._noises()])
        if self.reference is None:
            # On every process, too: a teacher that shares the student's network may be spread over all of them.
            step = 1 / self.plan.recipe.teacher.reference_steps
            ends = [
                integrate(Conditioned(self.teacher, c), x, 1.0, 0.0, step_size=step, shift=self.shift)
                for x, c in self._noises()
            ]
            self.reference = torch.cat(ends)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self.plan.data.draw_sheet(path, [("teacher", self.reference), (self.title, images)])

    def _noises(self) -> Iterator[tuple[Tensor, Conditions]]:
        """The noise and the conditions of each chunk."""
        device = self.engine.device
        for rows in self._chunks:
            shape, conditions = self._asked(rows)
            keys = sample_generators(0, "sheet", 0, rows)
            noise = torch.stack([torch.randn(shape, generator=key) for key in keys])
            yield noise.to(device), to_device(conditions, device)

    def _asked(self, rows: range) -> tuple[tuple[int, ...], Conditions]:
        """The shape of one latent, and the conditions of some samples."""
        data, batch = self.plan.data, self.plan.recipe.training.batch
        if self.classes is not None:
            return data.shape, {"class_labels": torch.tensor(rows) % self.classes}
        latents, conditions = data.batch(data.indices(0, 0, batch, rows) if isinstance(data, Ordered) else rows)
        return tuple(latents.shape[1:]), conditions
