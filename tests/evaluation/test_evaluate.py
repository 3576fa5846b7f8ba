"""`pitools evaluate`, end to end: a run of digits, folders of images, and what it refuses."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Commands, Run
from PIL import Image
from safetensors.torch import load_file, save_file
from training.recipes import flow_map, tiny, write

from pitools.evaluation.images import Files
from pitools.evaluation.statistics import statistics_file
from pitools.metrics import Moments, frechet_distance, kernel_distance, precision_recall
from pitools.metrics.features import pairwise_diversity

LIGHT = "import pitools.training.distillation as distillation; distillation.SHEET = 2\n"
"""A sheet of 20 columns takes seconds to draw."""

MINE = """
import torch

def flat(images):
    return images.flatten(1).double()

def few(images):
    return images.flatten(1)[:, :4]

def wrong(images):
    return images

def brightness(images, asked):
    return [sum(image.convert("L").tobytes()) for image in images]

def length(images, asked):
    return [len(each) for each in asked]

def nothing(images, asked):
    return [float("nan")] * len(images)
"""


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands("pitools.evaluation.evaluate", "toys.features") as started:
        yield started


@pytest.fixture(scope="module")
def runs(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny run of two policies. Nobody changes it."""
    folder = tmp_path_factory.mktemp("evaluated")
    dx = {"policy": "dx", "grid_points": 4, "nfe": [1], "objective": {"step_size": 0.125}}
    return distilled(commands, folder, "tiny", tiny(**{"students.dx": dx}))


def distilled(commands: Commands, folder: Path, name: str, table: dict[str, Any]) -> Path:
    """The folder, with the run `name` of a recipe's table."""
    write(folder / f"{name}.toml", table)
    run = commands(["distill", f"{name}.toml"], folder, LIGHT)
    assert run.code == 0, run
    return folder


def pictures(folder: Path, count: int, seed: int, prompts: bool = False) -> Path:
    """Random images of 5 x 4 pixels; with prompts, as `pitools sample` leaves them."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        pixels = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")
        rows.append({"file": f"{number:04d}.png", "prompt": "x" * (1 + number // 2), "seed": number})
    if prompts:
        Image.new("RGB", (40, 40)).save(folder / "sheet.png")
        (folder / "samples.json").write_text(json.dumps({"images": rows}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A scratch folder with images, a reference, and a module."""
    (tmp_path / "mine.py").write_text(MINE)
    pictures(tmp_path / "drawn", 70, 0, prompts=True)
    pictures(tmp_path / "real", 80, 1)
    return tmp_path


def told(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "evaluation.json").read_text())
    return found


def flat(folder: Path) -> torch.Tensor:
    """What the module's `flat` makes of the images, apart from the command."""
    files = Files(sorted(path for path in folder.glob("0*.png")))
    return torch.stack([files[index].flatten().double() for index in range(len(files))])


def line_of(run: Run, code: int = 2) -> str:
    """The one line that a refusal consists of."""
    assert run.code == code, run
    (line,) = run.err.splitlines()
    assert line.startswith("Error: ")
    return line


OF_RUNS = {"diversity", "class_diversity", "right_class", "inception_score"}
COMPARED = {"frechet", "kernel", "precision", "recall", "density", "coverage"}
KNOWN = {"source", "title", "policy", "nfe", "images"}


def test_a_run_is_measured_against_held_out_data(commands: Commands, runs: Path) -> None:
    run = commands(["evaluate", "runs/tiny", "--device", "cpu", "--out", "held-out"], runs)
    assert run.code == 0, run
    out = runs / "held-out"
    assert {path.name for path in out.iterdir()} == {"evaluation.json", "samples.png", "report.html"}
    found = told(out)
    assert [row["title"] for row in found["rows"]] == ["teacher, 4 steps", "gm, 2 NFE", "dx, 1 NFE"]
    for row in found["rows"]:
        assert set(row) - KNOWN - {"steps"} == COMPARED | OF_RUNS | {"endpoint_rmse"}
        assert row["images"] == 20
        assert all(math.isfinite(row[key]) for key in COMPARED | OF_RUNS)
    (reference,) = found["references"]
    assert (reference["title"], reference["images"]) == ("held-out data (reference)", 359)
    assert reference["right_class"] > 0.97
    assert found["rows"][0]["endpoint_rmse"] == 0
    # The same noises, network and features as the run's own comparison.
    metrics = json.loads((runs / "runs" / "tiny" / "metrics.json").read_text())
    for row, own in zip(found["rows"], [metrics["teacher"], *metrics["students"]], strict=True):
        assert row["frechet"] == pytest.approx(own["frechet_data"], rel=1e-9)
        assert row["right_class"] == own["class_accuracy"]
        assert row["endpoint_rmse"] == pytest.approx(own["endpoint_rmse"], rel=1e-9)
    assert found["settings"]["reference"] == "data"
    assert found["settings"]["features"] == "digits"
    assert found["notes"][0].startswith("20 samples are too few for")
    # What it says: progress, the table, and where everything is.
    for line in (
        "Drawing: gm, 2 NFE, 20/20 samples",
        "Measuring: runs/tiny, gm, 2 NFE, 20/20 samples",
        "FD ↓",
        "Note:",
    ):
        assert line in run.out
    assert "Wrote held-out/ (evaluation.json, samples.png, report.html)" in run.out
    page = (out / "report.html").read_text()
    assert "Evaluation of runs/tiny" in page
    assert page.count("<img ") == 4
    with Image.open(out / "samples.png") as sheet:
        assert sheet.width > sheet.height


def test_a_student_is_measured_against_its_teacher(commands: Commands, runs: Path) -> None:
    run = commands(["evaluate", "runs/tiny/gm-2nfe", "--reference", "teacher", "--samples", "40", "--patch", "4"], runs)
    assert run.code == 0, run
    found = told(runs / "runs" / "tiny" / "gm-2nfe" / "evaluation-teacher")
    (row,), (reference,) = found["rows"], found["references"]
    assert (row["title"], reference["title"]) == ("gm, 2 NFE", "teacher, 4 steps (reference)")
    assert row["images"] == reference["images"] == 40
    assert row["patch_frechet"] > 0
    assert "share their noises" in found["notes"][-1]


@pytest.mark.slow
def test_several_runs_are_measured_against_their_teachers(commands: Commands, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    distilled(commands, tmp_path, "map", flow_map())
    run = commands(["evaluate", "runs/tiny/gm-2nfe", "runs/map", "--reference", "teacher"], tmp_path)
    assert run.code == 0, run
    found = told(tmp_path / "runs" / "evaluation-teacher")
    assert [(row["source"], row["title"]) for row in found["rows"]] == [
        ("runs/tiny/gm-2nfe", "gm, 2 NFE"),
        ("runs/map", "teacher, 4 steps, γ = 1"),
        ("runs/map", "freeflow, 1 NFE, γ = 2"),
        ("runs/map", "freeflow, 1 NFE, γ = 1"),
    ]
    assert [row["title"] for row in found["references"]] == ["teacher, 4 steps (reference)"] * 2
    assert "runs/map: teacher, 4 steps (reference)" in run.out


def test_folders_are_measured_by_anybodys_features(commands: Commands, folder: Path) -> None:
    x, y = flat(folder / "drawn"), flat(folder / "real")
    run = commands(
        [
            *("evaluate", "drawn", "real", "--reference", "real", "--features", "mine:flat", "--batch", "16"),
            *("--k", "2", "--scorer", "mine:brightness", "--out", "out", "--save-reference", "real.npz"),
        ],
        folder,
    )
    assert "real does not tell" in line_of(run)
    run = commands(
        [
            *("evaluate", "drawn", "--reference", "real", "--features", "mine:flat", "--batch", "16", "--k", "2"),
            *("--scorer", "mine:length", "--scorer", "mine:brightness", "--save-reference", "real.npz"),
        ],
        folder,
    )
    assert run.code == 0, run
    found = told(folder / "runs" / "evaluation-real")
    (row,) = found["rows"]
    assert row["frechet"] == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert row["kernel"] == pytest.approx(kernel_distance(x, y).mean, rel=1e-9)
    assert {key: row[key] for key in ("precision", "recall")} == vars(precision_recall(x, y, 2))
    assert row["diversity"] == pytest.approx(pairwise_diversity(x), rel=1e-9)
    pairs = x.view(35, 2, -1)  # two images a prompt
    assert row["class_diversity"] == pytest.approx(float((pairs[:, 0] - pairs[:, 1]).norm(dim=1).mean()), rel=1e-9)
    assert row["mine:length"] == 18
    images = [Image.open(path).convert("L").tobytes() for path in sorted((folder / "drawn").glob("0*.png"))]
    assert row["mine:brightness"] == pytest.approx(sum(map(sum, images)) / 70, rel=1e-9)
    assert "inception_score" not in row  # features alone have no classes
    assert found["settings"]["neighbours"] == {"precision and recall": 2, "density and coverage": 2}
    assert (found["rows"][0]["images"], found["references"][0]["images"]) == (70, 80)
    # The file stands for the folder, where moments are enough.
    run = commands(
        ["evaluate", "drawn", "--reference", "real.npz", "--features", "mine:flat", "--samples", "66", "--out", "b"],
        folder,
    )
    assert run.code == 0, run
    kept = told(folder / "b")
    assert kept["references"] == []
    assert set(kept["rows"][0]) == {"source", "title", "images", "frechet", "diversity", "class_diversity"}
    assert kept["rows"][0]["frechet"] == pytest.approx(frechet_distance(x[:66], y), rel=1e-9)


def test_a_set_against_itself_is_perfect(commands: Commands, folder: Path) -> None:
    run = commands(
        ["evaluate", "drawn", "real", "--reference", "drawn", "--features", "mine:flat", "--out", "out"], folder
    )
    assert run.code == 0, run
    own, other = told(folder / "out")["rows"]
    assert own["frechet"] == pytest.approx(0, abs=1e-9)
    assert (own["precision"], own["recall"], own["coverage"]) == (1, 1, 1)
    assert other["frechet"] > 0.1
    assert other["precision"] < 1


def test_pairs_are_taken_of_a_subset_that_the_seed_draws(commands: Commands, folder: Path) -> None:
    found = []
    for seed in ("0", "0", "1"):
        options = ["--reference", "real", "--features", "mine:few", "--subset", "30", "--seed", seed, "--out", "out"]
        assert commands(["evaluate", "drawn", *options], folder).code == 0
        found.append(told(folder / "out")["rows"][0])
    assert found[0] == found[1]
    assert found[0]["frechet"] == found[2]["frechet"]  # of all
    assert found[0]["kernel"] != found[2]["kernel"]


def test_a_reference_batch_of_adm_has_moments_and_images(commands: Commands, folder: Path) -> None:
    y = flat(folder / "real")
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted((folder / "real").glob("*.png"))])
    np.savez(folder / "adm.npz", arr_0=pixels, mu=y.numpy().mean(0), sigma=np.cov(2 * y.numpy(), rowvar=False))
    run = commands(["evaluate", "drawn", "--reference", "adm.npz", "--features", "mine:flat", "--out", "out"], folder)
    assert run.code == 0, run
    (row,), (reference,) = told(folder / "out")["rows"], told(folder / "out")["references"]
    x = flat(folder / "drawn")
    assert row["frechet"] == pytest.approx(frechet_distance(x, 2 * y - y.mean(0)), rel=1e-6)  # of mu and sigma
    assert {key: row[key] for key in ("precision", "recall")} == vars(precision_recall(x, y))  # of the images
    assert reference["images"] == 80


BAD = {
    "no such folder": (["gone"], "gone is not there; name the folder of a run, or of images"),
    "a folder without a reference": (["drawn"], "a folder of images needs --reference: a folder, or a file"),
    "a folder's data": (["drawn", "--reference", "data"], "--reference data is for runs, and drawn is a folder"),
    "no such reference": (["drawn", "--reference", "gone"], 'must be "data", "teacher", a folder or a file, and gone'),
    "features unnamed": (["drawn", "--reference", "real"], "name what looks at the images with --features"),
    "features unknown": (
        ["drawn", "--reference", "real", "--features", "inceptoin"],
        "got 'inceptoin'; installed ones: digits, inception",
    ),
    "features of a wrong shape": (
        ["drawn", "--reference", "real", "--features", "mine:wrong"],
        "mine:wrong must return features [64, F] of 64 images",
    ),
    "statistics of other features": (
        ["drawn", "--reference", "other.npz", "--features", "mine:flat"],
        "features of mine:flat are 60 wide, and those of the reference 3",
    ),
    "patches of statistics": (
        ["drawn", "--reference", "other.npz", "--features", "mine:flat", "--patch", "2"],
        "--patch needs a reference of images, and other.npz has only the moments",
    ),
    "patches too large": (
        ["drawn", "--reference", "real", "--features", "mine:flat", "--patch", "5"],
        "size must lie in 1..4 for images of 4 x 5, got 5",
    ),
    "too few for k": (
        ["drawn", "--reference", "real", "--features", "mine:flat", "--samples", "4", "--k", "4"],
        "x must hold at least 5 samples, got 4",
    ),
    "more samples than there are": (
        ["drawn", "--reference", "real", "--features", "mine:flat", "--samples", "71"],
        "--samples 71 is more than drawn has: 70 images",
    ),
    "a target twice": (["drawn", "drawn", "--reference", "real"], "a target is named twice"),
    "a scorer that says nothing": (
        ["drawn", "--reference", "real", "--features", "mine:flat", "--scorer", "mine:nothing"],
        "the scorer mine:nothing answers NaN to an image of 'x'",
    ),
    "among the images": (
        ["real", "--reference", "drawn", "--features", "mine:flat", "--out", "real/out"],
        "--out real/out lies among the images of real",
    ),
    "a file for a folder": (
        ["real", "--reference", "drawn", "--features", "mine:flat", "--out", "mine.py"],
        "mine.py cannot be written",
    ),
    "statistics by another name": (
        ["real", "--reference", "drawn", "--save-reference", "real.json"],
        "--save-reference real.json must end in .npz",
    ),
    "a device that is not here": (["real", "--reference", "drawn", "--device", "tpu"], "--device tpu is not here"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_one_line_that_says_what_to_change(
    arguments: list[str], message: str, commands: Commands, folder: Path
) -> None:
    (folder / "other.npz").write_bytes(statistics_file(Moments.of(torch.eye(3).double())))
    before = sorted(folder.rglob("*"))
    run = commands(["evaluate", *arguments], folder, "sys.dont_write_bytecode = True")
    assert message in line_of(run)
    assert sorted(folder.rglob("*")) == before


def test_runs_that_cannot_be_measured_are_refused(commands: Commands, runs: Path, tmp_path: Path) -> None:
    def refused(*arguments: str) -> str:
        return line_of(commands(["evaluate", *arguments], tmp_path))

    shutil.copytree(runs / "runs", tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "mine").mkdir()
    assert "runs/tiny/mine is none of the run's students, which are gm-2nfe, dx-1nfe" in refused("runs/tiny/mine")
    latent = commands(["evaluate", "runs/tiny"], tmp_path, "import toys.digits\ndel toys.digits.DigitsData.held_out")
    assert "draws latents, which a pipeline decodes: draw images with `pitools sample runs/tiny" in line_of(latent)
    both = ("runs/tiny/gm-2nfe", "runs/tiny/dx-1nfe")
    assert "each run has data of its own; name one run" in refused(*both, "--save-reference", "data.npz")
    weights = tmp_path / "runs" / "tiny" / "dx-1nfe" / "student.safetensors"
    weights.unlink()
    assert "runs/tiny is not finished: runs/tiny/dx-1nfe/student.safetensors is not there" in refused("runs/tiny")
    shutil.rmtree(tmp_path / "runs" / "teachers")
    assert "teacher.safetensors is not there; go on with `pitools distill`" in refused("runs/tiny/gm-2nfe")
    (tmp_path / "runs" / "tiny" / "recipe.toml").write_text("[run\n")
    assert "runs/tiny/recipe.toml cannot be read" in refused("runs/tiny")
    assert "samples must be at least 20, two of each class, got 19" in line_of(
        commands(["evaluate", "runs/tiny", "--samples", "19"], runs)
    )


def test_samples_that_are_not_finite_have_no_numbers(commands: Commands, runs: Path) -> None:
    spoil = (
        "import toys.digits as digits\ndef spoiled(student, noise, *others): return noise / 0\ndigits.sample = spoiled"
    )
    run = commands(["evaluate", "runs/tiny", "--out", "spoilt"], runs, spoil)
    assert run.code == 1, run
    assert "gm, 2 NFE: 1280 values of the samples are not finite" in run.err
    assert not (runs / "spoilt").exists()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupted_it_leaves_nothing_half_written(call: int, commands: Commands, folder: Path) -> None:
    request = ["evaluate", "drawn", "--reference", "real", "--features", "mine:flat", "--out", "out"]
    run = commands(request, folder, f"at(os, 'replace', {call}, interrupt)")
    assert run.code == 130, run
    assert run.err == "Stopped.\n"
    files = {path.name for path in (folder / "out").iterdir()}
    assert files == set(["samples.png", "report.html"][: call - 1])
    assert commands(request, folder).code == 0
    assert len(list((folder / "out").iterdir())) == 3


def test_a_full_disk_is_one_line(commands: Commands, folder: Path) -> None:
    request = ["evaluate", "drawn", "--reference", "real", "--features", "mine:flat", "--out", "out"]
    run = commands(request, folder, "at(os, 'fsync', 1, full_disk)")
    assert "out/samples.png could not be written" in line_of(run, 1)
    assert list((folder / "out").iterdir()) == []


def test_weights_of_another_recipe_are_refused(commands: Commands, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    path = tmp_path / "runs" / "tiny" / "gm-2nfe" / "student.safetensors"
    weights = load_file(path)
    save_file(dict(list(weights.items())[1:]), path)
    assert "student.safetensors is damaged" in line_of(commands(["evaluate", "runs/tiny"], tmp_path), 1)
