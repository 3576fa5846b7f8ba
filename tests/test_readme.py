"""The README's own code, and its commands."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training.recipes import tiny, write

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"(?<!-->\n)```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python_blocks_run(code: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr


def marked(name: str, language: str) -> str:
    """The code block under a marker."""
    block = re.search(rf"<!-- {name} -->\n```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert block is not None
    return block[1]


def test_the_backbone_of_a_third_party_is_distilled(tmp_path: Path) -> None:
    code = marked("backbone", "python")
    assert len(code.splitlines()) <= 40, "short enough to be read before it is copied"
    (tmp_path / "my_backbone.py").write_text(code)
    package = tmp_path / "mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[pitools.backbones]\nmine = my_backbone:Mine\n")
    recipe = write(tmp_path / "recipe.toml", tiny(backbone={"name": "mine", "width": 16}))
    run = subprocess.run(
        [sys.executable, "-m", "pitools", "distill", str(recipe)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs" / "recipe" / "gm-2nfe" / "student.safetensors").is_file()


def test_the_backbone_of_a_third_party_draws_from_its_generator_alone() -> None:
    from pitools.policies import GMHead

    made: dict[str, Any] = {"__name__": "my_backbone"}
    exec(marked("backbone", "python"), made)
    before = torch.get_rng_state()

    def weights(seed: int) -> Tensor:
        """Of a teacher and its student, one after the other from the same generator."""
        generator, backbone = torch.Generator().manual_seed(seed), made["Mine"](width=4)
        teacher = backbone.teacher(generator)
        networks = (teacher, backbone.student(teacher, GMHead(2), generator))
        return torch.cat([value.flatten() for network in networks for value in network.parameters()])

    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.rand(1)
        assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)


def test_the_adapters_block_runs_on_a_tiny_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pitools.policies import GMHead, NetworkStudent
    from pitools.types import PIXELWISE, Schedule
    from scale.adapted import AdaptedPolicy, Base, Heads, LoRA
    from scale.pipelines import PiQwenImagePipeline, pipeline_for
    from scale.published import save_adapter
    from scale.qwen import QwenForm

    def tiny_pipe(*_: object, **__: object) -> object:
        pipe = pipeline_for("qwen", "tiny", "float32")
        pipe.to = lambda *_: pipe  # there is no GPU
        return pipe

    source = tiny_pipe()
    generator = torch.Generator().manual_seed(0)
    network = AdaptedPolicy(Base(source.transformer, QwenForm()), GMHead(8).sizes, LoRA(4), Heads(), generator)
    student = NetworkStudent(network, GMHead(8), Schedule(4, 3.2, 0.5, "auto"), PIXELWISE)
    save_adapter(student, tmp_path / "Lakonik" / "pi-Qwen-Image" / "gmqwen_k8_piid_4step")
    monkeypatch.setattr(PiQwenImagePipeline, "from_pretrained", tiny_pipe)
    monkeypatch.chdir(tmp_path)
    code, found = re.subn(r"height=1024,\s+width=1536", "height=64, width=96", marked("adapters", "python"))
    assert found == 1
    exec(code, {})
    assert (tmp_path / "fox.png").is_file()


def test_there_are_two_commands_and_some_code() -> None:
    assert BLOCKS
    for marker, command in (("main", "pitools toy --policy gm"), ("tests", "python -m pytest")):
        assert command in marked(marker, "sh")
