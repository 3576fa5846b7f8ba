"""Transformers that are read once sharded: the same as read at once, and never whole in any process."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from processes import ended, launch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pitools.policies import GMHead
from scale.adapted import LoRA
from scale.backbone import Flux, Flux2, QwenImage, TextToImage
from scale.loading import folder_of, share

BACKBONES = (QwenImage, Flux, Flux2)
FILE = "diffusion_pytorch_model.safetensors"


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(section: TextToImage, folder: Path, **options: Any) -> Path:
    """A tiny random transformer as diffusers saves it."""
    section.transformer(keyed()).save_pretrained(folder / "transformer", **options)
    return folder


def inputs(channels: int = 16, width: int = 12) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    drawn = keyed(1)
    conditions = {"encoder_hidden_states": torch.randn(2, 5, width, generator=drawn)}
    conditions["pooled_projections"] = torch.randn(2, width, generator=drawn)
    return torch.randn(2, channels, 4, 4, generator=drawn), torch.tensor([0.3, 0.9]), conditions


@pytest.mark.parametrize("shards", ["10GB", "100KB"], ids=["one file", "several"])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("cls", BACKBONES, ids=lambda cls: cls.kind)
def test_read_late_is_as_read_at_once(cls: Callable[..., TextToImage], dtype: Any, shards: str, tmp_path: Path) -> None:
    saved(cls(weights="tiny", dtype="float32"), tmp_path, max_shard_size=shards)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) == 1 or shards == "100KB"
    section = cls(weights=str(tmp_path), dtype=dtype, lora=LoRA(rank=2, dropout=0.0))
    late, early = section.sharded_teacher(keyed()), section.teacher(keyed())
    assert not any(value.requires_grad for value in late.parameters())
    assert any(value.is_meta for value in late.parameters())
    students = [section.student(base, GMHead(2), keyed(2)) for base in (late, early)]
    students[0].materialise(torch.device("cpu"))
    found, expected = (dict(student.named_parameters()) for student in students)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert value.requires_grad == expected[name].requires_grad, name
        assert torch.equal(value, expected[name]), name
    x, t, conditions = inputs(section.channels)
    if cls is not Flux:
        del conditions["pooled_projections"]
    assert torch.equal(late(x, t, conditions), early(x, t, conditions))


def test_only_what_students_start_from_is_read_at_first(tmp_path: Path) -> None:
    base = QwenImage(weights=str(saved(QwenImage(weights="tiny"), tmp_path))).sharded_teacher(keyed())
    values = {name.split(".")[1] for name, value in base.named_parameters() if not value.is_meta}
    assert values == {"norm_out", "proj_out"}


def test_files_that_do_not_fit_are_told_by_name(tmp_path: Path) -> None:
    section = QwenImage(weights=str(saved(QwenImage(weights="tiny"), tmp_path)))
    path = tmp_path / "transformer" / FILE
    whole = load_file(path)
    save_file({name: value for name, value in whole.items() if name != "img_in.bias"}, path)
    with pytest.raises(ValueError, match=r"lacks 1 weights of a QwenImageTransformer2DModel, img_in.bias first"):
        section.sharded_teacher(keyed())
    save_file({**whole, "img_in.bias": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=re.escape("img_in.bias has the shape (3,), not (32,)")):
        section.sharded_teacher(keyed())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be loaded"):
        section.sharded_teacher(keyed())
    path.unlink()
    with pytest.raises(ValueError, match=f"cannot be loaded.*{FILE}"):
        section.sharded_teacher(keyed())
    with pytest.raises(ValueError, match="cannot be loaded"):
        QwenImage(weights=str(tmp_path / "transformer")).sharded_teacher(keyed())


def test_what_is_not_read_is_made_as_ever_or_refused() -> None:
    for section in (QwenImage(weights="tiny"), QwenImage(weights="tiny", quantise="nf4")):
        base = section.sharded_teacher(keyed())
        assert base.unread is None
        assert not any(value.is_meta for value in base.parameters())
    for kind in ("int8", "fp8"):
        with pytest.raises(ValueError, match=f'quantise = "{kind}" cannot be sharded; use "nf4", or parallel'):
            QwenImage(weights="tiny", quantise=kind).sharded_teacher(keyed())


def test_a_hub_id_is_downloaded_without_its_other_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, Any]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        if repo == "nobody/nothing":
            raise OSError("no such repository")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folder_of("Qwen/Qwen-Image", "v1") == tmp_path / "transformer"
    assert asked == [("Qwen/Qwen-Image", {"revision": "v1", "allow_patterns": ["transformer/*"]})]
    with pytest.raises(ValueError, match="weights 'nobody/nothing' cannot be loaded: no such repository"):
        QwenImage(weights="nobody/nothing").sharded_teacher(keyed())


def test_a_share_of_a_plain_parameter_is_all_of_it() -> None:
    like = torch.empty(3, 2, dtype=torch.bfloat16, device="meta")
    value = share(torch.arange(6.0).view(3, 2), like, torch.device("cpu"))
    assert value.dtype is torch.bfloat16
    assert value.tolist() == [[0, 1], [2, 3], [4, 5]]


MEASURED = """
import json, sys, threading, time
import diffusers, peft, torch, torch.distributed.fsdp, torch.distributed.tensor
from pitools.policies import GMHead
from pitools.training.engine import Engine, EngineSection
from scale.adapted import LoRA
from scale.backbone import QwenImage

def anonymous():
    # Without the pages of the files that are mapped, which no process owns.
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

def watch():
    while not over.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

engine = Engine(EngineSection(device="cpu", parallel="fsdp2"))
section = QwenImage(weights="wide", lora=LoRA(rank=4, dropout=0.0))
before, over = anonymous(), threading.Event()
peak = [before]
threading.Thread(target=watch, daemon=True).start()
base = engine.place(getattr(section, sys.argv[1])(torch.Generator().manual_seed(0)))
student = engine.prepare(section.student(base, GMHead(2), torch.Generator().manual_seed(0)))
over.set()
x, t, text = torch.load("inputs.pt")
with torch.no_grad():
    velocity = engine.call(base, x, t, {"encoder_hidden_states": text})
torch.save({"growth": peak[0] - before, "velocity": velocity}, f"{sys.argv[1]}-{engine.rank}.pt")
"""


@pytest.mark.slow
def test_no_process_ever_holds_the_whole_model(tmp_path: Path) -> None:
    """A Qwen of 1.5 GB on two processes: of the growth of their own memory, 50 % is what they keep."""
    with init_empty_weights(include_buffers=False):
        # Text of width 15, which two processes cannot halve.
        wide = QwenImageTransformer2DModel(
            num_layers=2, attention_head_dim=128, num_attention_heads=25, joint_attention_dim=15
        )
    wide = wide.to(torch.bfloat16).to_empty(device="cpu")
    drawn = (torch.randn(2**20, generator=keyed()) / 50).bfloat16()
    with torch.no_grad():
        for value in wide.parameters():
            value.copy_(drawn.repeat(-(-value.numel() // len(drawn)))[: value.numel()].view_as(value))
    size = sum(value.numel() * value.element_size() for value in wide.parameters())
    assert size >= 1.5e9
    wide.save_pretrained(tmp_path / "wide" / "transformer", max_shard_size="500MB")
    del wide
    index = json.loads((tmp_path / "wide" / "transformer" / f"{FILE}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2

    x, t, conditions = inputs(width=15)
    text = conditions["encoder_hidden_states"]
    torch.save((x, t, text), tmp_path / "inputs.pt")
    base = QwenImage(weights=str(tmp_path / "wide")).teacher(keyed())
    with torch.no_grad():
        expected = base(x, t, {"encoder_hidden_states": text})
    del base

    (tmp_path / "measured.py").write_text(MEASURED)
    for way in ("sharded_teacher", "teacher"):
        result = ended(launch(tmp_path, 2, "measured.py", way))
        assert result.code == 0, result.err
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{way}-{rank}.pt")
            assert torch.equal(found["velocity"], expected)
            if way == "sharded_teacher":
                assert found["growth"] < 0.6 * size
            else:  # what is measured would show it
                assert found["growth"] > 0.9 * size
