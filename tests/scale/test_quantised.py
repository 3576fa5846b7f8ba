"""Students on quantised bases: what is quantised and what is not, gradients, and that training works on them."""

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from pitools.guidance import Teacher
from pitools.objectives import PiID, segment_losses
from pitools.policies import GMHead, NetworkStudent
from pitools.training import keyed_generator
from pitools.types import Schedule
from scale.adapted import ADAPTER, AdaptedPolicy, Base
from scale.backbone import TINY_TEXT, Flux, Flux2, QwenImage, TextToImage
from scale.quantise import Quantisation, loading_options, quantise

BACKBONES: dict[str, TextToImage] = {"qwen": QwenImage(), "flux": Flux(), "flux2": Flux2()}
KINDS: tuple[Quantisation, ...] = ("nf4", "int8", "fp8")
HEAD = GMHead(3)
T = torch.tensor([1.0, 0.35])

every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(backbone: TextToImage, kind: Quantisation) -> TextToImage:
    return replace(backbone.tiny(), dtype="bf16", quantise=kind)


def made(backbone: TextToImage) -> tuple[Base, AdaptedPolicy]:
    base = backbone.teacher(keyed_generator(0, "teacher"))
    return base, backbone.student(base, HEAD, keyed_generator(1, "student"))


def inputs(backbone: TextToImage, batch: int = 2) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = keyed_generator(2, "inputs")
    x = torch.randn(batch, backbone.channels, 4, 6, generator=generator)
    given = {"encoder_hidden_states": torch.randn(batch, 5, TINY_TEXT, generator=generator)}
    if isinstance(backbone, Flux):
        given["pooled_projections"] = torch.randn(batch, TINY_TEXT, generator=generator)
    return x, T[:batch], given


def trained(network: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def quantised_layers(transformer: nn.Module, kind: Quantisation) -> set[str]:
    kinds: dict[str, Any] = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}
    if kind != "fp8":
        return {name for name, module in transformer.named_modules() if isinstance(module, kinds[kind])}
    modules = transformer.named_modules()
    return {name for name, module in modules if getattr(module, "weight", None) is not None and is_fp8(module.weight)}


def is_fp8(value: Tensor) -> bool:
    return value.dtype == torch.float8_e4m3fn


@every_backbone
@every_kind
def test_every_linear_layer_is_quantised_but_the_last_norms_and_the_projection(
    backbone: TextToImage, kind: Quantisation
) -> None:
    transformer = tiny(backbone, "none").transformer(keyed_generator(0, "teacher"))
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    expected = linear - {"norm_out.linear", "proj_out"}
    if kind == "fp8":  # adaptive norms have linear layers, which diffusers leaves alone
        expected = {name for name in expected if "norm" not in name}
    assert quantised_layers(quantise(transformer, kind), kind) == expected
    if isinstance(backbone, Flux):
        assert "single_transformer_blocks.0.proj_out" in expected
    assert not any(value.requires_grad for value in transformer.parameters())
    assert not any(module.training != transformer.training for module in transformer.modules())


@every_backbone
@every_kind
def test_a_quantised_teacher_is_near_the_exact_one(backbone: TextToImage, kind: Quantisation) -> None:
    x, t, given = inputs(backbone)
    with torch.no_grad():
        exact, rough = (
            tiny(backbone, each).teacher(keyed_generator(0, "teacher"))(x, t, given) for each in ("none", kind)
        )
    error = (rough - exact).float().square().mean().sqrt() / exact.float().std()
    assert 1e-4 < error < {"nf4": 0.25, "int8": 0.05, "fp8": 0.1}[kind]


@every_backbone
@every_kind
def test_gradients_reach_lora_norm_and_heads_and_the_teacher_stays(backbone: TextToImage, kind: Quantisation) -> None:
    backbone = tiny(backbone, kind)
    base = backbone.teacher(keyed_generator(0, "teacher"))
    x, t, given = inputs(backbone)
    with torch.no_grad():
        before = base(x, t, given)
    student = backbone.student(base, HEAD, keyed_generator(1, "student"))
    student.checkpoint_gradients()
    parameters = trained(student)
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    for _ in range(2):
        with torch.no_grad():
            base(x, t, given)
        outputs = student(x, t, given)
        assert {value.dtype for value in outputs} == {torch.float32}
        sum(
            ((value - 0.1) * torch.linspace(0.5, 1.5, value[0].numel()).view_as(value[0])).square().sum()
            for value in outputs
        ).backward()
        assert all(value.grad is not None and value.grad.isfinite().all() for value in parameters.values())
        with torch.no_grad():
            for value in parameters.values():
                value.sub_(0.02 * value.grad.sign())
    silent = [name for name, value in parameters.items() if not value.grad.any()]
    assert not silent
    student.eval()
    with torch.no_grad():
        assert torch.equal(base(x, t, given), before)
    assert quantised_layers(student.norm_out, kind) == quantised_layers(student.heads, kind) == set()
    lora = {name for name, _ in student.transformer.named_modules() if f".{ADAPTER}" in name}
    assert lora
    assert not lora & quantised_layers(student.transformer, kind)


@every_backbone
@every_kind
def test_a_student_starts_alike_whatever_its_base_is_quantised_to(backbone: TextToImage, kind: Quantisation) -> None:
    exact, rough = (trained(made(tiny(backbone, each))[1]) for each in ("none", kind))
    assert exact.keys() == rough.keys()
    assert all(torch.equal(exact[name], rough[name]) for name in exact)


@every_kind
def test_a_tiny_qwen_learns_on_a_quantised_base(kind: Quantisation) -> None:
    """The same two samples over and over: their π-ID loss falls."""
    backbone = tiny(QwenImage(), kind)
    base, network = made(backbone)
    student = NetworkStudent(network.train(), HEAD, Schedule(nfe=2, shift=3.2), backbone.factorisation)
    x, _, given = inputs(backbone)
    objective = PiID(data_free=True, states=2, step_size=1 / 16)
    optimiser = torch.optim.Adam(trained(network).values(), lr=1e-2)
    losses = []
    for step in range(8):
        optimiser.zero_grad()
        total = 0.0
        for part in segment_losses(objective, Teacher(base), student, x, given, step, keyed_generator(0, "train")):
            part.loss.backward()
            total += float(part.loss.detach())
        optimiser.step()
        losses.append(total)
    assert losses[-1] < 0.7 * losses[0], losses


def test_a_base_asked_without_a_graph_still_has_gradients_afterwards() -> None:
    """bitsandbytes repacks 4-bit weights for inference on some CPUs, and its product with those has no gradient."""
    backbone = tiny(Flux(), "nf4")
    base = backbone.teacher(keyed_generator(0, "teacher"))
    x, t, given = inputs(backbone)
    with torch.no_grad():
        base(x, t, given)
    x.requires_grad_()
    assert torch.autograd.grad(base(x, t, given).sum(), x)[0].any()


@every_kind
def test_what_has_lora_is_not_quantised(kind: Quantisation) -> None:
    transformer = tiny(QwenImage(), "none").transformer(keyed_generator(0, "teacher"))
    transformer.add_adapter(LoraConfig(target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="quantised before it gets LoRA, got one with style"):
        quantise(transformer, kind)


def test_diffusers_is_told_to_quantise_as_it_loads_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loading_options("nf4", dtype) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loading_options("none", dtype) == loading_options("fp8", dtype) == {}
    four = loading_options("nf4", dtype)["quantization_config"]
    assert (four.load_in_4bit, four.bnb_4bit_quant_type, four.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert four.bnb_4bit_compute_dtype == dtype
    assert four.llm_int8_skip_modules == ["norm_out", "proj_out"]
    eight = loading_options("int8", dtype)["quantization_config"]
    assert (eight.load_in_8bit, eight.llm_int8_skip_modules) == (True, ["norm_out", "proj_out"])


@every_kind
def test_a_saved_transformer_is_quantised_as_it_is_loaded(kind: Quantisation, tmp_path: Any) -> None:
    backbone = tiny(Flux(), "none")
    backbone.transformer(keyed_generator(0, "teacher")).save_pretrained(tmp_path / "transformer")
    loaded = replace(backbone, weights=str(tmp_path), quantise=kind).transformer(keyed_generator(5, "unused"))
    direct = tiny(backbone, kind).transformer(keyed_generator(0, "teacher"))
    assert quantised_layers(loaded, kind) == quantised_layers(direct, kind) != set()
    x, t, given = inputs(backbone)
    with torch.no_grad():
        answers = [Base(each.eval(), backbone.form)(x, t, given) for each in (loaded, direct)]
    assert torch.equal(*answers)
