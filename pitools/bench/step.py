"""A training step of the digits recipe, by the loop that trains it: what of it is the policy's, fused and plain.

    share = seconds in the policy's maths / seconds of the step        (pitools.training.clock)

Networks are as they start, which takes them as long as trained ones.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from pitools import kernels
from pitools.bench.parts import Case, Row, Settings

RECIPE, STUDENT = "toys/digits.toml", "gm"
BLOCK_ROUNDS = 2
"""Turns of each side, of `Settings.steps` steps and one more to warm up."""


class Skipped(Exception):  # noqa: N818
    """Why a row cannot be measured here."""


def training(settings: Settings) -> list[Case]:
    """One step for each NFE that the recipe trains its GM student for."""
    return [Case(f"digits, {nfe} NFE", partial(_step, settings, nfe)) for nfe in (1, 2, 4)]


def _step(settings: Settings, nfe: int) -> Row:
    run, sizes, substeps = _digits(settings, nfe)
    lines: dict[str, list[dict[str, float]]] = {"plain": [], "fused": []}
    for _ in range(min(settings.rounds, BLOCK_ROUNDS)):
        for side, own in lines.items():
            with kernels.plain() if side == "plain" else nullcontext():
                own.extend(run()[1:])

    def of(key: str) -> dict[str, float]:
        return {side: median(line[key] for line in own) for side, own in lines.items()}

    seconds, policy = of("seconds_per_step"), of("policy_seconds")
    return Row(
        "training",
        f"digits, {nfe} NFE",
        sizes,
        substeps,
        "as in roll-outs",
        {side: 1e3 * value for side, value in seconds.items()},
        {"plain/fused": seconds["plain"] / seconds["fused"], "policy plain/fused": policy["plain"] / policy["fused"]},
        policy_milliseconds={side: 1e3 * value for side, value in policy.items()},
        policy_share=of("policy_share"),
    )


def _digits(settings: Settings, nfe: int) -> tuple[Callable[[], list[dict[str, float]]], dict[str, int], int]:
    """What trains a fresh student for some steps and gives the lines of its log; its sizes B, L, K, C; the substeps."""
    from pitools.guidance import Teacher, frozen
    from pitools.policies import GMHead
    from pitools.training.config import RecipeError, find_recipe, override, read_recipe
    from pitools.training.engine import Engine, EngineSection
    from pitools.training.jobs import Distillation
    from pitools.training.loop import train
    from pitools.training.random import keyed_generator
    from pitools.training.recipe import plan
    from pitools.training.students import Member, build_student

    try:
        changes = [f"students.{STUDENT}.nfe=[{nfe}]"] + ([f"training.batch={settings.batch}"] if settings.batch else [])
        planned = plan(override(read_recipe(find_recipe(RECIPE, ["toys"])), changes), "digits")
        engine = Engine(EngineSection(device="cuda" if settings.device.type == "cuda" else "cpu", tensorboard=False))
    except (RecipeError, ImportError) as error:
        raise Skipped(str(error)) from None
    recipe, section = planned.recipe, planned.recipe.students[STUDENT]
    network = engine.place(frozen(planned.backbone.teacher(keyed_generator(0, "teacher weights"))))
    teacher = Teacher(partial(engine.call, network), recipe.teacher.guidance, planned.data.null_conditions)
    member = Member(STUDENT, section, nfe, planned.out)
    steps = replace(
        recipe.training, steps=settings.steps + 1, log_every=1, sheet_every=0, checkpoint_every=settings.steps + 1
    )

    def run() -> list[dict[str, float]]:
        student = build_student(planned, member, network)
        with tempfile.TemporaryDirectory() as folder:
            train(
                Distillation(student, teacher, section.objective),
                steps,
                planned.data,
                engine,
                seed=0,
                folder=Path(folder),
                name="bench",
                console=Console(quiet=True),
            )
            return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]

    factors, channels = planned.backbone.factorisation.pack(torch.zeros(1, *planned.data.shape)).shape[1:]
    components = section.head.components if isinstance(section.head, GMHead) else 1
    sizes = {"B": recipe.training.batch, "L": factors, "K": components, "C": channels}
    return run, sizes, max(1, round(1 / nfe / section.objective.step_size))
