"""Adapted backbones on two real processes, by DDP and by FSDP2: they train as on one.

The shipped recipes as they are, but for tiny transformers, stub data and few steps; some with AdamW in the place of
their 8-bit one, whose moments turn differences in a sum's last bits into steps of 1/256, and so cannot be followed to
1e-4 in the weights.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from processes import Ended, assert_same_course, assert_same_weights, cut, log, several
from safetensors.torch import load_file

import scale
from pitools.training.config import read_recipe, to_toml
from scale.backbone import QwenImage

# The quick suite has tests/training/test_distributed.py.
pytestmark = pytest.mark.slow

STEPS, CUT = 4, 2
STUDENT = "gm-4nfe"
HAS_4BIT = find_spec("bitsandbytes") is not None

EIGHT = {"engine.precision": "float32", "backbone.dtype": "float32", "backbone.lora.dropout": 0.0}
PLAIN = {**EIGHT, "training.optimiser.name": "adamw"}
"""Where a process's rows come in batches of another size, no more than rounding in float32 may differ."""

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    # Sheets call student and teacher in the midst of training, with other weights.
    "data": ("qwen", {**PLAIN, "engine.gradient_checkpointing": False, "training.sheet_every": 1}),
    "free": ("qwen-datafree", {**EIGHT, "engine.gradient_checkpointing": False}),
    "flux": ("flux-gm-4nfe", PLAIN),
    "dropout": ("qwen", {**PLAIN, "backbone.lora.dropout": 0.5}),
    "shipped": ("qwen", {}),
    "nf4": ("qwen-nf4", {"backbone.dtype": "float32", "engine.precision": "float32"}),
    "saved": ("qwen", {**PLAIN, "backbone.weights": "saved", "students.gm.nfe": [2, 4]}),
}
"""Name of a run, the recipe that it starts from, and what else is changed in it."""

SHARED = ("data", "free", "flux")
"""What runs with either way of sharing; the others, with FSDP2 alone."""

SHARDED = ("dropout", "shipped", "saved", *(("nf4",) if HAS_4BIT else ()))


def write(path: Path, recipe: str, changes: dict[str, Any]) -> None:
    """A recipe of a tiny transformer that starts from a shipped one."""
    table = read_recipe(Path(scale.__file__).parent / f"{recipe}.toml")
    table["data"] = {"name": "stub-prompts", "backbone": table["backbone"]["name"], "samples": 6}
    tiny = {"backbone.weights": "tiny", "backbone.lora.rank": 4, "backbone.head.log_std_width": 16}
    tiny |= {"teacher.reference_steps": 2, "engine.tensorboard": False, "engine.device": "cpu"}
    training = {"steps": STEPS, "batch": 4, "accumulation": 2, "checkpoint_every": CUT, "log_every": 1}
    training |= {"sheet_every": 2, "sheet_images": 3}
    # With the usual eps, Adam's first steps are full ones along gradients that are rounding alone.
    training |= {"optimiser.learning_rate": 1e-3, "optimiser.warmup_steps": 0, "optimiser.eps": 1e-6}
    for name, value in (tiny | {f"training.{key}": value for key, value in training.items()} | changes).items():
        *sections, key = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = value
    path.write_text(to_toml(table), encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes and a saved transformer; in it, a folder for each way of running them."""
    folder = tmp_path_factory.mktemp("backbones")
    for name, (recipe, changes) in RECIPES.items():
        write(folder / f"{name}.toml", recipe, changes)
    torch.manual_seed(0)
    QwenImageTransformer2DModel(**QwenImage.sizes).save_pretrained(folder / "saved" / "transformer")
    return folder


def run(name: str, where: str, *more: str) -> tuple[str, ...]:
    """The arguments of a run `name` in the folder `where`."""
    return f"{name}.toml", f"run.out={where}/{name}", *more


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """The runs on one process."""
    runs = [run(name, "one") for name in (*SHARED, "saved")]
    # A row in each pass, as on two processes: then dropout, bf16 and what is quantised agree, too.
    runs += [run(name, "one", "training.accumulation=4") for name in SHARDED if name != "saved"]
    result = several(root, 1, *runs)
    assert result.codes() == [0] * len(runs), result.err
    return root / "one"


@pytest.fixture(scope="module")
def two(root: Path, one: Path) -> Ended:
    """The runs on two processes, and one that goes on from one process's; the last command is refused."""
    cut(one / "data", root / "one-two" / "data", STEPS)
    runs = [run(name, parallel, f"engine.parallel={parallel}") for parallel in ("ddp", "fsdp2") for name in SHARED]
    runs += [run(name, "fsdp2", "engine.parallel=fsdp2") for name in SHARDED]
    runs.append(run("data", "one-two", "engine.parallel=fsdp2"))
    refused = run("saved", "refused", "engine.parallel=fsdp2", "backbone.quantise=int8")
    result = several(root, 2, *runs, refused)
    assert result.codes()[:-1] == [0] * len(runs), result.err
    return result


@pytest.fixture(scope="module")
def resumed(root: Path, two: Ended) -> Ended:
    """The runs on one process that go on from two processes'."""
    runs = []
    for parallel in ("ddp", "fsdp2"):
        for name in SHARED:
            cut(root / parallel / name, root / f"{parallel}-one" / name, STEPS)
            runs.append(run(name, f"{parallel}-one"))
    result = several(root, 1, *runs)
    assert result.codes() == [0] * len(runs), result.err
    return result


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_as_one(root: Path, one: Path, two: Ended, name: str, parallel: str) -> None:
    student = root / parallel / name / STUDENT
    assert_same_course(student, one / name / STUDENT, 1, STEPS)
    if name != "free":
        assert_same_weights(student, one / name / STUDENT)


def test_the_shipped_optimisers_states_are_of_8_bits(root: Path, two: Ended) -> None:
    for parallel in ("ddp", "fsdp2"):
        path = root / parallel / "free" / STUDENT / "checkpoints" / f"step-{STEPS:08d}" / "optimiser.safetensors"
        assert torch.uint8 in {value.dtype for value in load_file(path).values()}


def test_sheets_are_those_of_one_process_and_change_nothing(root: Path, one: Path, two: Ended) -> None:
    # They are drawn one image at a time on two processes, and two at a time on one.
    for parallel in ("ddp", "fsdp2"):
        sheets = sorted((root / parallel / "data" / STUDENT / "samples").iterdir())
        assert len(sheets) == STEPS
    pixels = [_pixels(root / way / "data" / STUDENT / "samples" / "step-000002.png") for way in ("one", "ddp", "fsdp2")]
    for other in pixels[1:]:
        assert (pixels[0] - other).abs().max() <= 1
    assert pixels[0].unique().numel() > 50


def _pixels(path: Path) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path), dtype=np.int16))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", SHARED)
def test_one_process_goes_on_from_two(root: Path, one: Path, resumed: Ended, name: str, parallel: str) -> None:
    student = root / f"{parallel}-one" / name / STUDENT
    assert_same_course(student, one / name / STUDENT, CUT + 1, STEPS)
    if name != "free":
        assert_same_weights(student, one / name / STUDENT)
    assert resumed.out.count("Going on from") == 2 * len(SHARED)


def test_two_processes_go_on_from_one(root: Path, one: Path, two: Ended) -> None:
    student = root / "one-two" / "data" / STUDENT
    assert_same_course(student, one / "data" / STUDENT, CUT + 1, STEPS)
    assert_same_weights(student, one / "data" / STUDENT)


def test_dropout_is_that_of_a_pass_with_the_same_rows(root: Path, one: Path, two: Ended) -> None:
    student = root / "fsdp2" / "dropout" / STUDENT
    assert_same_course(student, one / "dropout" / STUDENT, 1, STEPS)
    assert_same_weights(student, one / "dropout" / STUDENT)
    without = log(root / "fsdp2" / "data" / STUDENT)
    assert log(student)[-1]["loss"] != pytest.approx(without[-1]["loss"], rel=1e-3)


def test_a_bf16_base_under_float32_adapters(root: Path, one: Path, two: Ended) -> None:
    student = root / "fsdp2" / "shipped" / STUDENT
    lines, expected = log(student), log(one / "shipped" / STUDENT)
    assert lines[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
    assert lines[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-3)
    # The gradient of the time embedding is a sum over the blocks, in bf16, and FSDP2 sums within each block first.
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-2)
    weights = load_file(student / "student.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.skipif(not HAS_4BIT, reason="needs bitsandbytes")
def test_a_quantised_base_is_sharded(root: Path, one: Path, two: Ended) -> None:
    student = root / "fsdp2" / "nf4" / STUDENT
    assert_same_course(student, one / "nf4" / STUDENT, 1, STEPS)
    assert_same_weights(student, one / "nf4" / STUDENT)


@pytest.mark.parametrize("student", ["gm-2nfe", "gm-4nfe"])
def test_saved_weights_are_read_as_they_are_sharded_for_each_student(
    root: Path, one: Path, two: Ended, student: str
) -> None:
    run = root / "fsdp2" / "saved" / student
    assert_same_course(run, one / "saved" / student, 1, STEPS)
    assert_same_weights(run, one / "saved" / student)


def test_a_base_of_8_bits_is_refused_before_anything_is_written(root: Path, two: Ended) -> None:
    assert [two.codes(rank)[-1] for rank in (0, 1)] == [2, 2]
    assert two.err.count('Error: [backbone] quantise = "int8" cannot be sharded; use "nf4", or parallel') == 2
    assert not (root / "refused").exists()
