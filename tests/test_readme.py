"""The README's own code, and its commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
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
    (tmp_path / "my_backbone.py").write_text(marked("backbone", "python"))
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
