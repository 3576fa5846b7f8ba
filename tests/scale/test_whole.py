"""Whole students of the DiT, in the layout of the published ImageNet weights; and teachers in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import pitools as pi
from pitools.policies import DXHead, GMHead, Head, NetworkFlowMap, NetworkStudent, PolynomialHead
from pitools.training import keyed_generator
from pitools.types import Schedule
from scale.dit import DiT, DiTFlowMap, DiTHead, DiTPolicy, DiTVelocity, share_embedding
from scale.whole import DiTFlowMapStudent, load_whole, save_whole

C, P = 3, 2
HEADS: dict[str, Head] = {"gm": GMHead(4), "dx": DXHead(5), "polynomial": PolynomialHead(3)}
SCHEDULE = Schedule(nfe=2)
LABELS = {"class_labels": torch.tensor([0, 5])}
DIT = DiT(C, 8, P, 2, 2, 8, 5, weights="random", timesteps=1.0, frequency_shift=0.0, head=DiTHead(log_std_width=8))


@torch.no_grad()
def student_of(head: Head, shared: bool) -> NetworkStudent:
    teacher = DIT.teacher(keyed_generator(0, "teacher"))
    if shared:
        share_embedding(teacher.transformer)
    network = DIT.student(teacher, head, keyed_generator(1, "head"))
    generator = keyed_generator(2, "shake")
    for value in network.parameters():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return NetworkStudent(network.eval(), head, SCHEDULE, DIT.factorisation)


def noise() -> Tensor:
    return torch.randn(2, C, 8, 8, generator=keyed_generator(3, "noise"))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_saved_and_loaded_it_samples_the_same_bits(name: str, shared: bool, tmp_path: Path) -> None:
    student = student_of(HEADS[name], shared)
    save_whole(student, tmp_path)
    again = load_whole(tmp_path)
    assert again.schedule == SCHEDULE
    assert again.head == HEADS[name]
    ends = [pi.sample(one, noise(), conditions=LABELS) for one in (student, again)]
    assert torch.equal(*ends)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert ("emb.timestep_embedder.linear_1.weight" in tensors) == shared
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == ("GMDiTTransformer2DModelV2" if name == "gm" else "DiTTransformer2DModel")


def test_every_channel_of_a_file_reaches_its_place(tmp_path: Path) -> None:
    """Rows of the heads, counted by hand: place in the patch slowest, then component, then channel."""
    student = student_of(HEADS["gm"], shared=True)
    save_whole(student, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for key in ("proj_out_means", "proj_out_logweights"):
        tensors[f"{key}.weight"].zero_()
        tensors[f"{key}.bias"].copy_(torch.arange(len(tensors[f"{key}.bias"])))
    save_file(tensors, path)  # without metadata, as others may write it
    network = load_whole(tmp_path).network
    outputs = network(noise(), torch.ones(2), LABELS)
    for row in range(8):
        for column in range(8):
            place = (row % P) * P + column % P
            for k in range(4):
                assert outputs.factor[0, row * 8 + column, k] == place * 4 + k
                for c in range(C):
                    assert outputs.velocities[0, row * 8 + column, k, c] == (place * 4 + k) * C + c


@pytest.mark.parametrize(
    ("name", "timesteps", "nfe"), [("gmrepa_k4_piid_2step", 1.0, 2), ("gmdit_k4_piid_1step", 1000.0, 1)]
)
def test_without_metadata_the_name_tells(name: str, timesteps: float, nfe: int, tmp_path: Path) -> None:
    folder = tmp_path / name
    save_whole(student_of(HEADS["gm"], shared=True), folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path)
    again = load_whole(folder)
    assert isinstance(again.network, DiTPolicy)
    assert again.network.timesteps == timesteps
    assert again.schedule == Schedule(nfe=nfe)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("with_log_std", [False, True])
def test_a_published_teacher_is_read(suffix: str, with_log_std: bool, tmp_path: Path) -> None:
    whole = DIT.teacher(keyed_generator(0, "teacher"))
    share_embedding(whole.transformer)
    tensors = {}
    for key, value in whole.transformer.named_parameters():
        tensors[key.replace("transformer_blocks.0.norm1.emb.", "emb.")] = value.detach().clone()
    if with_log_std:
        for kind in ("weight", "bias"):
            rows = tensors[f"proj_out_2.{kind}"].unflatten(0, (P * P, C))
            extra = torch.full_like(rows[:, :1], 7.0)
            tensors[f"proj_out_2.{kind}"] = torch.cat([rows, extra], dim=1).flatten(0, 1)
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": tensors, "meta": {"step": 3}}, path)
    else:
        save_file(tensors, path)
    read = replace(DIT, weights=str(path)).teacher(torch.Generator())
    assert isinstance(read, DiTVelocity)
    t = torch.tensor([0.3, 0.9])
    assert torch.equal(read(noise(), t, LABELS), whole(noise(), t, LABELS))
    student = DIT.student(read, HEADS["gm"], torch.Generator())
    blocks = student.transformer.transformer_blocks
    assert blocks[0].norm1.emb is blocks[1].norm1.emb  # the copy shares, too


BAD = {
    "a missing tensor": (
        lambda tensors: tensors.pop("proj_out_1.bias"),
        "misses 1 weights, transformer.proj_out_1.bias",
    ),
    "a surplus one": (lambda tensors: tensors.update(other=torch.zeros(1)), "has surplus 1 weights, transformer.other"),
    "another size": (lambda tensors: tensors.update({"proj_out_1.bias": torch.zeros(3)}), "must be (32,), got (3,)"),
    "no number": (lambda tensors: tensors["proj_out_1.bias"].fill_(torch.nan), "is not finite"),
    "no head": (lambda tensors: tensors.pop("proj_out_means.weight"), "proj_out_means.weight"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    save_whole(student_of(HEADS["gm"], shared=True), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change, message = BAD[name]
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r".") as caught:
        load_whole(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def flow_map_of(guided: bool = True, shared: bool = False, lora: int = 0) -> DiTFlowMapStudent:
    teacher = DIT.teacher(keyed_generator(0, "teacher"))
    if shared:
        share_embedding(teacher.transformer)
    scalars = ("delta", "guidance") if guided else ("delta",)
    network = DIT.flow_map(teacher, scalars, keyed_generator(1, "flow map"), lora)
    generator = keyed_generator(2, "shake")
    for value in network.parameters():
        value.add_(0.1 * torch.randn(value.shape, generator=generator))
    strengths = (2.0, (1.0, 3.0)) if guided else (None, None)
    return DiTFlowMapStudent(NetworkFlowMap(network.eval()), DIT.factorisation, *strengths)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("guided", [False, True])
def test_a_flow_map_saved_and_loaded_samples_the_same_bits(guided: bool, shared: bool, tmp_path: Path) -> None:
    student = flow_map_of(guided, shared)
    save_whole(student, tmp_path)
    again = load_whole(tmp_path)
    assert isinstance(again, DiTFlowMapStudent)
    assert (again.guidance, again.strengths) == (student.guidance, student.strengths)
    assert again.network.scalars == student.network.scalars
    assert again.schedule == Schedule(nfe=1)
    for conditions in (LABELS, {**LABELS, "guidance": 1.5}):
        assert torch.equal(*(pi.sample(one, noise(), conditions=conditions) for one in (student, again)))
    delta = torch.tensor([0.25, 0.5])
    given = {**LABELS, "guidance": delta + 1}
    with torch.no_grad():
        assert torch.equal(*(one.flow_map(noise(), delta, given) for one in (student, again)))
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert ("emb.timestep_embedder.linear_1.weight" in tensors) == shared
    assert ("embeddings.guidance.outer.weight" in tensors) == guided
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "DiTFlowMap"


def test_averages_of_a_flow_map_are_written_in_the_place_of_its_weights(tmp_path: Path) -> None:
    student = flow_map_of()
    averages = {name: value / 2 for name, value in student.network.named_parameters()}
    save_whole(student, tmp_path, weights=averages, dtype=torch.bfloat16)
    again = load_whole(tmp_path)
    assert isinstance(again.network, DiTFlowMap)
    for name, value in again.network.named_parameters():
        assert torch.equal(value, averages[name].bfloat16().float())


def test_what_is_no_flow_map_to_be_saved_is_refused(tmp_path: Path) -> None:
    student = flow_map_of()
    teacher = DIT.teacher(keyed_generator(0, "teacher"))
    auxiliary = DIT.flow_map(teacher, ("guidance",), keyed_generator(1, "auxiliary"))
    with pytest.raises(ValueError, match="must be a DiTFlowMap, got DiTVelocity"):
        save_whole(replace(student, flow_map=NetworkFlowMap(teacher)), tmp_path)
    with pytest.raises(ValueError, match=r"embeds \"delta\", and this network \('guidance',\)"):
        save_whole(replace(student, flow_map=NetworkFlowMap(auxiliary)), tmp_path)
    with pytest.raises(ValueError, match="by LoRA has no form to be saved whole"):
        save_whole(flow_map_of(lora=2), tmp_path)
    averages = dict(student.network.named_parameters())
    averages.pop("embeddings.delta.inner.bias")
    with pytest.raises(ValueError, match=r"lack 1 of the student's parameters, embeddings\.delta\.inner\.bias first"):
        save_whole(student, tmp_path, weights=averages)
    with torch.no_grad():
        student.network.embeddings["delta"].outer.bias[0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match=r"weights of embeddings\.delta\.outer\.bias are not finite"):
        save_whole(student, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "message"),
    [("embeddings.guidance.inner.weight", "misses 1 weights, embeddings.guidance.inner.weight first"), (None, "lacks")],
)
def test_a_bad_file_of_a_flow_map_is_refused(key: str | None, message: str, tmp_path: Path) -> None:
    save_whole(flow_map_of(), tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        told = json.loads(file.metadata()["pitools"])
    if key is None:
        del told["scalars"]
    else:
        del tensors[key]
    save_file(tensors, path, {"pitools": json.dumps(told)})
    with pytest.raises(ValueError, match=message):
        load_whole(tmp_path)
