"""`pitools distill`: what it writes, what it prints, and what it refuses."""

import io
import json
import math
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Commands, Run
from rich.console import Console
from safetensors.torch import load_file
from training.recipes import tiny, write

from pitools.training.comparison import show_comparison
from pitools.training.config import RecipeError, find_recipe, override, read_recipe, to_toml
from pitools.training.distillation import all_members, check_engine
from pitools.training.engine import Engine, EngineSection
from pitools.training.recipe import changed_keys, plan

METRICS = {"class_accuracy", "frechet_data", "frechet_teacher", "diversity_ratio", "endpoint_rmse"}
LIGHT = "import pitools.training.distillation as distillation; distillation.SHEET = 2\n"
"""A sheet of 20 columns takes seconds to draw."""


@dataclass(frozen=True)
class Folder:
    """A scratch folder in which the command runs."""

    path: Path
    commands: Commands

    def run(self, table: Mapping[str, Any], *arguments: str, name: str = "recipe", before: str = LIGHT) -> Run:
        write(self.path / f"{name}.toml", table)
        return self.commands(["distill", f"{name}.toml", *arguments], self.path, before)

    def files(self) -> dict[str, bytes]:
        """What was written, besides recipes."""
        found = {str(path.relative_to(self.path)): path for path in self.path.rglob("*")}
        return {name: path.read_bytes() if path.is_file() else b"" for name, path in found.items() if "/" in name}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands() as started:
        yield started


@pytest.fixture
def folder(commands: Commands, tmp_path: Path) -> Folder:
    return Folder(tmp_path, commands)


TWO = tiny(
    **{
        "students.dx": {"policy": "dx", "grid_points": 4, "nfe": [1], "objective": {"step_size": 0.125}},
        "training.sheet_every": 3,
        "training.log_every": 4,
    }
)


@pytest.fixture(scope="module")
def trained(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, Run]:
    """A run with two students, and what it printed. Nobody changes it."""
    folder = Folder(tmp_path_factory.mktemp("trained"), commands)
    run = folder.run(TWO)
    assert run.code == 0, run
    return folder, run


def test_a_run_writes_its_folder(trained: tuple[Folder, Run]) -> None:
    folder, run = trained
    out = folder.path / "runs" / "recipe"
    assert {path.name for path in out.iterdir()} == {"recipe.toml", "metrics.json", "samples.png", "gm-2nfe", "dx-1nfe"}
    results = json.loads((out / "metrics.json").read_text())
    assert set(results) == {"teacher", "students", "seconds"}
    assert set(results["teacher"]) == METRICS
    for row, name, nfe in zip(results["students"], ("gm", "dx"), (2, 1), strict=True):
        assert set(row) == METRICS | {"policy", "nfe", "steps"}
        assert (row["policy"], row["nfe"], row["steps"]) == (name, nfe, 6)
        assert all(math.isfinite(row[key]) for key in METRICS)
        assert row["endpoint_rmse"] > 0
    assert results["teacher"]["endpoint_rmse"] == 0
    assert results["teacher"]["diversity_ratio"] == 1
    for student in ("gm-2nfe", "dx-1nfe"):
        assert {path.name for path in (out / student).iterdir()} == {
            "student.safetensors", "log.jsonl", "checkpoints", "samples",
        }  # fmt: skip
        logged = [json.loads(line) for line in (out / student / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged] == [4, 6]
        assert all(0 < line["policy_share"] < 1 for line in logged)
        assert all(line["network_seconds"] > 0 for line in logged)
        assert sorted(path.name for path in (out / student / "samples").iterdir()) == [
            "step-000003.png", "step-000006.png",
        ]  # fmt: skip
    for picture in out.rglob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    (teacher,) = (folder.path / "runs" / "teachers").iterdir()
    assert {"teacher.safetensors", "log.jsonl", "checkpoints"} == {path.name for path in teacher.iterdir()}
    # What it says: progress, the table, and where everything is.
    assert "Comparing: teacher, 4 steps, 20/20 samples" in run.out
    assert "Comparing: gm, 2 NFE, 20/20 samples" in run.out
    assert "right class" in run.out
    assert "Wrote runs/recipe/" in run.out


def test_the_weights_are_averages_and_differ_from_the_teachers(trained: tuple[Folder, Run]) -> None:
    folder, _ = trained
    out = folder.path / "runs" / "recipe" / "gm-2nfe"
    weights = load_file(out / "student.safetensors")
    last = out / "checkpoints" / "step-00000006"
    averages = load_file(last / "ema.safetensors")
    assert {f"averages/{name}" for name in weights} | {"steps"} == set(averages)
    assert all(torch.equal(value, averages[f"averages/{name}"]) for name, value in weights.items())
    (path,) = (folder.path / "runs" / "teachers").glob("*/teacher.safetensors")
    teacher = load_file(path)
    shared = [name for name in weights if name in teacher]
    assert shared
    assert any(not torch.equal(weights[name], teacher[name]) for name in shared)
    # A student starts as the teacher, and six steps do not take it far.
    assert all((weights[name] - teacher[name]).abs().max() < 0.05 for name in shared)


def test_the_recipe_in_the_folder_is_the_recipe(trained: tuple[Folder, Run]) -> None:
    folder, _ = trained
    written = tomllib.loads((folder.path / "runs" / "recipe" / "recipe.toml").read_text())
    resolved = plan(TWO, "recipe").table
    differing = changed_keys(resolved, written)
    assert all(name.startswith(("engine.", "run.out", "training.ema_device")) for name in differing)
    assert written["training"]["optimiser"]["betas"] == [0.9, 0.95]  # a default, filled in


def test_a_teacher_is_trained_once_for_all_students(trained: tuple[Folder, Run], folder: Folder) -> None:
    first, _ = trained
    shutil.copytree(first.path / "runs" / "teachers", folder.path / "runs" / "teachers")
    teachers = folder.path / "runs" / "teachers"
    before = folder.files()
    other = tiny(**{"students": {"short": {"policy": "shortcut", "nfe": [1]}}, "training.steps": 1})
    run = folder.run(other, name="other")
    assert run.code == 0, run
    assert "The teacher is runs/teachers/" in run.out
    assert "teacher: step" not in run.out
    assert {name: text for name, text in folder.files().items() if "teachers" in name} == before
    # Another teacher is another folder; the first stays.
    run = folder.run(tiny(**{"teacher.training.steps": 2, "training.steps": 1}), name="third")
    assert run.code == 0, run
    assert "teacher: step 2/2" in run.out
    assert len(list(teachers.iterdir())) == 2
    assert {name: text for name, text in folder.files().items() if name in before} == before


TEACHERS = {
    "backbone.layers": 1,
    "teacher.training.steps": 7,
    "teacher.training.optimiser.learning_rate": 1e-4,
    "teacher.label_dropout": 0.2,
    "teacher.shift": 3.0,
    "teacher.seed": 1,
    "engine.precision": "bf16",
}
"""What a teacher's weights depend on."""

NOT_TEACHERS = {
    "students.gm.components": 5,
    "training.steps": 7,
    "run.seed": 1,
    "teacher.guidance.scale": 3.0,
    "teacher.reference_steps": 9,
    "backbone.head.spread": 0.1,
    "run.out": "elsewhere",
    "engine.compile": True,
    "data.samples": 30,
    "teacher.training.keep": 3,
    "teacher.training.checkpoint_every": 3,
    "teacher.training.log_every": 3,
}


def test_a_teacher_is_known_by_what_its_weights_depend_on() -> None:
    own = plan(tiny(), "recipe").teacher_hash
    hashes = {key: plan(tiny(**{key: value}), "recipe").teacher_hash for key, value in TEACHERS.items()}
    assert own not in hashes.values()
    assert len(set(hashes.values())) == len(hashes)
    for key, value in NOT_TEACHERS.items():
        assert plan(tiny(**{key: value}), "recipe").teacher_hash == own, key


GOLDEN = {
    "teacher": [
        0.91755, 0.76282, 0.855041, 0.794255, 0.825826, 0.820287,
        0.802735, 0.783072, 0.709338, 0.751378, 0.717962, 0.728296,
        0.746412, 0.807917, 0.651973, 0.773218, 0.770756, 0.747034,
        0.667965, 0.721187, 0.875553, 0.735918, 0.724188, 0.78988,
        0.694577, 0.747715, 0.703707, 0.708254, 0.694781, 0.734445,
    ],
    "gm-2nfe": [
        0.000673638, 0.000380827, 0.000427242, 0.000396801, 0.000484918, 0.0003001,
        0.000185046, 0.000215768, 0.000243118, 0.000325555, 0.0002651, 0.000224588,
        0.00017338, 0.000111996, 9.44466e-05, 0.000141282, 0.000155, 0.000172613,
        0.000163261, 0.000132865, 8.80624e-05, 0.000109006, 0.000112815, 0.000145349,
        0.000118912, 0.000121121, 0.000109329, 8.90099e-05, 0.000113129, 0.000122067,
    ],
    "dx-2nfe": [
        0.00025921, 0.000342141, 7.71161e-05, 0.000296349, 0.000249642, 0.00011113,
        0.00035653, 0.000209454, 0.000153108, 0.000141229, 0.000268401, 0.000146895,
        0.000142866, 0.000220842, 0.00018709, 0.000302561, 8.54179e-05, 8.43376e-05,
        0.000181195, 0.00019756, 0.000302314, 0.000144343, 0.000104521, 0.000182091,
        0.00029289, 0.000186133, 8.32521e-05, 5.38308e-05, 9.00345e-05, 0.000161562,
    ],
}  # fmt: skip
"""The losses of 30 steps, written down once: a change that moves them is no refactoring."""

CURVE = tiny(
    **{
        "teacher.training.steps": 30,
        "training.steps": 30,
        "students.gm.objective": {"step_size": 0.125, "floor": 0.2, "dropout": 0.1, "data_free": True},
        "students.dx": {
            "policy": "dx", "grid_points": 4, "nfe": [2],
            "objective": {"step_size": 0.125, "floor": 0.2, "window": 0.1},
        },
    }
)  # fmt: skip
"""No states near t = 0, where velocities magnify what each processor rounds in its own way."""


def losses(folder: Path) -> dict[str, list[float]]:
    found = {}
    for path in folder.rglob("log.jsonl"):
        name = "teacher" if "teachers" in path.parts else path.parent.name
        found[name] = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    return found


def test_the_loss_curve_is_the_same_in_every_process_and_the_known_one(folder: Folder) -> None:
    """To the bit within this machine. Another processor may round otherwise, so that the known curve is met to 1e-4."""
    run = folder.run(CURVE)
    assert run.code == 0, run
    first = losses(folder.path)
    shutil.rmtree(folder.path / "runs")
    command = [sys.executable, "-m", "pitools", "distill", "recipe.toml"]
    again = subprocess.run(command, cwd=folder.path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert losses(folder.path) == first
    assert set(first) == set(GOLDEN)
    for name, curve in GOLDEN.items():
        assert first[name] == pytest.approx(curve, rel=1e-4), name


def test_eight_bit_adam_keeps_eight_bit_states(folder: Folder) -> None:
    run = folder.run(tiny(**{"training.optimiser.name": "adamw8bit"}))
    assert run.code == 0, run
    last = folder.path / "runs" / "recipe" / "gm-2nfe" / "checkpoints" / "step-00000006"
    states, weights = load_file(last / "optimiser.safetensors"), load_file(last / "model.safetensors")
    large = [name for name, value in weights.items() if value.numel() >= 4096]
    assert large
    for name in weights:
        wanted = torch.uint8 if name in large else torch.float32
        for key in ("state1", "state2"):
            if f"{name}/{key}" in states:
                assert states[f"{name}/{key}"].dtype == wanted, name
    assert all(states[f"{name}/state1"].dtype == torch.uint8 for name in large)
    assert any(states[f"{name}/state1"].unique().numel() > 8 for name in large)
    # Killed and resumed, it ends with the same bits.
    shutil.copytree(folder.path / "runs" / "teachers", folder.path / "again" / "teachers")
    table = tiny(**{"training.optimiser.name": "adamw8bit", "run.out": "again/recipe"})
    kill = LIGHT + "import pitools.training.loop as loop; at(loop.EMA, 'update', 5, die)"
    changed = {**table, "training": {**table["training"], "checkpoint_every": 3}}
    assert folder.run(changed, before=kill).code == -9
    run = folder.run(changed)
    assert run.code == 0, run
    assert "Going on from" in run.out
    resumed = load_file(folder.path / "again" / "recipe" / "gm-2nfe" / "student.safetensors")
    whole = load_file(folder.path / "runs" / "recipe" / "gm-2nfe" / "student.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_a_dry_run_prints_the_recipe_and_true_counts_and_writes_nothing(
    trained: tuple[Folder, Run], folder: Folder
) -> None:
    run = folder.run(TWO, "--dry-run", before=LIGHT + "import torch; at(torch.optim.Optimizer, '__init__', 0, die)")
    assert run.code == 0, run
    assert folder.files() == {}
    table = tomllib.loads(run.out)
    assert table == tomllib.loads(to_toml(plan(TWO, "recipe").table))
    out = trained[0].path / "runs" / "recipe"
    comments = [line for line in run.out.splitlines() if line.startswith("#")]
    for student in ("gm-2nfe", "dx-1nfe"):
        count = sum(value.numel() for value in load_file(out / student / "student.safetensors").values())
        (line,) = [line for line in comments if f"# {student}:" in line]
        assert f" {count:,} trained and " in line
    (path,) = (trained[0].path / "runs" / "teachers").glob("*/teacher.safetensors")
    count = sum(value.numel() for value in load_file(path).values())
    assert any(f"# teacher: {count:,} frozen parameters" in line for line in comments)
    assert any("# folder: runs/recipe" in line for line in comments)


def test_help_has_examples(folder: Folder) -> None:
    run = folder.commands(["distill", "--help"], folder.path)
    assert run.code == 0
    assert "pitools distill toys/digits.toml --set training.steps=200" in run.out
    assert "--dry-run" in run.out


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "toys").glob("*.toml")), ids=lambda path: path.name
)
def test_every_shipped_recipe_can_be_planned(path: Path) -> None:
    planned = plan(read_recipe(find_recipe(f"toys/{path.name}", ["toys"])), path.stem)
    assert all_members(planned)
    assert plan(planned.table, path.stem).table == planned.table  # nothing is left to fill in


DX = {"policy": "dx", "grid_points": 4, "nfe": [2]}

BAD: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a number in quotes": ({"training.steps": "many"}, [], 'training.steps must be a whole number, got "many"'),
    "half a step": ({"training.steps": 1.5}, [], "training.steps must be a whole number, got 1.5"),
    "no steps": ({"training.steps": 0}, [], "[training] steps must be at least 1, got 0"),
    "an unknown key": ({"training.stesp": 3}, [], "[training] has no key 'stesp'; did you mean 'steps'?"),
    "an unknown section": ({"studens": {}}, [], "has no key 'studens'; did you mean 'students'?"),
    "no students": ({"students": {}}, [], "add one, such as [students.gm]"),
    "a student named as a path": ({"students": {"a/b": {}}}, [], "letters, digits, - and _"),
    "an unknown policy": ({"students.gm.policy": "gmm"}, [], "did you mean 'gm'?"),
    "no components": ({"students.gm.components": 0}, [], "components"),
    "the same NFE twice": ({"students.gm.nfe": [2, 2]}, [], "different whole numbers"),
    "a last step of one": (
        {"students.gm.nfe": [1], "students.gm.final_step_scale": 0.5},
        [],
        "final_step_scale 0.5 and nfe 1 disagree",
    ),
    "a window as long as a segment": (
        {"students.dx": {**DX, "objective": {"window": 0.5}}},
        [],
        "objective and nfe 2 disagree: window 0.5 must be shorter than the shortest segment, 0.5",
    ),
    "DX with dropout": ({"students.dx": {**DX, "objective": {"dropout": 0.1}}}, [], "dropout must be 0 for a DXHead"),
    "a teacher's share for ever": ({"students.gm.objective": {"teacher_ratio": 0.5}}, [], "decay_steps"),
    "guidance that the network does not take": (
        {"teacher.guidance": {"embedded": 3.5}},
        [],
        "[teacher.guidance] embedded is for networks that take their guidance as a condition",
    ),
    "guidance without a null class": ({"teacher.label_dropout": 0.0}, [], "needs label_dropout above 0"),
    "a batch below accumulation": (
        {"training.batch": 2, "training.accumulation": 4},
        [],
        "[training] batch 2 does not divide into 4 accumulation steps",
    ),
    "a teacher's batch below accumulation": (
        {"teacher.training.accumulation": 3},
        [],
        "[teacher.training] batch 8 does not divide into 3 accumulation steps",
    ),
    "an unknown backbone": ({"backbone": {"name": "unet"}}, [], "[backbone] needs name"),
    "unknown data": ({"data": {"name": "cats"}}, [], "(cache, classes, digits, stub-prompts), got 'cats'"),
    "a backbone of another size": ({"backbone.size": 16}, [], "made for latents (1, 16, 16), and [data] has (1, 8, 8)"),
    "a backbone of other classes": ({"backbone.classes": 5}, [], "made for 5 classes, and [data] has 10"),
    "a patch that does not fit": ({"backbone.patch": 3}, [], "size 8 is not a multiple of patch 3"),
    "a width that does not fit": ({"backbone.heads": 1, "backbone.head_width": 3}, [], "[backbone] "),
    "a setting without a value": ({}, ["--set", "training.steps"], "--set takes key=value"),
    "a setting of a wrong kind": ({}, ["--set", "training.steps=[1"], "training.steps must be a whole number"),
    "a setting through a value": ({}, ["--set", "training.steps.x=1"], "training.steps is no table"),
    "a setting that is unknown": ({}, ["--set", "run.seeed=1"], "did you mean 'seed'?"),
    "a GPU that is not here": ({}, ["--set", "engine.device=cuda"], "torch sees no GPU"),
    "a folder in use": ({}, ["--set", "run.out=used"], "used exists and is not the folder of a run"),
    "a file for a folder": ({}, ["--set", "run.out=used/thesis.txt"], "is not the folder of a run"),
    "a folder in a file": ({}, ["--set", "run.out=used/thesis.txt/run"], "used/thesis.txt/run"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "arguments", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_recipe_is_one_line_that_says_what_to_change(
    changes: dict[str, Any], arguments: list[str], message: str, folder: Folder
) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (folder.path / "used").mkdir()
    (folder.path / "used" / "thesis.txt").write_text("mine")
    before = folder.files()
    run = folder.run(tiny(**changes), *arguments)
    assert run.code == 2, run
    assert message in run.err
    (line,) = run.err.splitlines()
    assert line.startswith("Error: ")
    assert run.out == ""
    assert folder.files() == before


def test_a_network_that_cannot_be_built_is_the_recipes_fault_and_nothing_is_written(folder: Folder) -> None:
    spoil = (
        "import scale.dit\ndef refuse(self, generator): raise ValueError('heads 3: no')\nscale.dit.DiT.teacher = refuse"
    )
    for arguments in ([], ["--dry-run"]):
        run = folder.run(tiny(), *arguments, before=spoil)
        assert run.code == 2, run
        assert run.err == "Error: [backbone] heads 3: no\n"
        assert folder.files() == {}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_comparison_shows_how_far_it_is(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with show_comparison(console) as progress:
        told = progress("teacher [4 steps]")
        told(250, 1000)
        told(1000, 1000)
    lines = file.getvalue()
    assert "Comparing: teacher [4 steps]" in lines
    assert "1000/1000" in lines
    assert ("250/1000 samples" in lines) != terminal


def test_a_recipe_that_is_not_there_or_not_toml_is_one_line(folder: Folder) -> None:
    run = folder.commands(["distill", "digits.toml"], folder.path)
    assert run.code == 2
    assert run.err.count("\n") == 1
    assert "did you mean 'toys/digits.toml'?" in run.err
    (folder.path / "broken.toml").write_text("[run\nseed = 1\n")
    run = folder.commands(["distill", "broken.toml"], folder.path)
    assert run.code == 2
    assert run.err.count("\n") == 1
    assert "broken.toml is not TOML" in run.err
    assert "line 1" in run.err
    assert folder.files() == {}


def test_another_recipes_folder_is_refused_and_left_alone(trained: tuple[Folder, Run]) -> None:
    folder, _ = trained
    before = folder.files()
    table = tiny(**{"training.steps": 9, "run.out": "runs/recipe"})
    run = folder.run(table, name="other")
    assert run.code == 2, run
    (line,) = run.err.splitlines()
    assert "runs/recipe holds a run of another recipe, which differs in students.dx, training." in line
    assert "--set run.out=" in line
    assert folder.files() == before


def test_a_run_may_move_to_another_folder_name_and_device(trained: tuple[Folder, Run], folder: Folder) -> None:
    """Neither where it lies nor on what it runs makes it another run."""
    shutil.copytree(trained[0].path / "runs", folder.path / "moved")
    table = {**TWO, "run": {"out": "moved/recipe"}, "engine": {**TWO["engine"], "device": "auto"}}
    if torch.cuda.is_available():
        pytest.skip("on a GPU the teacher would be the same, and the metrics not")
    run = folder.run(table)
    assert run.code == 0, run
    assert "gm-2nfe is trained" in run.out
    kept = json.loads((trained[0].path / "runs" / "recipe" / "metrics.json").read_text())
    again = json.loads((folder.path / "moved" / "recipe" / "metrics.json").read_text())
    assert {**again, "seconds": 0} == {**kept, "seconds": 0}


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    engine = Engine(EngineSection(device="cpu"))
    engine.world = 3
    with pytest.raises(RecipeError, match=r"\[teacher\.training\] batch 8 .*multiple of 3"):
        check_engine(plan(tiny(), "recipe"), engine)
    with pytest.raises(RecipeError, match=r"\[training\] batch 8 .*multiple of 3"):
        check_engine(plan(tiny(**{"teacher.training.batch": 9}), "recipe"), engine)
    check_engine(plan(tiny(**{"teacher.training.batch": 9, "training.batch": 9}), "recipe"), engine)


POISON = {
    "a teacher that answers NaN": (
        "import pitools.guidance as guidance\n"
        "original, calls = guidance.Teacher.velocity, []\n"
        "def poisoned(self, *arguments):\n"
        "    calls.append(1)\n"
        "    return original(self, *arguments) * (float('nan') if len(calls) > CALLS else 1)\n"
        "guidance.Teacher.velocity = poisoned\n",
        "segment 1 and 2 of 2: loss nan",
    ),
    "data that is NaN": (
        "import toys.digits as digits\n"
        "original, calls = digits.DigitsData.batch, []\n"
        "def poisoned(self, indices):\n"
        "    calls.append(1)\n"
        "    latents, conditions = original(self, indices)\n"
        "    return (latents * float('nan') if len(calls) > CALLS else latents), conditions\n"
        "digits.DigitsData.batch = poisoned\n",
        "segments drawn from 2: the network's answer is not finite",
    ),
}


@pytest.mark.parametrize(("poison", "message"), POISON.values(), ids=POISON.keys())
def test_a_run_that_diverges_names_the_step_the_segment_and_the_last_checkpoint(
    poison: str, message: str, trained: tuple[Folder, Run], folder: Folder
) -> None:
    shutil.copytree(trained[0].path / "runs" / "teachers", folder.path / "runs" / "teachers")
    table = tiny(**{"training.checkpoint_every": 2})
    # One batch a step, or two queries: the fifth step is the first without good numbers.
    calls = 4 if "digits" in poison else 8
    run = folder.run(table, before=f"{LIGHT}CALLS = {calls}\n{poison}")
    assert run.code == 1, run
    (line,) = [line for line in run.err.splitlines() if line.startswith("Error: ")]
    assert f"gm-2nfe, step 5, {message}" in line
    assert "The last good checkpoint is runs/recipe/gm-2nfe/checkpoints/step-00000004" in line
    assert "Traceback" not in run.err
    out = folder.path / "runs" / "recipe"
    assert sorted(path.name for path in (out / "gm-2nfe" / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004",
    ]  # fmt: skip
    assert not (out / "gm-2nfe" / "student.safetensors").exists()
    assert not (out / "metrics.json").exists()
    assert all(value.isfinite().all() for path in out.rglob("*.safetensors") for value in load_file(path).values())
    assert folder.run(table).code == 0


UNSOUND = {
    "samples that are not finite": ("return noise / 0", "gm, 2 NFE: 1280 values of the samples are not finite"),
    "a policy that cannot be": (
        "raise ValueError('means hold a NaN')",
        "gm, 2 NFE cannot be sampled: means hold a NaN",
    ),
}


@pytest.mark.parametrize(("sample", "message"), UNSOUND.values(), ids=UNSOUND.keys())
def test_an_unsound_student_has_no_metrics(
    sample: str, message: str, trained: tuple[Folder, Run], folder: Folder
) -> None:
    shutil.copytree(trained[0].path / "runs", folder.path / "runs")
    (folder.path / "runs" / "recipe" / "metrics.json").unlink()
    spoil = f"import toys.digits as digits\ndef spoiled(student, noise, *others): {sample}\ndigits.sample = spoiled"
    run = folder.run(TWO, before=LIGHT + spoil)
    assert run.code == 1, run
    (line,) = [line for line in run.err.splitlines() if line.startswith("Error: ")]
    assert message in line
    assert not (folder.path / "runs" / "recipe" / "metrics.json").exists()


def test_set_and_file_make_the_same_recipe() -> None:
    changed = override(tiny(), ["training.steps=9", "students.gm.nfe=[1, 4]", "run.out=runs/x"])
    same = tiny(**{"training.steps": 9, "students.gm.nfe": [1, 4], "run.out": "runs/x"})
    assert plan(changed, "a").table == plan(same, "b").table
