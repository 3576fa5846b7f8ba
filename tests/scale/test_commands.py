"""`pitools cache` of a DiT's images, what is trained on it, and what users are told of requests that cannot be met."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from forked import Commands, Run
from PIL import Image

from scale.dit import DiT

RECIPE = "scale/dit-gm-fm-k32.toml"
SIZES = {"size": 8, "layers": 2, "heads": 2, "head_width": 16, "classes": 2}
SET = [
    *(f"--set=backbone.{key}={value}" for key, value in SIZES.items()),
    *("--set=backbone.weights=teacher", "--set=data.height=64", "--set=data.width=64"),
]
CACHE = ["cache", RECIPE, *SET, "--images-from", "images", "--vae", "vae", "--batch", "2", "--device", "cpu"]
TRAIN = ["training.steps=2", "training.batch=4", "engine.precision=float32", "engine.device=cpu"]
DISTILL = ["distill", RECIPE, *SET, *(f"--set={each}" for each in (*TRAIN, "engine.tensorboard=false"))]


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with Commands("scale.encoders", "scale.pipelines", "scale.published", "scale.stubs", "bitsandbytes") as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes, and a tiny random VAE and teacher, in folders."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4,) * 4,
    }
    AutoencoderKL(layers_per_block=1, norm_num_groups=2, **blocks).save_pretrained(folder / "vae")
    teacher = DiT(**SIZES, weights="random").teacher(torch.Generator().manual_seed(0))
    teacher.transformer.save_pretrained(folder / "teacher")
    for label in ("n01", "n02"):
        (folder / "images" / label).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((80, 70), 50).convert("RGB").save(folder / "images" / label / f"{number}.png")
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A copy of the inputs, to work in, and a list of prompts."""
    (tmp_path / "list.txt").write_text("a fox\n")
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    return tmp_path


def told(run: Run, code: int = 2) -> str:
    """The one line that a refusal consists of."""
    assert run.code == code, run
    lines = run.err.splitlines()
    assert len(lines) == 1, run.err
    assert lines[0].startswith("Error: ")
    return lines[0].removeprefix("Error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_dit_is_distilled_from_images(commands: Commands, folder: Path) -> None:
    cached = commands(CACHE, folder)
    assert cached.code == 0, cached
    assert "Wrote 6 samples to caches/imagenet/" in cached.out
    before = contents(folder / "caches")
    trained = commands(DISTILL, folder)
    assert trained.code == 0, trained
    (row,) = json.loads((folder / "runs" / "dit-gm-fm-k32" / "metrics.json").read_text())["students"]
    assert row["steps"] == 2
    assert row["loss"] > 0
    # Nothing is done twice.
    assert commands(CACHE, folder, before="import torch; at(torch.nn.Conv2d, 'forward', 1, die)").code == 0
    assert contents(folder / "caches") == before


def test_a_dit_is_distilled_from_labels_alone(commands: Commands, folder: Path) -> None:
    data_free = "--set=students.gm.objective.data_free=true"
    cached = commands(["cache", RECIPE, *SET, data_free], folder)
    assert cached.code == 0, cached
    assert "Wrote 2 samples" in cached.out
    assert commands([*DISTILL, data_free], folder).code == 0
    refused = commands([*DISTILL, "--set=run.out=other"], folder)
    assert "starts from them" in told(refused)
    assert not (folder / "other").exists()


@pytest.mark.parametrize(("action", "code"), [("die", -9), ("interrupt", 130)])
def test_an_interrupted_cache_goes_on(commands: Commands, folder: Path, action: str, code: int) -> None:
    stopped = commands(CACHE, folder, before=f"import scale.encoders as e; at(e, '_pixels', 2, {action}, after=True)")
    assert stopped.code == code, stopped
    assert stopped.err == ("Stopped. Run the same command again to go on.\n" if action == "interrupt" else "")
    assert "is incomplete, 0 of 1 shards; run `pitools cache` again to go on" in told(commands(DISTILL, folder), 1)
    assert commands(CACHE, folder).code == 0
    again = folder / "again"
    assert commands([*CACHE, "--set=data.folder=again"], folder).code == 0
    assert contents(again) == contents(folder / "caches" / "imagenet")


REFUSED = {
    "trains from images: add --images-from FOLDER": ["cache", RECIPE, *SET],
    "is for classes, and takes no --prompts": [*CACHE, "--prompts", "list.txt"],
    "is for classes, and takes no --images; use --images-from FOLDER": [*CACHE, "--images"],
    "must have a subfolder for each of 1000 classes, got 2 subfolders": ["cache", RECIPE, "--images-from", "images"],
    "vae 'teacher' cannot be loaded: it is a DiTTransformer2DModel": [*CACHE, "--vae", "teacher"],
    "is for prompts, and takes no --images-from": ["cache", "scale/qwen.toml", "--images-from", "images"],
    "is for prompts; name a list of them with --prompts": ["cache", "scale/qwen-datafree.toml"],
    "trains from images: add --images, and images in the list": ["cache", "scale/qwen.toml", "--prompts", "list.txt"],
    "the prompt list 'none.txt' is no file": ["cache", "scale/qwen-datafree.toml", "--prompts", "none.txt"],
    "images come with JSON lines, CSV or parquet, and list.txt has prompts alone": [
        *("cache", "scale/qwen.toml", "--prompts", "list.txt", "--images"),
    ],
    "width must be a multiple of 16 pixels, got 1000": [*CACHE, "--set=data.width=1000"],
    "trains on no cache": ["cache", "toys/digits.toml"],
    'device must be "auto", "cpu" or "cuda", got \'tpu\'': [*CACHE, "--device", "tpu"],
    "is neither the folder of a run nor of one of its students": ["export", "images"],
    "height must be a multiple of 16 pixels, got 1000; use 992": [
        "sample",
        "any",
        "--prompt",
        "a fox",
        "--height=1000",
    ],
    "--best-of N needs --scorer MODULE:FUNCTION": ["sample", "any", "--prompt", "a fox", "--best-of", "4"],
    "and the other way round": ["sample", "any", "--label", "1", "--scorer", "taste:score"],
    "the scorer's module 'nowhere_at_all' cannot be imported": [
        *("sample", "any", "--label", "1", "--best-of", "4", "--scorer", "nowhere_at_all:score"),
    ],
    "vae/config.json/out cannot be written": ["sample", "any", "--prompt", "a fox", "--out", "vae/config.json/out"],
    "vae/config.json cannot be written: vae/config.json is no folder": ["export", "any", "--out", "vae/config.json"],
    "vae/config.json is no folder; name another": [*CACHE, "--set=data.folder=vae/config.json/x"],
    "weights 'tiny' come without encoders": [
        *("cache", "scale/qwen-datafree.toml", "--set=backbone.weights=tiny", "--prompts", "list.txt"),
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_request_that_cannot_be_met_is_refused_in_a_line(commands: Commands, folder: Path, message: str) -> None:
    before = contents(folder)
    assert message in told(commands(REFUSED[message], folder))
    assert contents(folder) == before
