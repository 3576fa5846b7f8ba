"""The dry run's estimate of memory, against what PyTorch's allocator reports of training runs on the CPU.

Networks are small, and latents large enough for activations to outweigh the weights. An estimate lies within `BAND` of
the peak that was measured, and within twice that where lengths of paths are drawn. What is measured is all that the
loop does, from building the networks on.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import scale.backbone
from pitools.guidance import Teacher, frozen
from pitools.policies import GMHead
from pitools.training import keyed_generator
from pitools.training.dry_run import describe, estimate
from pitools.training.engine import Engine
from pitools.training.jobs import Distillation
from pitools.training.loop import train
from pitools.training.memory import Live, Memory, plain_bytes, state_bytes, weight_bytes
from pitools.training.optimiser import Optimiser, build_optimiser
from pitools.training.recipe import Plan, plan
from pitools.training.students import build_student, members
from scale.backbone import Flux, Flux2, QwenImage, TextToImage
from scale.dit import DiT
from scale.quantise import Quantisation

BAND = 0.05
MIB = 2**20

WIDE: dict[str, Any] = {
    "num_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": scale.backbone.TINY_TEXT,
    "axes_dims_rope": (16, 24, 24),
}
SINGLE = {"num_layers": 1, "num_single_layers": 1}
SIZES: dict[type[TextToImage], dict[str, Any]] = {
    QwenImage: WIDE,
    Flux: {**WIDE, **SINGLE, "guidance_embeds": True, "pooled_projection_dim": scale.backbone.TINY_TEXT},
    Flux2: {**WIDE, **SINGLE, "axes_dims_rope": (16, 16, 16, 16)},
}
TOKENS = {"qwen": 3, "flux": 6}
"""How long the first stub prompt is."""

OBJECTIVE = {"window": 3 / 128, "dropout": 0.1}
GM = {"policy": "gm", "components": 8, "nfe": [4], "shift": 3.2, "final_step_scale": 0.5, "objective": OBJECTIVE}
DX = {**GM, "policy": "dx", "objective": {"window": 3 / 128}}
MIXING = {**GM, "objective": {**OBJECTIVE, "states": 4, "teacher_ratio": 1.0, "decay_steps": 1000}}
BF16 = {"precision": "bf16", "gradient_checkpointing": True}
DIGITS: dict[str, Any] = {
    "data": {"name": "digits"},
    "backbone": {"name": "dit", "channels": 1, "size": 8, "layers": 4, "heads": 4, "head_width": 32, "classes": 10},
    "teacher": {"guidance": {"scale": 2.0}, "training": {"steps": 1, "batch": 2}},
    "students": {"gm": {"policy": "gm", "nfe": [4], "objective": {"step_size": 1 / 24}}},
    "training": {"steps": 2, "batch": 64},
    "engine": {"device": "cpu", "tensorboard": False},
}


def recipe(
    backbone: str = "qwen",
    student: dict[str, Any] = GM,
    training: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    dtype: str = "float32",
    size: int = 32,
) -> Plan:
    """A recipe for a student on a random transformer, on latents of `size` x `size`."""
    table = {
        "data": {"name": "stub-prompts", "backbone": backbone, "height": 8 * size, "width": 8 * size, "samples": 1},
        "backbone": {
            "name": backbone,
            "weights": "tiny",
            "dtype": dtype,
            "lora": {"rank": 16},
            "head": {"log_std_width": 64},
        },
        "teacher": {"guidance": {"scale": 4.0} if backbone == "qwen" else {"embedded": 3.5}},
        "students": {"a": student},
        "training": {"steps": 2, "batch": 2, **(training or {})},
        "engine": {"device": "cpu", "tensorboard": False, **(engine or {})},
    }
    return plan(table, "recipe")


def estimated(made: Plan) -> Memory:
    (member,) = members(made)
    backbone: Any = made.backbone
    teacher = frozen(backbone.outline())
    student = build_student(made, member, teacher)
    return estimate(made, member, student, teacher, getattr(backbone, "stored_bytes", plain_bytes))


def measured(made: Plan, folder: Path) -> int:
    """The most that the allocator had given out at once, since before the networks were built."""
    (member,) = members(made)
    engine = Engine(made.recipe.engine)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        network = frozen(made.backbone.teacher(keyed_generator(0, "teacher")))
        teacher = Teacher(partial(engine.call, network), made.recipe.teacher.guidance, made.data.null_conditions)
        student = build_student(made, member, network)
        job = Distillation(student, teacher, member.section.objective)
        console = Console(quiet=True)
        train(job, made.recipe.training, made.data, engine, seed=0, folder=folder, name="a", console=console)
    events = seen.profiler.kineto_results.events()
    given = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, size in given:
        now += size
        most = max(most, now)
    return most


CASES: dict[str, dict[str, Any]] = {
    "a mixture": {},
    "a grid, recomputed under autocast": {"student": DX, "engine": BF16},
    "a bf16 base, accumulated, 8-bit states": {
        "engine": BF16,
        "dtype": "bf16",
        "training": {"batch": 4, "accumulation": 2, "optimiser": {"name": "adamw8bit"}},
    },
    "FLUX, data-free": {
        "backbone": "flux",
        "student": {**GM, "nfe": [2], "objective": {**OBJECTIVE, "data_free": True}},
    },
    "FLUX, steps of the teacher": {
        "backbone": "flux",
        "student": MIXING,
        "training": {"steps": 6, "batch": 4},
        "engine": {"gradient_checkpointing": True},
        "size": 16,
    },
}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny transformers are of a size at which their parts show."""
    for cls, sizes in SIZES.items():
        monkeypatch.setattr(cls, "sizes", sizes)


@pytest.mark.parametrize("given", CASES.values(), ids=CASES)
def test_the_estimate_is_what_training_takes(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale.backbone, "TEXT_TOKENS", TOKENS[given.get("backbone", "qwen")])
    made = recipe(**given)
    told = estimated(made)
    assert told.network + told.policy > 0.8 * told.weights
    drawn = made.recipe.students["a"].objective.teacher_ratio > 0
    assert told.total == pytest.approx(measured(made, tmp_path), rel=BAND * (1 + drawn))


def test_the_estimate_is_what_training_all_of_a_dit_takes(tmp_path: Path) -> None:
    made = plan(DIGITS, "digits")
    assert estimated(made).total == pytest.approx(measured(made, tmp_path), rel=BAND)


def small(**sections: dict[str, Any]) -> Plan:
    """The digits' recipe with a DiT of one layer, and keys changed."""
    given = {"backbone": {"layers": 1}, "training": {"batch": 4}, **sections}
    return plan({**DIGITS, **{name: {**DIGITS[name], **table} for name, table in given.items()}}, "digits")


def test_a_network_without_an_outline_is_described_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    made = small(students={"dx": {"policy": "dx", "grid_points": 4, "nfe": [1, 2]}})
    told = describe(made)
    assert told.count("MiB at once") == 3
    monkeypatch.delattr(DiT, "outline")
    assert describe(made) == told


def test_averages_on_the_cpu_take_none_of_a_gpus_memory() -> None:
    own, cpu, same = (
        estimated(small(training={"ema_device": place}, engine={"device": device})).training
        for device, place in (("auto", "own"), ("auto", "cpu"), ("cpu", "cpu"))
    )
    assert own == same == 4 * (own - cpu)  # gradients, two moments and averages, all in float32


def test_what_the_teacher_and_the_student_share_counts_once() -> None:
    backbone = QwenImage().tiny()
    base = backbone.teacher(keyed_generator(0, "teacher"))
    alone = weight_bytes([base], plain_bytes)
    assert alone == sum(value.numel() * 4 for value in base.parameters())
    student = backbone.student(base, GMHead(8), keyed_generator(1, "student"))
    trained = sum(value.numel() * 4 for value in student.parameters() if value.requires_grad)
    assert weight_bytes([base, student], plain_bytes) == alone + trained
    assert weight_bytes([nn.Linear(2, 3), nn.Linear(2, 3)], plain_bytes) == 2 * 4 * 9


@pytest.mark.parametrize("kind", ["none", "nf4", "int8", "fp8"])
@pytest.mark.parametrize("section", [QwenImage, Flux, Flux2])
def test_quantised_weights_take_what_is_told_of_the_whole_ones(
    section: type[TextToImage], kind: Quantisation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(section, "sizes", {**SIZES[section], "num_attention_heads": 8})
    backbone = replace(section("tiny"), dtype="bf16", quantise=kind)
    real = sum(map(_stored, backbone.teacher(keyed_generator(0, "teacher")).parameters()))
    assert weight_bytes([frozen(backbone.outline())], backbone.stored_bytes) == pytest.approx(real, rel=0.01)


def _stored(value: Any) -> int:
    """Bytes of a parameter and of the scales that bitsandbytes keeps beside it."""
    state, scales = getattr(value, "quant_state", None), [getattr(value, "SCB", None)]
    while state is not None:
        scales += [state.absmax, state.code, state.offset]
        state = state.state2
    return plain_bytes("", value) + sum(plain_bytes("", scale) for scale in scales if isinstance(scale, Tensor))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_the_state_of_an_optimiser_is_as_large_as_told(name: Any) -> None:
    section = Optimiser(name=name)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in [(70, 100), (64, 64), (63, 65), (1000,)]]
    optimiser = build_optimiser(section, parameters, sharded=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    for parameter in parameters:
        state = optimiser.state[parameter]
        kept = [value for key, value in state.items() if isinstance(value, Tensor) and "qmap" not in key]
        assert state_bytes(section, parameter) == sum(plain_bytes("", value) for value in kept if value.numel() > 1)


def test_live_tensors_are_counted_once_and_until_they_die() -> None:
    known = torch.zeros(1000)
    with Live([known]) as live:
        made = torch.zeros(256)
        part = made[:16].view(4, 4)
        known.add_(1)
        assert (live.now, live.most) == (1024, 1024)
        del made
        assert live.now == 1024  # the view keeps its memory
        other = part + 1
        del part
        assert (live.now, live.most) == (64, 1088)
        assert live.restart() == 64
        del other
        assert (live.now, live.most) == (0, 64)
