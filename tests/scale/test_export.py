"""Students out of their runs: adapters by name, averages or not, and merged into their bases."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pitools.policies import GMHead, NetworkStudent
from pitools.sampling import sample
from pitools.training import CheckpointError, checkpoint, recipe
from pitools.training.config import parse, to_toml
from pitools.training.recipe import Plan, Recipe
from pitools.training.students import build_student, members
from pitools.types import Schedule
from scale import export as module
from scale.adapted import ADAPTER, AdaptedPolicy, Base
from scale.backbone import TINY_TEXT, Flux, Flux2, QwenImage, TextToImage
from scale.dit import DiT
from scale.export import export, merge_adapter
from scale.published import CONFIG, WEIGHTS, load_adapter, trained_parameters
from scale.quantise import quantise

BACKBONES: dict[str, TextToImage] = {"qwen": QwenImage().tiny(), "flux": Flux().tiny(), "flux2": Flux2().tiny()}
STUDENTS: dict[str, dict[str, object]] = {
    "gm": {"policy": "gm", "components": 3},
    "dx": {"policy": "dx", "grid_points": 4},
    "polynomial": {"policy": "polynomial", "grid_points": 3},
}
SHARED = {"nfe": [4], "shift": 3.2, "final_step_scale": 0.5}

every_backbone = pytest.mark.parametrize("name", BACKBONES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shaken(parameters: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in parameters.items()}


def network_of(student: NetworkStudent) -> AdaptedPolicy:
    assert isinstance(student.network, AdaptedPolicy)
    return student.network


def drawn(student: NetworkStudent, name: str) -> Tensor:
    conditions = {"encoder_hidden_states": torch.randn(2, 5, TINY_TEXT, generator=seeded(3))}
    if name == "flux":
        conditions["pooled_projections"] = torch.randn(2, TINY_TEXT, generator=seeded(4))
    noise = torch.randn(2, BACKBONES[name].channels, 4, 6, generator=seeded(5))
    return sample(student, noise, conditions=conditions, step_size=1 / 16)


def student_on(name: str, transformer: Any) -> NetworkStudent:
    """A trained student, as it were, ready to sample."""
    section = BACKBONES[name]
    network = section.student(Base(transformer, section.form), GMHead(3), seeded(2))
    own = trained_parameters(network)
    with torch.no_grad():
        for key, value in shaken(own, 7).items():
            own[key].copy_(value)
    return NetworkStudent(network.eval(), GMHead(3), Schedule(4, 3.2, 0.5, "auto"), section.factorisation)


class Run:
    """The folder of a run that has been trained, as it were; its students' weights are drawn."""

    def __init__(self, folder: Path, backbone: Any, students: Mapping[str, Mapping[str, object]]) -> None:
        table: dict[str, object] = {
            "data": {"name": "prompts"},
            "backbone": {"name": "any"},
            "teacher": {"guidance": {"embedded" if getattr(backbone, "embeds_guidance", False) else "scale": 2.5}},
            "training": {"steps": 10, "batch": 2},
            "students": {name: {**SHARED, **section} for name, section in students.items()},
        }
        self.folder, self.backbone = folder, backbone
        self.plan = Plan(parse(Recipe, table), cast(Any, None), backbone, folder, {}, "")
        self.weights: dict[str, dict[str, dict[str, Tensor]]] = {}
        folder.mkdir(parents=True)
        (folder / "recipe.toml").write_text(to_toml(table))
        if not isinstance(backbone, TextToImage):
            return
        for seed, member in enumerate(members(self.plan)):
            student = build_student(self.plan, member, backbone.teacher(seeded(0)))
            own = trained_parameters(network_of(student))
            self.weights[member.label] = {"ema": shaken(own, 10 + seed), "model": shaken(own, 20 + seed)}
            checkpoint.write_tensors(member.folder / "student.safetensors", self.weights[member.label]["ema"])
            checkpoint.save(member.folder / "checkpoints", 10, {"model": self.weights[member.label]["model"]}, {})

    def planned(self, table: Mapping[str, object], name: str) -> Plan:
        """In the place of `plan`, as there are no prompts to read."""
        assert parse(Recipe, table) == self.plan.recipe
        assert name == self.folder.name
        return Plan(self.plan.recipe, cast(Any, None), self.backbone, Path("elsewhere"), {}, "")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Run:
    name, students = getattr(request, "param", ("qwen", ("gm",)))
    made = Run(tmp_path / "run", BACKBONES[name], {student: STUDENTS[student] for student in students})
    monkeypatch.setattr(recipe, "plan", made.planned)
    return made


def published(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of the student that an adapter gives, by the names of parameters."""
    loaded = load_adapter(BACKBONES[name].transformer(seeded(1)), folder)
    return {key: value.detach() for key, value in trained_parameters(network_of(loaded)).items()}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("run", [(name, tuple(STUDENTS)) for name in BACKBONES], ids=BACKBONES, indirect=True)
def test_each_student_of_a_run_is_exported_by_its_folder(run: Run, tmp_path: Path) -> None:
    name = next(name for name, section in BACKBONES.items() if section is run.backbone)
    for member in members(run.plan):
        export(member.folder, tmp_path / "out" / member.label)
        assert_equal(published(tmp_path / "out" / member.label, name), run.weights[member.label]["ema"])
        loaded = load_adapter(run.backbone.transformer(seeded(1)), tmp_path / "out" / member.label)
        assert loaded.head == member.section.head
        assert loaded.schedule == Schedule(4, 3.2, 0.5)
        with safe_open(tmp_path / "out" / member.label / WEIGHTS, "pt") as file:
            told = json.loads(file.metadata()["pitools"])
        assert told["guidance"] == run.plan.recipe.teacher.guidance.embedded
        assert told["teacher_guidance"] == asdict(run.plan.recipe.teacher.guidance)


def test_a_run_of_one_student_is_named_by_its_folder(run: Run, tmp_path: Path) -> None:
    export(str(run.folder), tmp_path / "averaged")
    export(run.folder, tmp_path / "last", average=False)
    export(run.folder, tmp_path / "half", dtype=torch.bfloat16)
    weights = run.weights["gm-4nfe"]
    assert_equal(published(tmp_path / "averaged", "qwen"), weights["ema"])
    assert_equal(published(tmp_path / "last", "qwen"), weights["model"])
    rounded = {key: value.bfloat16().float() for key, value in weights["ema"].items()}
    assert_equal(published(tmp_path / "half", "qwen"), rounded)


def test_an_adapter_is_exported_without_the_weights_of_its_base(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(QwenImage, "transformer", loaded)
    export(run.folder, tmp_path / "out")
    assert (tmp_path / "out" / CONFIG).is_file()


def test_a_merged_run_is_a_transformer_and_the_rest_of_the_adapter(run: Run, tmp_path: Path) -> None:
    export(run.folder, tmp_path / "adapter")
    export(run.folder, tmp_path / "out", merge=True)
    # The base is drawn anew from the recipe's seed, as for the run.
    base = run.backbone.teacher(module.keyed_generator(0, "teacher weights")).transformer
    expected = drawn(load_adapter(base, tmp_path / "adapter"), "qwen")
    merged = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "out", subfolder="transformer")
    found = drawn(load_adapter(merged, tmp_path / "out", "adapter"), "qwen")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@every_backbone
def test_a_merged_student_samples_as_before(name: str, tmp_path: Path) -> None:
    transformer = BACKBONES[name].transformer(seeded(1)).eval()
    plain = {key: value.clone() for key, value in transformer.state_dict().items()}
    student = student_on(name, transformer)
    expected = drawn(student, name)
    merge_adapter(student, tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {"transformer", "adapter"}
    merged = type(transformer).from_pretrained(tmp_path, subfolder="transformer")
    changed = {key for key, value in merged.state_dict().items() if not torch.equal(value, plain[key])}
    assert changed == {f"{target}.weight" for target in BACKBONES[name].form.targets(merged)}
    assert json.loads((tmp_path / "transformer" / CONFIG).read_text())["_class_name"] == type(transformer).__name__

    loaded = load_adapter(merged, tmp_path, "adapter")
    assert not [key for key in trained_parameters(network_of(loaded)) if "lora" in key]
    assert ADAPTER not in (getattr(merged, "peft_config", None) or {})
    torch.testing.assert_close(drawn(loaded, name), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(drawn(loaded, name), drawn(student, name))


def test_merging_takes_the_place_of_an_earlier_student(tmp_path: Path) -> None:
    """On a transformer that had LoRA, an adapter without any leaves none in use."""
    merge_adapter(student_on("qwen", BACKBONES["qwen"].transformer(seeded(1)).eval()), tmp_path)
    merged: Any = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    expected = drawn(load_adapter(merged, tmp_path, "adapter"), "qwen")
    student_on("qwen", merged)
    assert torch.equal(drawn(load_adapter(merged, tmp_path, "adapter"), "qwen"), expected)


def test_what_cannot_be_merged_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    student = student_on("qwen", BACKBONES["qwen"].transformer(seeded(1)).eval())
    (tmp_path / "there" / "transformer").mkdir(parents=True)
    with pytest.raises(ValueError, match="transformer exists; name another folder"):
        merge_adapter(student, tmp_path / "there")
    assert ADAPTER in network_of(student).transformer.peft_config
    with pytest.raises(ValueError, match="must be an AdaptedPolicy to be merged, got Linear"):
        merge_adapter(replace(student, network=cast(Any, nn.Linear(2, 2))), tmp_path / "linear")
    for kind in ("nf4", "int8", "fp8"):
        small = student_on("qwen", quantise(BACKBONES["qwen"].transformer(seeded(1)).eval(), cast(Any, kind)))
        with pytest.raises(ValueError, match="a quantised transformer cannot be merged into"):
            merge_adapter(small, tmp_path / kind)
        assert not (tmp_path / kind).exists()
    merge_adapter(student, tmp_path / "once")
    with pytest.raises(ValueError, match="merged already"):
        merge_adapter(student, tmp_path / "twice")


def test_a_disk_that_refuses_leaves_no_half_a_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = student_on("qwen", BACKBONES["qwen"].transformer(seeded(1)).eval())

    def full(self: object, folder: Path) -> None:
        folder.mkdir()
        (folder / CONFIG).write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(type(network_of(student).transformer), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="transformer could not be written: no space left"):
        merge_adapter(student, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("run", [("qwen", ("gm", "dx"))], ids=["two students"], indirect=True)
def test_a_run_of_several_students_asks_which(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must name one student; those of this run are .*gm-4nfe, .*dx-4nfe"):
        export(run.folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"polynomial-4nfe must name one student; those of this run are .*gm-4nfe"):
        export(run.folder / "polynomial-4nfe", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no recipe\.toml"):
        export(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").write_text("[run")
    with pytest.raises(ValueError, match=r"recipe.toml cannot be read"):
        export(tmp_path / "run", tmp_path / "out")


def test_weights_that_are_not_there_or_damaged_are_told(run: Run, tmp_path: Path) -> None:
    folder = run.folder / "gm-4nfe"
    path = folder / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        export(folder, tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match="is not there yet; finish the training, or export without averaging"):
        export(folder, tmp_path / "out")
    (model,) = (folder / "checkpoints").glob("step-*/model.safetensors")
    model.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the checkpoints"):
        export(folder, tmp_path / "out", average=False)
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_weights_of_another_recipe_are_told(run: Run, tmp_path: Path) -> None:
    path = run.folder / "gm-4nfe" / "student.safetensors"
    weights = dict(run.weights["gm-4nfe"]["ema"])
    checkpoint.write_tensors(path, {**weights, "heads.factors.bias": weights["heads.factors.bias"][:5]})
    with pytest.raises(ValueError, match=r"heads.factors.bias must be \(12,\), got \(5,\)"):
        export(run.folder, tmp_path / "out")


def test_a_dit_has_nothing_to_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Run(tmp_path / "run", DiT(), {"gm": STUDENTS["gm"]})
    monkeypatch.setattr(recipe, "plan", made.planned)
    with pytest.raises(ValueError, match=r"is a student on a DiT, trained whole: there is nothing to merge"):
        export(made.folder, tmp_path / "out", merge=True)
