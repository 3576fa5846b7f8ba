"""Runs of the whole command that train a flow map: what they write, and that they hold what other students' do."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import Commands
from recipes import flow_map, write
from safetensors.torch import load_file
from test_resume import STEP, Folder, assert_ends_as, one_error

from pitools.training.config import RecipeError
from pitools.training.distillation import check_data, check_engine
from pitools.training.dry_run import describe
from pitools.training.engine import Engine, EngineSection
from pitools.training.recipe import plan

RECIPE = flow_map(
    **{
        "teacher.training.log_every": 4,
        "training.checkpoint_every": 2,
        "training.log_every": 4,
        "training.sheet_every": 3,
    }
)
NETWORKS = ("", "auxiliary-")
UPDATES = 3
"""Of both networks, in a step."""


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture(scope="module")
def whole(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The run that is left alone."""
    folder = Folder(tmp_path_factory.mktemp("whole"), commands)
    write(folder.path / "recipe.toml", RECIPE)
    run = folder.run()
    assert run.code == 0, run.out + run.err
    assert "auxiliary" not in run.err
    return folder


@pytest.fixture
def taught(whole: Folder, tmp_path: Path) -> Folder:
    """A new run whose teacher is trained."""
    shutil.copy(whole.path / "recipe.toml", tmp_path)
    shutil.copytree(whole.path / "runs" / "teachers", tmp_path / "runs" / "teachers")
    return Folder(tmp_path, whole.commands)


def out(folder: Folder) -> Path:
    return folder.path / "runs" / "recipe" / "freeflow-1nfe"


def test_a_run_holds_both_networks_and_tells_of_both(whole: Folder) -> None:
    saved = out(whole) / "checkpoints" / "step-00000006"
    files = {
        "manifest.json",
        "ema.safetensors",
        *(f"{n}{k}.safetensors" for n in NETWORKS for k in ("model", "optimiser")),
    }
    assert {file.name for file in saved.iterdir()} == files
    student, auxiliary = (load_file(saved / f"{name}model.safetensors") for name in NETWORKS)
    assert {key.split(".")[1] for key in student if key.startswith("embeddings.")} == {"delta", "guidance"}
    assert {key.split(".")[1] for key in auxiliary if key.startswith("embeddings.")} == {"guidance"}
    shared = [key for key in auxiliary if key.startswith("transformer.") and student[key].dtype.is_floating_point]
    assert any(not torch.equal(student[key], auxiliary[key]) for key in shared)
    last = json.loads((out(whole) / "log.jsonl").read_text().splitlines()[-1])
    assert last["auxiliary_loss"] > 0.1  # of velocities of about unit size
    assert last["loss"] >= 0
    weights = load_file(out(whole) / "student.safetensors")
    assert weights.keys() == student.keys()
    assert len(list((out(whole) / "samples").glob("*.png"))) == 2


def test_it_is_compared_at_each_strength_of_guidance(whole: Folder) -> None:
    results = json.loads((out(whole).parent / "metrics.json").read_text())
    assert [(row["policy"], row["nfe"], row["guidance"]) for row in results["students"]] == [
        ("freeflow", 1, 2.0),
        ("freeflow", 1, 1.0),
    ]
    assert [row["guidance"] for row in results["teacher_with_guidance"]] == [1.0]
    assert [(row["policy"], row["nfe"], row["best_of"]) for row in results["teacher_searched"]] == [("freeflow", 1, 2)]
    assert all("endpoint_rmse" not in row for row in results["teacher_searched"])  # its noises are others
    assert all("score" in row for row in [results["teacher"], *results["students"], *results["teacher_searched"]])
    again = whole.run()
    assert "freeflow-1nfe is trained" in again.out
    for title in (
        "teacher, 4 steps",
        "teacher, 4 steps, γ = 1",
        "freeflow, 1 NFE, γ = 2",
        "freeflow, 1 NFE, γ = 1",
        "teacher, best of 2 by freeflow, 1 NFE",
    ):
        assert f"Comparing: {title}, 20/20 samples" in again.out
    assert "freeflow, γ = 1" in again.out.replace("\n", " ")


def test_no_image_is_read(taught: Folder, whole: Folder) -> None:
    """The data set is made to raise as soon as the teacher is there."""
    never = """
from toys.digits import DigitsData
def refuse(*_): raise AssertionError('an image was read')
DigitsData.batch = DigitsData.__len__ = refuse
"""
    assert_ends_as(whole, taught, never)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(
            STEP.format(call=2 * UPDATES + 1, action="die", after=True), id="after one of the auxiliary's updates"
        ),
        pytest.param(STEP.format(call=3 * UPDATES, action="die", after=False), id="between the two networks"),
        pytest.param(
            "at(os, 'fsync', 1, die, when=opened('checkpoints/.tmp-step-00000004/auxiliary-optimiser'))",
            id="between two files of a checkpoint",
        ),
    ],
)
def test_a_run_that_is_killed_ends_as_one_left_alone(how: str, whole: Folder, taught: Folder) -> None:
    assert taught.run(how).code == -9
    assert_ends_as(whole, taught)


def test_a_signal_saves_the_step_that_was_running(whole: Folder, taught: Folder) -> None:
    run = taught.run(STEP.format(call=UPDATES + 1, action="terminate", after=False))
    assert run.code == 143, run
    assert "freeflow-1nfe stopped at step 2 of 6, and saved" in run.out
    assert_ends_as(whole, taught)


@pytest.mark.parametrize("network", ["auxiliary", "student"])
def test_what_is_not_finite_reaches_neither_the_weights_nor_a_checkpoint(
    network: str, taught: Folder, whole: Folder
) -> None:
    job = {"auxiliary": "AuxiliaryTraining", "student": "FlowMapDistillation"}[network]
    spoil = f"""
import pitools.training.jobs as jobs
from dataclasses import replace
own = jobs.{job}.losses
def losses(self, network, step, batch, clock):
    for part in own(self, network, step, batch, clock):
        yield replace(part, loss=part.loss * float('nan')) if step == 3 else part
jobs.{job}.losses = losses
"""
    run = taught.run(spoil)
    assert run.code == 1
    where = (
        "freeflow-1nfe auxiliary, step 4, noising velocity"
        if network == "auxiliary"
        else "freeflow-1nfe, step 4, FreeFlow"
    )
    error = one_error(run)
    assert where in error
    assert "checkpoints/step-00000002" in error
    assert [path.name for path in (out(taught) / "checkpoints").iterdir()] == ["step-00000002"]
    assert_ends_as(whole, taught)


def test_a_dry_run_tells_of_both_networks() -> None:
    told = describe(plan(RECIPE, "recipe")).splitlines()[-1]
    assert told.startswith("# freeflow-1nfe: ")
    trained, beside = (int(word.replace(",", "")) for word in told.split() if word[0].isdigit() and "," in word)
    assert trained > beside > 50_000
    lora = describe(plan(flow_map(**{"flow_maps.freeflow.auxiliary.lora": 2}), "recipe")).splitlines()[-1]
    assert trained == int(lora.split()[2].replace(",", ""))
    assert lora != told


WRONG = {
    "flow_maps.freeflow.objective.share": (1.5, "share must lie in"),
    "flow_maps.freeflow.auxiliary.updates": (0, "updates must be a whole number of at least 1"),
    "flow_maps.freeflow.auxiliary.lora": (-1, "lora must be a whole number of at least 0"),
    "flow_maps.freeflow.strengths": ([3.0], r"strengths has 3, and objective.guidance trains those in \[1, 2\]"),
    "teacher.guidance.scale": (4.0, r"guidance is \[1, 2\], and \[teacher.guidance\] scale 4"),
    "teacher.label_dropout": (0.0, "label_dropout above 0"),
    "students.freeflow": ({"nfe": [1]}, "students and flow_maps both have 'freeflow'"),
    "flow_maps.freeflow.objective.prediction.solver": ("rk4", "solver must be"),
}


@pytest.mark.parametrize("key", WRONG)
def test_what_cannot_be_is_told_before_anything_is_written(key: str) -> None:
    value, message = WRONG[key]
    with pytest.raises(RecipeError, match=message):
        plan(flow_map(**{key: value}), "recipe")


def test_a_backbone_without_classes_is_refused() -> None:
    qwen = flow_map(data={"name": "stub-prompts"}, backbone={"name": "qwen", "weights": "tiny"})
    del qwen["teacher"]["training"]
    with pytest.raises(RecipeError, match=r'class-conditional backbone .* "qwen" and "stub-prompts" are not'):
        plan(qwen, "recipe")


def test_a_forward_pass_without_one_of_the_parts_is_refused() -> None:
    engine = Engine(EngineSection(device="cpu"))
    made = plan(flow_map(**{"training.accumulation": 4}), "recipe")
    with pytest.raises(RecipeError, match="of the 2 samples in a forward pass none may correct; raise batch"):
        check_engine(made, engine)
    # On every process, also where its own rows have both.
    made = plan(flow_map(**{"training.batch": 4}), "recipe")
    engine.world = 2
    for engine.rank in (0, 1):
        with pytest.raises(RecipeError, match="of the 2 samples"):
            check_engine(made, engine)


def test_what_is_not_supported_together_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineSection(device="cpu"))
    both = flow_map(**{"engine.compile": True, "flow_maps.freeflow.objective.prediction.steps": 0})
    with pytest.raises(RecipeError, match=r"compile = true and .* steps = 0 are not supported together"):
        check_engine(plan(both, "recipe"), engine)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    eight = flow_map(**{"flow_maps.freeflow.auxiliary.optimiser.name": "adamw8bit"})
    with pytest.raises(RecipeError, match=r"\[flow_maps.freeflow.auxiliary.optimiser\] name = .adamw8bit. needs"):
        check_engine(plan(eight, "recipe"), engine)
    labels = flow_map(data={"name": "classes", "classes": 10, "height": 64, "width": 64, "channels": 1})
    with pytest.raises(RecipeError, match=r"\[data\] has no images, and \[teacher.training\] needs them"):
        check_data(plan(labels, "recipe"))


def test_a_run_goes_on_whose_recipe_lacks_a_key_that_is_new(whole: Folder) -> None:
    path = out(whole).parent / "recipe.toml"
    text = path.read_text()
    try:
        path.write_text(text.replace("best_of = 2\n", ""))
        refused = whole.run()
        assert "differs in data.best_of" in one_error(refused)  # its default is another
        path.write_text(text.replace("power = 1.0\n", ""))
        assert path.read_text() != text
        assert whole.run().code == 0
    finally:
        path.write_text(text)


def test_without_guidance_or_correction_there_is_less_to_train(taught: Folder) -> None:
    objective = {"share": 1.0, "prediction": {"steps": 0, "warmup": 0}}
    write(taught.path / "recipe.toml", flow_map(**{"flow_maps.freeflow": {"objective": objective}}))
    run = taught.run()
    assert run.code == 0, run.out + run.err
    saved = out(taught) / "checkpoints" / "step-00000006"
    assert {file.stem for file in saved.iterdir()} == {"manifest", "ema", "model", "optimiser"}
    weights = load_file(out(taught) / "student.safetensors")
    assert not any("guidance" in key for key in weights)
    (row,) = json.loads((out(taught).parent / "metrics.json").read_text())["students"]
    assert "guidance" not in row
