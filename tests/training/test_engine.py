"""Precision and compilation, which change how a network is run and not what it learns."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import tiny, write

pytestmark = pytest.mark.slow

for module in ("accelerate", "diffusers"):
    pytest.importorskip(module)


def losses(folder: Path, **overrides: object) -> list[float]:
    """Of the student of a short run in a process of its own: accelerate keeps one precision for each."""
    folder.mkdir()
    recipe = write(folder / "recipe.toml", tiny(**{"run.out": str(folder / "run"), **overrides}))
    command = [sys.executable, "-m", "pitools", "distill", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (log,) = (folder / "run").glob("*/log.jsonl")
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(tmp_path_factory.mktemp("engine") / "plain")


def test_a_compiled_network_trains_as_the_plain_one_does(plain: list[float], tmp_path: Path) -> None:
    compiled = losses(tmp_path / "compiled", **{"engine.compile": True})
    assert len(plain) > 5
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_bf16_trains_nearly_as_float32_does(plain: list[float], tmp_path: Path) -> None:
    rounded = losses(tmp_path / "bf16", **{"engine.precision": "bf16"})
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.1)


def test_recomputed_activations_give_the_same_training(plain: list[float], tmp_path: Path) -> None:
    recomputed = losses(tmp_path / "recomputed", **{"engine.gradient_checkpointing": True})
    assert recomputed == pytest.approx(plain, rel=1e-5)
