"""The shipped recipes, against the columns of the paper's Tables 8 and 9 and what else is known of their training."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pitools.objectives.flow_map import Prediction, Times
from pitools.objectives.free_flow import FreeFlow
from pitools.sampling import auto_temperature
from pitools.training.config import parse, read_recipe
from pitools.training.jobs import Auxiliary
from pitools.training.optimiser import Optimiser
from pitools.training.recipe import Recipe, StudentSection, changed_keys, plan

SCALE = Path(__file__).parents[2] / "scale"
SHIPPED = sorted(path.stem for path in SCALE.glob("*.toml"))
FREE_FLOW = "dit-freeflow"
PI_FLOW = [name for name in SHIPPED if name != FREE_FLOW]


class Column(NamedTuple):
    """A column of a table. size: K or N.  window: in 128ths of raw time.  interval: where guidance acts, from t = 0."""

    policy: str
    size: int
    nfe: int
    dropout: float
    temperature: float
    states: int
    window: float
    shift: float
    final_step: float
    guidance: float
    interval: float
    rate: float
    batch: int
    steps: int
    decay: int
    gamma: float


def imagenet(
    policy: str, size: int, nfe: int, dropout: float, window: float, guidance: float, interval: float, steps: int
) -> Column:
    """A column of Table 8, with what all of them share."""
    return Column(policy, size, nfe, dropout, 1.0, 2, window, 1.0, 1.0, guidance, interval, 5e-5, 4096, steps, 0, 7.0)


TABLE_8 = {  # where it has no number of iterations, Table 1 has 40K
    "dit-gm-fm-k32": imagenet("gm", 32, 1, 0.05, 0, 2.7, 0.6, 140_000),
    "dit-gm-repa-k8": imagenet("gm", 8, 1, 0.05, 0, 3.2, 0.7, 40_000),
    "dit-gm-repa-k32": imagenet("gm", 32, 1, 0.05, 0, 3.2, 0.7, 140_000),
    "dit-dx-repa-n10": imagenet("dx", 10, 1, 0.0, 10, 3.2, 0.7, 40_000),
    "dit-dx-repa-n20": imagenet("dx", 20, 1, 0.0, 5, 3.2, 0.7, 40_000),
    "dit-dx-repa-n40": imagenet("dx", 40, 1, 0.0, 3, 3.2, 0.7, 40_000),
    "dit-gm-repa-k32-2nfe": imagenet("gm", 32, 2, 0.05, 0, 2.8, 0.7, 24_000),
}

TABLE_9 = {
    "flux-gm-4nfe": Column("gm", 8, 4, 0.1, 0.3, 4, 3, 3.2, 0.5, 3.5, 1.0, 1e-4, 256, 3000, 2000, 7.0),
    "qwen": Column("gm", 8, 4, 0.1, 0.3, 2, 3, 3.2, 0.5, 4.0, 1.0, 1e-4, 256, 9000, 0, 7.0),
    "flux-dx-4nfe": Column("dx", 10, 4, 0.0, 1.0, 4, 3, 3.2, 0.5, 3.5, 1.0, 1e-4, 256, 3000, 2000, 7.0),
    "qwen-dx": Column("dx", 10, 4, 0.0, 1.0, 2, 3, 3.2, 0.5, 4.0, 1.0, 1e-4, 256, 9000, 0, 7.0),
    "flux-gm-8nfe": Column("gm", 8, 8, 0.1, 0.7, 4, 3, 3.2, 0.5, 3.5, 1.0, 1e-4, 256, 3000, 2000, 7.0),
}

QUANTISED = {"backbone.quantise": "nf4", "engine.parallel": None, "training.batch": 16}
DATA_FREE = {"students.gm.objective.data_free": True, "training.batch": 64, "training.accumulation": 4}

# What has no column, as the one it follows and all that is not as there; None is the default.
RELATED: dict[str, tuple[str, dict[str, Any]]] = {
    "flux-dx-8nfe": ("flux-dx-4nfe", {"students.dx.nfe": [8]}),
    "flux-datafree": ("flux-gm-4nfe", DATA_FREE | {"data.folder": "caches/flux-prompts"}),
    "flux-nf4": (
        "flux-gm-4nfe",
        QUANTISED | {"students.gm.objective.decay_steps": 6000, "training.steps": 9000},
    ),
    "flux2": (
        "flux-gm-4nfe",
        {
            "data.folder": "caches/flux2",
            "data.channels": 32,
            "backbone.name": "flux2",
            "backbone.weights": "black-forest-labs/FLUX.2-dev",
            "teacher.guidance.embedded": 4.0,
        },
    ),
    "qwen-datafree": ("qwen", DATA_FREE | {"data.folder": "caches/qwen-prompts"}),
    "qwen-nf4": ("qwen", QUANTISED),
}


def table(name: str) -> dict[str, Any]:
    return read_recipe(SCALE / f"{name}.toml")


def recipe(name: str) -> Recipe:
    return parse(Recipe, table(name))


def student(name: str) -> StudentSection:
    (section,) = recipe(name).students.values()
    return section


def column(name: str) -> Column:
    """What a recipe says of a column's rows."""
    read, section = recipe(name), student(name)
    objective, training, guidance = section.objective, read.training, read.teacher.guidance
    (nfe,) = section.nfe
    assert guidance.low == 0
    assert objective.teacher_ratio == (1.0 if objective.decay_steps else 0.0)
    return Column(
        section.policy,
        section.components if section.policy == "gm" else section.grid_points,
        nfe,
        objective.dropout,
        round(auto_temperature(nfe), 9) if section.temperature == "auto" else section.temperature,
        objective.states,
        objective.window * 128,
        section.shift,
        section.final_step_scale,
        guidance.scale if guidance.embedded is None else guidance.embedded,
        guidance.high,
        training.optimiser.learning_rate,
        training.batch,
        training.steps,
        objective.decay_steps,
        training.ema_gamma,
    )


def value(values: dict[str, Any], name: str) -> Any:
    """The value at a dotted name; None where there is none."""
    inner: Any = values
    for key in name.split("."):
        inner = inner.get(key) if isinstance(inner, dict) else None
    return inner


def test_every_shipped_recipe_is_known_here() -> None:
    assert sorted({*TABLE_8, *TABLE_9, *RELATED, "qwen-polynomial", FREE_FLOW}) == SHIPPED


@pytest.mark.parametrize(("name", "wanted"), [*TABLE_8.items(), *TABLE_9.items()])
def test_a_recipe_is_its_column(name: str, wanted: Column) -> None:
    assert column(name) == wanted


@pytest.mark.parametrize("name", RELATED)
def test_a_recipe_without_a_column_differs_from_its_relative_in_this_alone(name: str) -> None:
    relative, differences = RELATED[name]
    own, other = table(name), table(relative)
    assert {key: value(own, key) for key in changed_keys(own, other)} == differences


def test_the_polynomial_is_trained_as_the_grid_of_as_many_points() -> None:
    polynomial, grid = table("qwen-polynomial"), table("qwen-dx")
    assert polynomial["students"].pop("polynomial") == {**grid["students"].pop("dx"), "policy": "polynomial"}
    assert changed_keys(polynomial, grid) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_is_planned(name: str) -> None:
    planned = plan(table(name), name)
    assert planned.out == Path("runs") / name
    assert planned.teacher_hash == ""  # no teacher is trained
    assert plan(planned.table, name).table == planned.table  # nothing is left to fill in
    if name in PI_FLOW:
        assert list(planned.recipe.students) == [student(name).policy]  # its folder tells what is in it


def test_freeflow_is_its_column_of_table_6() -> None:
    read = recipe(FREE_FLOW)
    (section,) = read.flow_maps.values()
    assert section.objective == FreeFlow(
        Prediction(steps=8, solver="heun", delta=Times(-0.4, 1.2, at_zero=0.1), power=1.0, warmup=10_000),
        share=0.75,
        r=Times(0.8, 1.6),
        alpha=0.6,
        delay=10_000,
        correction_warmup=10_000,
        decay=25_000,
        guidance=(1.0, 2.0),
        guided_until=0.3,
    )
    adam = Optimiser(betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, warmup_steps=0, decay="constant", clip=0.0)
    assert section.auxiliary == Auxiliary(optimiser=replace(adam, learning_rate=1e-4))
    training = read.training
    assert training.optimiser == replace(adam, learning_rate=3e-5)
    assert (training.steps, training.batch) == (1_500_000, 256)
    assert (training.ema_gamma + 1) / training.steps == pytest.approx(1 - 0.9999)
    assert plan(table(FREE_FLOW), FREE_FLOW).data.shape == (4, 32, 32)


@pytest.mark.parametrize("name", PI_FLOW)
def test_the_official_code_fills_in_what_the_tables_leave_open(name: str) -> None:
    read, objective = recipe(name), student(name).objective
    dit = name.startswith("dit")
    assert objective.step_size == 1 / 128
    assert objective.floor == 0
    assert objective.loss_scale == 2 * (3 if dit else 30)  # of half a mean square
    assert read.training.optimiser == Optimiser(
        name="adamw8bit",
        learning_rate=read.training.optimiser.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        warmup_steps=400 if dit else 100,
        decay="constant",
        clip=50.0,
    )
    assert read.engine.precision == "bf16"
    if not dit:
        assert read.backbone["lora"] == {"rank": 256, "dropout": 0.05}


@pytest.mark.parametrize("name", SHIPPED)
def test_guidance_is_embedded_where_the_teacher_was_distilled_from_it(name: str) -> None:
    guidance = recipe(name).teacher.guidance
    assert (guidance.embedded is not None) == name.startswith("flux")
    assert (guidance.scale != 1) == (guidance.embedded is None)


@pytest.mark.parametrize("name", PI_FLOW)
def test_the_batch_divides_among_the_gpus_that_the_command_starts(name: str) -> None:
    text = (SCALE / f"{name}.toml").read_text()
    (found,) = re.findall(rf"^#   (.*)pitools distill scale/{name}\.toml$", text, flags=re.MULTILINE)
    processes = re.search(r"--nproc_per_node (\d+)", found)
    training, engine = recipe(name).training, recipe(name).engine
    images = training.batch / training.accumulation / (int(processes[1]) if processes else 1)
    assert images == (512 if name.startswith("dit") else 2 if processes else 1)
    assert engine.gradient_checkpointing
