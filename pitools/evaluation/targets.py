"""What is measured: the students of a run, drawn anew from fixed noises, or the images of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from pitools.evaluation.images import Folder, Images, read_folder
from pitools.guidance import Teacher, frozen
from pitools.training.comparison import contenders, other_strengths
from pitools.training.data import Evaluation, Imaged, OnChunk
from pitools.training.distillation import all_members
from pitools.training.engine import Engine, EngineSection
from pitools.training.errors import DivergenceError
from pitools.training.recipe import Plan, plan_of
from pitools.training.teacher import load_trained, new_teacher, teacher_weights
from pitools.types import Conditions


@dataclass(frozen=True, eq=False)
class Entry:
    """A set of images, and what is known of them.

    source: the run or the folder that they are of.  asked: the prompt or the class of each, None where nothing tells.
    paired: the teacher's images from the same noises.  known: what else a table tells of them.
    """

    source: str
    title: str
    images: Images
    asked: Sequence[object] | None = None
    paired: Tensor | None = None
    known: Mapping[str, Any] = field(default_factory=dict)


Progress = Callable[[str], OnChunk]
"""Told what is drawn, answers with what is to be told how much of it is done."""

WEIGHTS = "student.safetensors"


class Target(Protocol):
    """What the command is given to measure."""

    @property
    def name(self) -> str:
        """As it was given."""
        ...

    @property
    def features(self) -> str | None:
        """The feature extractor that its images are for; None where they are for any."""
        ...

    @property
    def asks(self) -> bool:
        """Whether the prompts or classes of its images are known."""
        ...

    def entries(self, progress: Progress) -> Iterator[Entry]:
        """One set of images after the other."""
        ...


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """Images that somebody drew, such as `pitools sample`; `samples` of them, or all."""

    name: str
    folder: Folder
    samples: int | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        there = len(self.folder.images)
        if self.samples is not None and self.samples > there:
            raise ValueError(f"--samples {self.samples} is more than {self.name} has: {there} images")

    @property
    def asks(self) -> bool:
        """Whether its samples.json tells."""
        return self.folder.asked is not None

    def entries(self, progress: Progress) -> Iterator[Entry]:
        """The folder itself."""
        images, asked = self.folder.images, self.folder.asked
        if self.samples is not None:
            images = replace(images, paths=images.paths[: self.samples])
            asked = None if asked is None else asked[: self.samples]
        yield Entry(self.name, Path(self.name).name, images, asked)


@dataclass(frozen=True, eq=False)
class Run:
    """A finished run of `pitools distill`, or one of its students, on data that are images themselves.

    students: the folders of those that are measured.
    """

    name: str
    plan: Plan
    engine: Engine
    students: frozenset[Path]
    asks: bool = True

    @property
    def data(self) -> Imaged:
        """The plan's, which `open_target` has looked at."""
        return cast(Imaged, self.plan.data)

    @property
    def features(self) -> str:
        """Those of the data."""
        return self.data.features

    @cached_property
    def network(self) -> nn.Module:
        """The teacher's."""
        network = new_teacher(self.plan)
        if self.plan.recipe.teacher.training is not None:
            load_trained(network, teacher_weights(self.plan))
        return frozen(network).to(self.engine.device)

    @cached_property
    def teacher(self) -> Teacher:
        """With the recipe's guidance."""
        call = partial(self.engine.call, self.network)
        return Teacher(call, self.plan.recipe.teacher.guidance, self.plan.data.null_conditions)

    @cached_property
    def evaluation(self) -> Evaluation:
        """The noises, and the teacher's images of them once they are drawn."""
        return self._evaluation(self.teacher)

    def reference(self, kind: Literal["data", "teacher"], progress: Progress) -> Entry:
        """Data that nothing was trained on, or the teacher's samples from the noises that students start from."""
        if kind == "teacher":
            return self._teacher(progress)
        images, conditions = self.data.held_out()
        return Entry(self.name, "held-out data", images, _labels(conditions))

    def entries(self, progress: Progress) -> Iterator[Entry]:
        """The teacher, also at strengths of guidance at which a flow map is compared, and then the students.

        `DivergenceError` for samples that are not finite.
        """
        teacher = self._teacher(progress)
        yield teacher
        steps = self.plan.recipe.teacher.reference_steps
        for strength, guided in other_strengths(self.plan, self.teacher):
            title = f"teacher, {steps} steps, γ = {strength:g}"
            images = self._evaluation(guided).reference(1 / steps, 1.0, progress(title))
            known = {"policy": "teacher", "nfe": steps, "guidance": strength}
            yield replace(teacher, title=title, images=_sound(title, images), known=known)
        for contender in contenders(self.plan, self.network):
            if contender.folder not in self.students:
                continue
            title, nfe = contender.title, contender.row["nfe"]
            load_trained(contender.network, contender.folder / WEIGHTS)
            student = contender.student(partial(self.engine.call, contender.network.eval().to(self.engine.device)))
            try:
                images = self.evaluation.student(student, nfe, progress(title))
            except ValueError as error:  # a policy's, about what its network answered
                raise DivergenceError(f"{title} cannot be sampled: {error}") from error
            yield replace(teacher, title=title, images=_sound(title, images), known=contender.row)

    def _teacher(self, progress: Progress) -> Entry:
        steps = self.plan.recipe.teacher.reference_steps
        title = f"teacher, {steps} steps"
        images = _sound(title, self.evaluation.reference(1 / steps, 1.0, progress(title)))
        labels = _labels(self.data.conditions(len(images)))
        return Entry(self.name, title, images, labels, images, {"policy": "teacher", "nfe": steps})

    def _evaluation(self, teacher: Teacher) -> Evaluation:
        return cast(Evaluation, self.plan.data.evaluation(teacher, self.engine.device))


def open_target(name: str, samples: int | None, device: torch.device) -> Target:
    """A run, a student's folder in one, or a folder of images. Nothing is drawn yet.

    samples: of each; None for as many as a run's recipe says, or as a folder has.
    Raises `ValueError` for what is none of them, for a run that is not finished, and for one whose samples are no
    images before a decoder makes them such; `RecipeError` for a recipe that cannot be had.
    """
    path = Path(name)
    if not path.is_dir():
        raise ValueError(f"{name} is not there; name the folder of a run, or of images")
    run = next((each for each in (path, path.parent) if (each / "recipe.toml").is_file()), None)
    if run is None:
        return ImageFolder(name, read_folder(path), samples)
    planned = plan_of(run)
    there = [member.folder for member in all_members(planned) if run == path or member.folder == path]
    if not there:
        labels = ", ".join(member.label for member in all_members(planned))
        raise ValueError(f"{name} is none of the run's students, which are {labels}")
    if not isinstance(planned.data, Imaged):
        raise ValueError(
            f"{name} draws latents, which a pipeline decodes: draw images with `pitools sample {name} --out FOLDER`, "
            "and evaluate that folder"
        )
    trained = [] if planned.recipe.teacher.training is None else [teacher_weights(planned)]
    for weights in (*trained, *(folder / WEIGHTS for folder in there)):
        if not weights.is_file():
            raise ValueError(f"{name} is not finished: {weights} is not there; go on with `pitools distill`")
    if samples is not None:
        data: Any = planned.data
        planned = replace(planned, data=replace(data, samples=samples))
    section = EngineSection(device=cast(Any, device.type), precision=planned.recipe.engine.precision)
    return Run(name, planned, Engine(section), frozenset(there))


def _labels(conditions: Conditions) -> list[int] | None:
    labels = conditions.get("class_labels")
    return None if labels is None else [int(each) for each in labels]


def _sound(title: str, images: Tensor) -> Tensor:
    if bad := int((~images.isfinite()).sum()):
        raise DivergenceError(f"{title}: {bad} values of the samples are not finite; train with a lower learning rate")
    return images
