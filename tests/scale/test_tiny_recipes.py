"""Every shipped recipe with `--tiny`, from training to an image: what its full size does, on networks of no size."""

import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import Commands, Run
from PIL import Image
from processes import ended, launch
from safetensors.torch import load_file

import scale

ALIKE = {
    "dit-dx-repa-n20",
    "dit-dx-repa-n40",
    "dit-gm-repa-k32",
    "dit-gm-repa-k32-2nfe",
    "flux-dx-8nfe",
    "flux-gm-8nfe",
}
"""Recipes that differ from another one in numbers alone."""

RECIPES = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in ALIKE else [])
    for path in sorted(Path(scale.__file__).parent.glob("*.toml"))
]
DIE_AT_STEP_3 = "import pitools.training.ema as ema; at(ema.EMA, 'update', 3, die)"


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands("scale.pipelines", "scale.published", "scale.stubs", "peft", "bitsandbytes") as started:
        yield started


def done(run: Run) -> Run:
    assert run.code == 0, run
    return run


def refusals(commands: Commands, folder: Path, *asked: str) -> list[str]:
    """What is told of a request to the adapter, and to the run, whose base or VAE are nowhere."""
    told = []
    for target in ("adapter", "run"):
        refused = commands(["sample", target, *asked, "--device", "cpu", "--out", "refused"], folder)
        assert refused.code == 2, refused
        told.append(refused.err)
    assert not (folder / "refused").exists()
    return told


@pytest.mark.parametrize("path", RECIPES)
def test_a_recipe_trains_resumes_exports_and_samples(path: Path, commands: Commands, tmp_path: Path) -> None:
    recipe = f"scale/{path.name}"
    distill = ["distill", recipe, "--tiny", "--set", "engine.device=cpu", "--set", "engine.tensorboard=false"]
    killed = commands([*distill, "--set", "run.out=run"], tmp_path, before=DIE_AT_STEP_3)
    assert killed.code == -9, killed
    resumed = done(commands([*distill, "--set", "run.out=run"], tmp_path))
    assert "nothing here is a result" in resumed.out
    assert "Going on from" in resumed.out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    (row,) = metrics["students"]
    assert row["steps"] == 4
    assert row["loss"] > 0
    (student,) = (tmp_path / "run").glob("*nfe")
    sheet = student / "samples" / "step-000004.png"
    assert sheet.read_bytes().startswith(b"\x89PNG")

    whole = done(commands([*distill, "--set", "run.out=whole"], tmp_path))
    assert "Going on from" not in whole.out
    weights = [load_file(tmp_path / name / student.name / "student.safetensors") for name in ("run", "whole")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())

    told = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    if told["backbone"]["name"] == "dit":
        exported = done(commands(["export", "run", "--out", "adapter", "--dtype", "float32"], tmp_path))
        assert "with --vae tiny" in exported.out
        sample = ["--label", "3", "--label", "7", "--vae", "tiny", "--device", "cpu"]
        of_export = done(commands(["sample", "adapter", *sample, "--out", "a"], tmp_path))
        of_run = done(commands(["sample", "run", *sample, "--out", "b"], tmp_path))
        assert "show nothing" in of_export.out
        assert "show nothing" in of_run.out
        for name in ("0000.png", "0001.png"):
            images = [Image.open(tmp_path / folder / name) for folder in ("a", "b")]
            assert images[0].size == (64, 64)
            assert images[0].tobytes() == images[1].tobytes()
        for refused in refusals(commands, tmp_path, "--label", "3", "--vae", "./nowhere", "--nfe", "9"):
            assert "Error: --nfe must be" in refused
            assert "got 9; --force tries it" in refused
        return
    exported = done(commands(["export", "run", "--out", "adapter", "--dtype", "float32"], tmp_path))
    assert "with --base tiny" in exported.out
    prompt = ["--prompt", "a red fox", "--prompt", "an owl at night", "--height", "64", "--width", "96"]
    sample = [*prompt, "--device", "cpu"]
    base = ["--base", "tiny", "--quantise", told["backbone"]["quantise"]]
    of_adapter = done(commands(["sample", "adapter", *base, *sample, "--out", "a"], tmp_path))
    of_run = done(commands(["sample", "run", *sample, "--out", "b"], tmp_path))
    assert "show nothing" in of_adapter.out
    assert "show nothing" in of_run.out
    for name in ("0000.png", "0001.png"):
        images = [Image.open(tmp_path / folder / name) for folder in ("a", "b")]
        assert images[0].size == (96, 64)
        assert images[0].tobytes() == images[1].tobytes()  # what was exported is what was trained
    nowhere = ["--prompt", "a fox", "--base", "./nowhere"]
    for refused in refusals(commands, tmp_path, *nowhere, "--nfe", "1"):
        assert "Error: --nfe must be" in refused
        assert "got 1; --force tries it" in refused
    for refused in refusals(commands, tmp_path, *nowhere, "--guidance", "9"):
        assert "Error: --guidance must be" in refused
    for refused in refusals(commands, tmp_path, *nowhere):
        assert "weights './nowhere' cannot be loaded" in refused


FLOW_MAP = """
[flow_maps.freeflow]

[flow_maps.freeflow.objective]
guidance = [1.0, 3.0]
delay = 0
correction_warmup = 0
"""


@pytest.mark.slow
def test_a_flow_map_trains_exports_and_samples(commands: Commands, tmp_path: Path) -> None:
    whole = (Path(scale.__file__).parent / "dit-gm-fm-k32.toml").read_text()
    start, end = whole.index("[students.gm]"), whole.index("[training]")
    (tmp_path / "recipe.toml").write_text(whole[:start] + FLOW_MAP + whole[end:])
    distill = ["distill", "recipe.toml", "--tiny", "--set", "run.out=run", "--set", "engine.device=cpu"]
    done(commands([*distill, "--set", "engine.tensorboard=false"], tmp_path))
    done(commands(["export", "run", "--out", "whole", "--dtype", "float32"], tmp_path))
    sample = ["--label", "3", "--label", "7", "--vae", "tiny", "--device", "cpu"]
    for guidance in ([], ["--guidance", "1.5"]):
        for target in ("run", "whole"):
            done(commands(["sample", target, *sample, *guidance, "--out", f"{target}{len(guidance)}"], tmp_path))
        images = [Image.open(tmp_path / f"{target}{len(guidance)}" / "0001.png") for target in ("run", "whole")]
        assert images[0].size == (64, 64)
        assert images[0].tobytes() == images[1].tobytes()
        told = json.loads((tmp_path / f"run{len(guidance)}" / "samples.json").read_text())
        assert told["guidance"] == (1.5 if guidance else 2.7)
    for target in ("run", "whole"):
        refused = commands(["sample", target, *sample, "--guidance", "9", "--out", "refused"], tmp_path)
        assert refused.code == 2, refused
        assert "Error: --guidance must lie in [1, 3]" in refused.err
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_commands_of_their_own_take_seconds(tmp_path: Path) -> None:
    """Imports and all: 7 to 9 s each, of which nearly all goes to importing torch, diffusers and peft.

    Of the processor, which on an idle machine are those of the clock, as they have one thread.
    """
    chain = [
        ["distill", "scale/qwen.toml", "--tiny", "--set", "engine.device=cpu", "--set", "run.out=run"],
        ["export", "run", "--out", "adapter"],
        ["sample", "adapter", "--base", "tiny", "--prompt", "a red fox", "--height", "64", "--width", "96"],
    ]
    chain[-1] += ["--device", "cpu", "--out", "images"]
    seconds: dict[str, float] = {}
    for arguments in chain:
        before = os.times()
        process = ended(launch(tmp_path, 1, "-m", "pitools", *arguments))
        after = os.times()
        assert process.code == 0, process.err
        used = after.children_user + after.children_system - before.children_user - before.children_system
        seconds[arguments[0]] = round(used, 1)
    assert Image.open(tmp_path / "images" / "0000.png").size == (96, 64)
    assert 0 < sum(seconds.values()) < 60, seconds


def test_tiny_is_refused_where_there_is_nothing_to_stand_for(commands: Commands, tmp_path: Path) -> None:
    refused = commands(["distill", "toys/digits.toml", "--tiny"], tmp_path)
    assert refused.code == 2
    assert refused.err.startswith("Error: --tiny: a DiT without weights has no tiny form")
    assert list(tmp_path.iterdir()) == []
