"""What a recipe says: its sections, and the plug-ins that its `name` keys stand for.

    [run]  [data]  [backbone]  [teacher]  [students.NAME]  [flow_maps.NAME]  [training]  [engine]

Each room owns the dataclass of its own section: `[students.NAME.objective]` is `PiID`, `[flow_maps.NAME.objective]` is
`FreeFlow`, `[teacher.guidance]` is `Guidance`, and the plug-ins own `[data]` and `[backbone]` but for `name`, which
chooses them.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import nn

from pitools.guidance import Guidance
from pitools.objectives import PiID
from pitools.objectives.free_flow import FreeFlow
from pitools.policies import DXHead, GMHead, Head, PolicyNetwork, PolynomialHead, ShortcutHead
from pitools.training.config import RecipeError, as_table, parse, section_hash
from pitools.training.data import Data
from pitools.training.engine import EngineSection
from pitools.training.jobs import Auxiliary
from pitools.training.loop import Training
from pitools.types import Factorisation, Schedule


class Backbone(Protocol):
    """A recipe's section `[backbone]`, found through the entry points `pitools.backbones`: name -> frozen dataclass.

    What else one may have, and what holds where it has not:

    pretrained         whether its teacher comes with weights; it does not
    embeds_guidance    whether its networks take a guidance scale as the condition "guidance"; they do not
    classes            how many it knows, to be compared with those of data; it is not compared
    tiny, stub         see `Shrinkable`; `--tiny` is refused
    flow_map           see `Mappable`; `[flow_maps]` is refused

    and for a dry run, or where FSDP2 shards students:

    outline() -> Module                       the teacher without weights in memory; `teacher` is asked
    example(teacher) -> conditions            of one sample, as tensors, for an outline; those of the data's first
    stored_bytes(name, parameter) -> int      what a frozen parameter takes; its size
    sharded_teacher(generator) -> Module      whose parameters may be on the meta device until the `materialise(device)`
                                              of a student's network that shares them; `teacher` is asked
    """

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one latent; None where any size does."""
        ...

    @property
    def factorisation(self) -> Factorisation:
        """How a student's policy sees a latent."""
        ...

    def teacher(self, generator: torch.Generator) -> nn.Module:
        """A `VelocityNetwork`, its weights drawn from `generator` where it has none to load."""
        ...

    def student(
        self, teacher: nn.Module, head: Head, generator: torch.Generator, guidance: float | None = None
    ) -> PolicyNetwork:
        """A network for `head` that starts as the teacher; an `nn.Module`.

        guidance: the embedded scale that the teacher is asked with, where the backbone embeds it.
        """
        ...


@runtime_checkable
class Shrinkable(Protocol):
    """A backbone that has a form of next to no size: what `--tiny` takes."""

    @property
    def stub(self) -> Mapping[str, object]:
        """The table of a [data] section for the tiny form."""
        ...

    def tiny(self) -> Backbone:
        """The same section for networks of next to no size. `ValueError` for one that has no such form."""
        ...


@runtime_checkable
class Mappable(Protocol):
    """A backbone for `[flow_maps]`: one whose networks can take more scalars than the time."""

    def flow_map(
        self, teacher: nn.Module, scalars: Sequence[str], generator: torch.Generator, lora: int = 0
    ) -> nn.Module:
        """A `VelocityNetwork` that starts as a copy of the teacher and takes `scalars`, each `[B]`, as conditions.

        lora: the rank of LoRA that is trained in the place of the copy's weights; 0 for those.
        """
        ...


@dataclass(frozen=True)
class RunSection:
    """The recipe's section [run].

    seed: of everything that is drawn for students.  out: the folder to write; by default runs/ and the recipe's name.
    """

    seed: int = 0
    out: Path | None = None


@dataclass(frozen=True)
class TeacherSection:
    """The recipe's section [teacher].

    training: of its own weights, by flow matching; none for a backbone that comes with weights.  label_dropout: how
    often its conditions are replaced by the null ones there, which is what guidance needs.  shift: m of its training
    times.  reference_steps: Euler steps of its own samples, with which students are compared, even in the raw time of
    a student on its sheets.  seed: of its weights, order and draws; runs with other seeds share it.
    """

    training: Training | None = None
    seed: int = 0
    label_dropout: float = 0.1
    shift: float = 1.0
    reference_steps: int = 128
    guidance: Guidance = field(default_factory=Guidance)

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")
        if self.reference_steps < 1:
            raise ValueError(f"reference_steps must be at least 1, got {self.reference_steps}")
        if self.training is not None and self.guidance.scale != 1 and self.label_dropout == 0:
            raise ValueError(f"guidance.scale {self.guidance.scale} needs label_dropout above 0, for the null class")


@dataclass(frozen=True)
class StudentSection:
    """The recipe's section [students.NAME]: one student for each of its `nfe`.

    components: K of "gm".  grid_points: N of "dx", and the coefficients of "polynomial".  shift, final_step_scale,
    temperature: of the schedule.
    """

    policy: Literal["gm", "dx", "polynomial", "shortcut"] = "gm"
    nfe: tuple[int, ...] = (4,)
    components: int = 8
    grid_points: int = 10
    shift: float = 1.0
    final_step_scale: float = 1.0
    temperature: float | Literal["auto"] = 1.0
    objective: PiID = field(default_factory=PiID)

    def __post_init__(self) -> None:
        if not self.nfe or len(set(self.nfe)) != len(self.nfe):
            raise ValueError(f"nfe must be different whole numbers, such as [1, 2, 4], got {list(self.nfe)}")
        for nfe in self.nfe:
            schedule = self.schedule(nfe)
            if nfe == 1 and self.final_step_scale != 1:
                raise ValueError(
                    f"final_step_scale {self.final_step_scale} and nfe 1 disagree: a single step has no last one to "
                    "scale; set final_step_scale to 1, or leave 1 out of nfe"
                )
            try:
                self.objective.check(schedule, self.head)
            except ValueError as error:
                raise ValueError(f"objective and nfe {nfe} disagree: {error}") from None

    @property
    def head(self) -> Head:
        """The policy's head, of this section's sizes."""
        heads: Mapping[str, Head] = {
            "gm": GMHead(self.components),
            "dx": DXHead(self.grid_points),
            "polynomial": PolynomialHead(self.grid_points),
            "shortcut": ShortcutHead(),
        }
        return heads[self.policy]

    def schedule(self, nfe: int) -> Schedule:
        """What a student for `nfe` evaluations is trained for."""
        return Schedule(nfe, self.shift, self.final_step_scale, self.temperature)


@dataclass(frozen=True)
class FlowMapSection:
    """The recipe's section [flow_maps.NAME]: a student of one evaluation, by FreeFlow.

    strengths: of guidance, at which it is compared with the teacher beside the teacher's own.
    """

    strengths: tuple[float, ...] = ()
    objective: FreeFlow = field(default_factory=FreeFlow)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)

    def __post_init__(self) -> None:
        low, high = self.objective.guidance or (math.nan, math.nan)
        if len(set(self.strengths)) != len(self.strengths):
            raise ValueError(f"strengths must be different numbers, got {list(self.strengths)}")
        for strength in self.strengths:
            if not low <= strength <= high:
                trained = "none" if self.objective.guidance is None else f"those in [{low:g}, {high:g}]"
                raise ValueError(f"strengths has {strength:g}, and objective.guidance trains {trained}")


@dataclass(frozen=True)
class Recipe:
    """A recipe, read. `data` and `backbone` are tables that `name` a plug-in."""

    data: Mapping[str, object]
    backbone: Mapping[str, object]
    training: Training
    students: Mapping[str, StudentSection] = field(default_factory=dict)
    flow_maps: Mapping[str, FlowMapSection] = field(default_factory=dict)
    teacher: TeacherSection = field(default_factory=TeacherSection)
    run: RunSection = field(default_factory=RunSection)
    engine: EngineSection = field(default_factory=EngineSection)

    def __post_init__(self) -> None:
        if not self.students and not self.flow_maps:
            raise ValueError("students has no section; add one, such as [students.gm], or one of [flow_maps]")
        for name in self.students.keys() & self.flow_maps.keys():
            raise ValueError(f"students and flow_maps both have {name!r}, which would share a folder; rename one")
        for name in (*self.students, *self.flow_maps):
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"students are named with letters, digits, - and _, as their folders, got {name!r}")


TOLD = ("checkpoint_every", "keep", "log_every", "sheet_every", "sheet_images")
"""Keys of a training that say what it tells and keeps, and do not change its weights."""


@dataclass(frozen=True)
class Plan:
    """A recipe with its plug-ins, checked: everything that can be known before any training starts.

    table: the recipe with every default filled in.  teacher_hash: of what the teacher's weights depend on, where
    they are trained.
    """

    recipe: Recipe
    data: Data
    backbone: Backbone
    out: Path
    table: Mapping[str, Any]
    teacher_hash: str


def plan(table: Mapping[str, object], name: str, tiny: bool = False) -> Plan:
    """The plan of a recipe's table; `name` is what the run's folder is called by default.

    tiny: the same job with a network of next to no size, data to match, and a few steps: see `shrunk`.
    Raises `RecipeError`, of one line, for whatever in it cannot be.
    """
    recipe = parse(Recipe, table)
    backbone = cast(Backbone, _plugin("backbones", recipe.backbone, section="backbone"))
    if tiny:
        recipe, backbone = shrunk(recipe, backbone)
        name = f"{name}-tiny"
    data = cast(Data, _plugin("data", recipe.data))
    if len(data.shape) != len(backbone.shape) or any(
        size not in (None, own) for size, own in zip(backbone.shape, data.shape, strict=True)
    ):
        made = tuple("any" if size is None else size for size in backbone.shape)
        raise RecipeError(
            f"[backbone] is made for latents {made}, and [data] has {tuple(data.shape)}; change the backbone's sizes"
        )
    _check_teacher(recipe, backbone)
    _check_flow_maps(recipe, backbone, data)
    # Where both have classes: a label that the backbone does not know would end the run in the middle of a step.
    classes, known = getattr(data, "classes", None), getattr(backbone, "classes", None)
    if classes is not None and known is not None and classes != known:
        raise RecipeError(f"[backbone] is made for {known} classes, and [data] has {classes}; set classes = {classes}")
    if recipe.teacher.guidance.embedded is not None and not getattr(backbone, "embeds_guidance", False):
        raise RecipeError(
            f'[teacher.guidance] embedded is for networks that take their guidance as a condition, and a "'
            f'{recipe.backbone["name"]}" takes none; use scale'
        )
    resolved = as_table(recipe)
    resolved["data"] = {"name": recipe.data["name"], **as_table(data)}
    resolved["backbone"] = {"name": recipe.backbone["name"], **as_table(backbone)}
    out = recipe.run.out or Path("runs") / name
    if recipe.teacher.training is None:
        return Plan(recipe, data, backbone, out, resolved, "")
    architecture = {key: value for key, value in resolved["backbone"].items() if key not in ("head", "weights")}
    teacher = {key: resolved["teacher"][key] for key in ("seed", "label_dropout", "shift")}
    training = {key: value for key, value in resolved["teacher"]["training"].items() if key not in TOLD}
    source = {key: value for key, value in resolved["data"].items() if key not in ("samples", "best_of")}
    precision = {"precision": recipe.engine.precision}
    teacher_hash = section_hash(source, architecture, teacher, training, precision)
    return Plan(recipe, data, backbone, out, resolved, teacher_hash)


def plan_of(run: Path) -> Plan:
    """The plan of a run that is there, from the recipe in its folder.

    `ValueError` for a recipe that cannot be read, `RecipeError` for one that cannot be had.
    """
    path = run / "recipe.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return replace(plan(table, run.name), out=run)


def shrunk(recipe: Recipe, backbone: Backbone) -> tuple[Recipe, Backbone]:
    """The same job at a size that shows nothing but that everything runs: what `--tiny` does to a recipe.

    `RecipeError` for a backbone that has no tiny form.
    """
    name = recipe.backbone["name"]
    if not isinstance(backbone, Shrinkable):
        raise RecipeError(f'[backbone] name = "{name}" has no tiny form; leave --tiny out')
    try:
        small = backbone.tiny()
    except ValueError as error:
        raise RecipeError(f"--tiny: {error}") from None
    flow_maps = {
        key: replace(section, objective=_without_waiting(section.objective))
        for key, section in recipe.flow_maps.items()
    }
    training = replace(
        recipe.training,
        steps=min(recipe.training.steps, 4),
        batch=8 if flow_maps else 4,  # of which some predict and some correct
        accumulation=1 if flow_maps else min(recipe.training.accumulation, 2),
        checkpoint_every=2,
        log_every=1,
        sheet_every=4,
        sheet_images=2,
    )
    teacher = replace(recipe.teacher, reference_steps=min(recipe.teacher.reference_steps, 4))
    table = {"name": name, **as_table(small)}
    small_recipe = replace(
        recipe, data=backbone.stub, backbone=table, training=training, teacher=teacher, flow_maps=flow_maps
    )
    return small_recipe, small


def _without_waiting(objective: FreeFlow) -> FreeFlow:
    """All of it at work within a few steps."""
    prediction = replace(objective.prediction, warmup=min(objective.prediction.warmup, 1))
    return replace(objective, prediction=prediction, delay=1, correction_warmup=1)


def _check_teacher(recipe: Recipe, backbone: Backbone) -> None:
    pretrained, training = getattr(backbone, "pretrained", False), recipe.teacher.training
    if not pretrained and training is None:
        raise RecipeError(
            f'[teacher] has no training, and the backbone "{recipe.backbone["name"]}" no weights; '
            "add [teacher.training], or name weights under [backbone]"
        )
    if pretrained and training is not None:
        raise RecipeError(
            f'[teacher.training] and the weights of the backbone "{recipe.backbone["name"]}" exclude each other; '
            "leave one of them out"
        )


def _check_flow_maps(recipe: Recipe, backbone: Backbone, data: Data) -> None:
    teacher = recipe.teacher
    for name, section in recipe.flow_maps.items():
        if not isinstance(backbone, Mappable) or getattr(data, "classes", None) is None:
            raise RecipeError(
                f'[flow_maps.{name}] is for a class-conditional backbone with flow maps, such as "dit", and data with '
                f'classes; "{recipe.backbone["name"]}" and "{recipe.data["name"]}" are not; use [students.{name}]'
            )
        until, start = section.objective.guided_until, teacher.guidance.low
        if until is not None and until < start:
            raise RecipeError(
                f"[flow_maps.{name}.objective] guided_until {until:g} and [teacher.guidance] low {start:g} leave no t "
                "at which guidance acts; change one of them"
            )
        if section.objective.guidance is None:
            continue
        low, high = section.objective.guidance
        if not low <= teacher.guidance.scale <= high:
            raise RecipeError(
                f"[flow_maps.{name}.objective] guidance is [{low:g}, {high:g}], and [teacher.guidance] scale "
                f"{teacher.guidance.scale:g}, with which it is compared, lies outside; change one of them"
            )
        if teacher.training is not None and teacher.label_dropout == 0:
            raise RecipeError(f"[flow_maps.{name}.objective] guidance needs [teacher] label_dropout above 0")


def _plugin(group: str, table: Mapping[str, object], section: str | None = None) -> object:
    section = section or group
    rest = dict(table)
    name = rest.pop("name", None)
    found = {entry.name: entry for entry in entry_points(group=f"pitools.{group}")}
    if not isinstance(name, str) or name not in found:
        known = ", ".join(sorted(found)) or "none are installed"
        raise RecipeError(f'[{section}] needs name = "..." of an installed one ({known}), got {name!r}')
    try:
        cls = found[name].load()
    except ImportError as error:
        raise RecipeError(f'[{section}] name = "{name}": {error}; run `pip install "pitools[scale]"`') from error
    return parse(cls, rest, section)


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Sequence[str]:
    """The dotted names of the values in which two tables differ."""
    names: list[str] = []
    for key in sorted({*old, *new}):
        a, b, path = old.get(key), new.get(key), f"{where}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += changed_keys(a, b, f"{path}.")
        elif a != b:
            names.append(path)
    return names
