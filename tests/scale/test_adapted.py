"""Qwen-Image, FLUX.1 and FLUX.2 as teacher and student: parity with the transformers of diffusers that they wrap."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from pitools.guidance import Teacher
from pitools.objectives import PiID, segment_losses
from pitools.policies import DXHead, GMHead, Head, NetworkStudent, Outputs, PolynomialHead
from pitools.training import keyed_generator
from pitools.types import PIXELWISE, Schedule
from scale.adapted import ADAPTER, AdaptedPolicy, Base, LoRA, pack, unpack
from scale.backbone import TINY_TEXT, Flux, Flux2, QwenImage, TextToImage

BACKBONES: dict[str, TextToImage] = {"qwen": QwenImage(), "flux": Flux(), "flux2": Flux2()}
HEADS: dict[str, Head] = {"gm": GMHead(3), "dx": DXHead(4), "polynomial": PolynomialHead(3)}
T = torch.tensor([1.0, 0.35])
SCHEDULE = Schedule(nfe=2, shift=3.2)

every_backbone = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


def tiny(backbone: TextToImage, dropout: float = 0.0, spread: float | None = None, **changes: Any) -> TextToImage:
    small = backbone.tiny()
    return replace(small, lora=replace(small.lora, dropout=dropout), head=replace(small.head, spread=spread), **changes)


def made(backbone: TextToImage, head: Head, seed: int = 0) -> tuple[Base, AdaptedPolicy]:
    """A teacher and a new student on it, in evaluation mode."""
    base = backbone.teacher(keyed_generator(seed, "teacher"))
    return base, student_on(base, backbone, head)


def student_on(base: Base, backbone: TextToImage, head: Head, seed: int = 1) -> AdaptedPolicy:
    student = backbone.student(base, head, keyed_generator(seed, "student"))
    return student.eval()


@torch.no_grad()
def shaken(student: AdaptedPolicy, seed: int = 7, size: float = 0.2) -> AdaptedPolicy:
    """The student after a long training, as it were: no trained weight where it started."""
    for name, value in student.named_parameters():
        if value.requires_grad:
            value.add_(size * torch.randn(value.shape, generator=keyed_generator(seed, name)))
    return student


def latents(backbone: TextToImage, batch: int = 2, rows: int = 4, columns: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(batch, backbone.channels, rows, columns, generator=keyed_generator(seed, "latents"))


def conditions(backbone: TextToImage, batch: int = 2, seed: int = 3) -> dict[str, Tensor]:
    generator = keyed_generator(seed, "conditions")
    given = {"encoder_hidden_states": torch.randn(batch, 5, TINY_TEXT, generator=generator)}
    if isinstance(backbone, Flux):
        given["pooled_projections"] = torch.randn(batch, TINY_TEXT, generator=generator)
    if backbone.embeds_guidance:
        given["guidance"] = torch.linspace(2.0, 5.0, batch)
    return given


def trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in student.named_parameters() if value.requires_grad}


def loss_of(outputs: Outputs) -> Tensor:
    """Something that every output matters to."""
    flat = torch.cat([value.flatten() for value in outputs])
    return (flat * torch.linspace(0.5, 1.5, len(flat))).sum()


def gradients(student: AdaptedPolicy, loss: Tensor) -> dict[str, Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in trained(student).items() if value.grad is not None}


# The teacher.


@every_backbone
def test_a_teacher_is_the_transformer_of_diffusers_on_packed_latents(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base = backbone.teacher(keyed_generator(0, "teacher"))
    x, given = latents(backbone), conditions(backbone)
    rows, columns, width = 2, 3, 4 * backbone.channels
    image = [(0, row, column) for row in range(rows) for column in range(columns)]
    places: dict[str, Any]
    if isinstance(backbone, QwenImage):
        places = {"img_shapes": [[(1, rows, columns)]] * 2}
    elif isinstance(backbone, Flux):
        places = {"img_ids": torch.tensor(image, dtype=torch.float32), "txt_ids": torch.zeros(5, 3)}
    else:
        text = [(0, 0, 0, place) for place in range(5)]
        places = {"img_ids": torch.tensor([(*ids, 0) for ids in image]), "txt_ids": torch.tensor(text)}
    tokens = x.view(2, backbone.channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, -1, width)
    with torch.no_grad():
        direct = base.transformer(hidden_states=tokens, timestep=T, return_dict=False, **places, **given)[0]
        u = base(x, T, given)
    grid = direct.view(2, rows, columns, backbone.channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    assert u.std() > 0.05
    assert torch.equal(u, grid.reshape(x.shape))


@pytest.mark.parametrize(("backbone", "scale"), [(Flux(), 3.5), (Flux2(), 4.0)], ids=["flux", "flux2"])
def test_guidance_is_the_published_one_unless_given(backbone: TextToImage, scale: float) -> None:
    backbone = tiny(backbone)
    base = backbone.teacher(keyed_generator(0, "teacher"))
    x, given = latents(backbone), conditions(backbone)
    without = {name: value for name, value in given.items() if name != "guidance"}
    with torch.no_grad():
        usual = base(x, T, without)
        assert torch.equal(usual, base(x, T, {**without, "guidance": torch.full([2], scale)}))
        assert not torch.equal(usual, base(x, T, {**without, "guidance": torch.full([2], scale + 1)}))


@pytest.mark.parametrize("backbone", [Flux(), Flux2()], ids=["flux", "flux2"])
def test_a_student_takes_the_guidance_that_it_is_trained_for_unless_given(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base = backbone.teacher(keyed_generator(0, "teacher"))
    student = backbone.student(base, HEADS["dx"], keyed_generator(1, "student"), guidance=2.0).eval()
    x, given = latents(backbone), conditions(backbone)
    without = {name: value for name, value in given.items() if name != "guidance"}
    with torch.no_grad():
        own, other = (student(x, T, {**without, "guidance": torch.full([2], scale)}) for scale in (2.0, 5.0))
        assert torch.equal(student(x, T, without).velocities, own.velocities)
        assert not torch.equal(own.velocities, other.velocities)


@every_backbone
def test_a_teacher_has_no_dropout_whatever_the_mode(backbone: TextToImage) -> None:
    backbone = tiny(backbone, dropout=0.5)
    transformer = backbone.transformer(keyed_generator(0, "teacher"))
    dropouts = [module for module in transformer.modules() if isinstance(module, nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    base = Base(transformer, backbone.form)
    student = shaken(student_on(base, backbone, HEADS["gm"]))
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        quiet, student_quiet = base.eval()(x, T, given), student(x, T, given)
        student.train()
        assert torch.equal(base(x, T, given), quiet)
        assert not torch.equal(student(x, T, given).velocities, student(x, T, given).velocities)
        student.eval()
        assert torch.equal(student(x, T, given).velocities, student_quiet.velocities)


# Packing and the order of channels.


@every_backbone
def test_packing_is_that_of_the_pipelines_and_round_trips(backbone: TextToImage) -> None:
    from diffusers import Flux2Pipeline, FluxPipeline, QwenImagePipeline

    x = latents(backbone, rows=6, columns=10)
    shape = (2, backbone.channels, 6, 10)
    pipelines: dict[str, Callable[[Tensor], Tensor]] = {
        "QwenImage": lambda x: QwenImagePipeline._pack_latents(x, *shape),
        "Flux": lambda x: FluxPipeline._pack_latents(x, *shape),
        "Flux2": lambda x: Flux2Pipeline._pack_latents(Flux2Pipeline._patchify_latents(x)),
    }
    tokens = pack(x)
    assert tokens.shape == (2, 15, 4 * backbone.channels)
    assert torch.equal(tokens, pipelines[type(backbone).__name__](x))
    assert torch.equal(unpack(tokens, rows=3), x)


@every_backbone
@every_head
def test_channels_are_read_as_published(backbone: TextToImage, head: Head) -> None:
    """Means and grids k * 4 C + c * 4 + p * 2 + q, log-weights k * 4 + p * 2 + q, at place (p, q) of a patch."""
    backbone = tiny(backbone)
    _, student = made(backbone, head)
    heads, channels = student.heads, backbone.channels
    with torch.no_grad():
        for layer in (heads.velocities, heads.factors):
            if layer is not None:
                layer.weight.zero_()
                layer.bias = nn.Parameter(torch.arange(layer.out_features, dtype=torch.float32))
        outputs = student(latents(backbone), T, conditions(backbone))
    count = head.sizes.velocities
    assert outputs.velocities.shape == (2, 24, count, channels)
    for factor in range(24):
        row, column = divmod(factor, 6)
        place = (row % 2) * 2 + column % 2
        expected = [[k * 4 * channels + c * 4 + place for c in range(channels)] for k in range(count)]
        assert outputs.velocities[0, factor].tolist() == expected
        assert outputs.factor[0, factor].tolist() == [k * 4 + place for k in range(head.sizes.factor)]


# How a student starts.


@every_backbone
@every_head
def test_a_new_students_velocities_are_the_teachers(backbone: TextToImage, head: Head) -> None:
    backbone = tiny(backbone, spread=0.0)
    base, student = made(backbone, head)
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        u = PIXELWISE.pack(base(x, T, given)).unsqueeze(2)
        outputs = student(x, T, given)
    starts = head.sizes.start
    expected = u.expand_as(outputs.velocities).clone()
    if starts == "first":
        expected[:, :, 1:] = 0
    assert u.std() > 0.05
    torch.testing.assert_close(outputs.velocities, expected, rtol=0, atol=1e-5)
    assert outputs.factor.shape == (2, 24, head.sizes.factor)
    assert outputs.factor.eq(0).all()
    assert torch.equal(outputs.sample, torch.full((2, head.sizes.sample), math.log(0.05)))


@every_backbone
def test_equal_means_and_a_tiny_deviation_are_the_teachers_velocity_along_the_start(backbone: TextToImage) -> None:
    """Without LoRA's second factors, which start at zero, and where a roll-out starts: on the line along u."""
    backbone = tiny(backbone, spread=0.0)
    base, network = made(backbone, HEADS["gm"])
    assert all(value.eq(0).all() for name, value in trained(network).items() if ".lora_B." in name)
    assert network.heads.samples is not None
    with torch.no_grad():
        nn.init.constant_(network.heads.samples[3].bias, -9.0)  # type: ignore[arg-type]
        student = NetworkStudent(network, HEADS["gm"], SCHEDULE, backbone.factorisation)
        x, given = latents(backbone), conditions(backbone)
        u = PIXELWISE.pack(Teacher(base).velocity(x, T, given))
        policy, packed = student(x, T, given), PIXELWISE.pack(x)
        for share in (1.0, 0.99, 0.8, 0.5):
            moved = packed + ((share - 1) * T).view(-1, 1, 1) * u
            torch.testing.assert_close(policy.velocity(moved, share * T), u, rtol=0, atol=1e-5)


@every_backbone
def test_the_spread_is_drawn_for_each_component_and_channel_and_is_the_same_all_over_a_patch(
    backbone: TextToImage,
) -> None:
    head = GMHead(200)
    base, student = made(tiny(backbone), head)
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        noise = student(x, T, given).velocities - PIXELWISE.pack(base(x, T, given)).unsqueeze(2)
    assert (noise - noise[:1, :1]).abs().max() < 1e-5
    size = 0.1 if isinstance(backbone, Flux2) else 0.05
    each = noise[0, 0]
    assert each.std() == pytest.approx(size, rel=0.1)
    assert each.mean().abs() < size / 10
    assert each.std(0).min() > size / 2
    assert each.std(1).min() > size / 4


@every_backbone
def test_a_student_is_its_seeds_and_leaves_the_global_random_state_alone(backbone: TextToImage) -> None:
    before = torch.get_rng_state()
    first, second = (trained(made(tiny(backbone), HEADS["gm"])[1]) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = torch.cat([value.flatten() for name, value in first.items() if ".lora_A." in name])
    assert drawn.std().item() == pytest.approx(1 / 4, rel=0.05)  # 1 / rank


# What is trained.


@every_backbone
@every_head
def test_what_trains_is_the_last_norm_the_heads_and_lora(backbone: TextToImage, head: Head) -> None:
    _, student = made(tiny(backbone), head)
    bias = not isinstance(backbone, Flux2)
    own = {"norm_out.linear.weight", "heads.velocities.weight"}
    own |= {"norm_out.linear.bias", "heads.velocities.bias"} if bias else set()
    if isinstance(head, GMHead):
        layers = (
            "velocities",
            "factors",
            "samples.1",
            "samples.3",
        )  # a mixture's velocities are told apart by the bias
        own |= {f"heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    lora = {
        f"transformer.{target}.lora_{factor}.{ADAPTER}.weight"
        for target in student.form.targets(student.transformer)
        for factor in "AB"
    }
    parameters = trained(student)
    assert set(parameters) == own | lora
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    loss_of(student(latents(backbone), T, conditions(backbone))).backward()
    assert all(value.grad is not None for value in parameters.values())
    assert all(value.grad.any() for name, value in parameters.items() if ".lora_B." in name)


def targets_of(backbone: TextToImage) -> tuple[set[str], set[str]]:
    """The targets at full size, and the names of all modules."""
    import diffusers

    with torch.device("meta"):
        transformer = getattr(diffusers, backbone.class_name)(**backbone.full)
    targets = backbone.form.targets(transformer)
    assert len(set(targets)) == len(targets)
    return set(targets), {name for name, _ in transformer.named_modules()}


def test_lora_is_where_it_is_published_for_qwen() -> None:
    found, names = targets_of(QwenImage())
    layers = ("net.0.proj", "net.2")
    expected = {f"transformer_blocks.{i}.img_mlp.{layer}" for i in range(60) for layer in layers}
    expected |= {f"transformer_blocks.{i}.txt_mlp.{layer}" for i in range(59) for layer in layers}
    expected |= {f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)}
    assert found == expected
    assert len(found) == 2 * 60 + 2 * 59 + 2
    assert found < names


def test_lora_is_where_it_is_published_for_flux() -> None:
    found, names = targets_of(Flux())
    mlps = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
    expected = {f"transformer_blocks.{i}.{layer}" for i in range(19) for layer in mlps}
    expected |= {f"single_transformer_blocks.{i}.{layer}" for i in range(38) for layer in ("proj_mlp", "proj_out")}
    expected |= {f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2)}
    assert found == expected
    assert len(found) == 19 * 4 + 38 * 2 + 2
    assert found < names
    assert "proj_out" not in found


def test_lora_is_on_the_layers_of_flux2_that_are_none_of_attentions() -> None:
    found, names = targets_of(Flux2())
    mlps = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
    expected = {f"transformer_blocks.{i}.{layer}" for i in range(8) for layer in mlps}
    expected |= {f"single_transformer_blocks.{i}.attn.to_out" for i in range(48)}
    expected |= {f"time_guidance_embed.timestep_embedder.linear_{i}" for i in (1, 2)}
    assert found == expected
    assert found < names


@every_backbone
def test_the_deviation_has_no_gradient_beyond_its_own_head(backbone: TextToImage) -> None:
    _, student = made(tiny(backbone), HEADS["gm"])
    shaken(student)
    x, given = latents(backbone), conditions(backbone)
    found = gradients(student, student(x, T, given).sample.sum())
    assert {name for name, value in found.items() if value.any()} == {
        f"heads.samples.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")
    }
    with torch.no_grad():  # and yet it knows the time
        assert not torch.equal(student(x, T, given).sample, student(x, T.flip(0), given).sample)


# Teacher and student on one transformer.


@every_backbone
@pytest.mark.parametrize("data_free", [True, False], ids=["data-free", "from data"])
def test_training_a_student_leaves_the_teacher_as_it_is(backbone: TextToImage, data_free: bool) -> None:
    backbone = tiny(backbone, dropout=0.05)
    base = backbone.teacher(keyed_generator(0, "teacher"))
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        before = base(x, T, given)
    network = student_on(base, backbone, HEADS["gm"]).train()
    student = NetworkStudent(network, HEADS["gm"], SCHEDULE, backbone.factorisation)
    objective = PiID(data_free=data_free, states=1, dropout=0.1, step_size=1 / 8)
    optimiser = torch.optim.Adam(trained(network).values(), lr=1e-3)
    start = {name: value.detach().clone() for name, value in trained(network).items()}
    for step in range(2):
        optimiser.zero_grad()
        for part in segment_losses(
            objective, Teacher(base), student, x, given, step, keyed_generator(0, "train", step)
        ):
            part.loss.backward()
        optimiser.step()
    assert all(not torch.equal(value, start[name]) for name, value in trained(network).items())
    assert network.training
    with torch.no_grad():
        assert torch.equal(base(x, T, given), before)
        assert torch.equal(Base(base.transformer, backbone.form)(x, T, given), before)


@every_backbone
def test_asking_the_teacher_between_forward_and_backward_changes_no_gradient(backbone: TextToImage) -> None:
    backbone = tiny(backbone, dropout=0.3)
    base, student = made(backbone, HEADS["gm"])
    shaken(student).train()
    x, given = latents(backbone), conditions(backbone)

    def found(ask: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)  # of LoRA's dropout
        loss = loss_of(student(x, T, given))
        if ask:
            with torch.no_grad():
                base(x, T, given)
        return gradients(student, loss)

    plain, asked = found(False), found(True)
    student.checkpoint_gradients()
    recomputed = found(True)
    assert plain.keys() == asked.keys() == recomputed.keys() == trained(student).keys()
    assert all(value.any() for name, value in plain.items())
    assert all(torch.equal(asked[name], value) for name, value in plain.items())
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-6, atol=1e-6 * float(value.abs().max()))


@every_backbone
def test_a_second_student_takes_the_transformer_over(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base, first = made(backbone, HEADS["gm"])
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        before = base(x, T, given)
        shaken(first)(x, T, given)
        second = student_on(base, backbone, HEADS["dx"])
        assert torch.equal(base(x, T, given), before)
        fresh = student_on(backbone.teacher(keyed_generator(0, "teacher")), backbone, HEADS["dx"])
        assert torch.equal(second(x, T, given).velocities, fresh(x, T, given).velocities)
        with pytest.raises(RuntimeError, match="given to a later student"):
            first(x, T, given)
        assert torch.equal(base(x, T, given), before)
    assert trained(second).keys() == trained(fresh).keys()


# Batches.


@every_backbone
def test_a_batch_of_two_is_two_batches_of_one(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base, student = made(backbone, HEADS["gm"])
    shaken(student)
    x, given = latents(backbone), conditions(backbone)
    with torch.no_grad():
        for network in (base, student):
            both = network(x, T, given)
            for row in range(2):
                one = slice(row, row + 1)
                alone = network(x[one], T[one], {name: value[one] for name, value in given.items()})
                for whole, part in zip(_tensors(both), _tensors(alone), strict=True):
                    torch.testing.assert_close(whole[one], part, rtol=0, atol=1e-5)


def _tensors(answer: Tensor | Outputs) -> tuple[Tensor, ...]:
    return (answer,) if isinstance(answer, Tensor) else tuple(answer)


def test_qwens_texts_of_other_lengths_do_not_see_their_padding() -> None:
    backbone = tiny(QwenImage())
    base, student = made(backbone, HEADS["gm"])
    shaken(student)
    x, lengths = latents(backbone), (3, 7)
    generator = keyed_generator(0, "texts")
    texts = [torch.randn(1, length, TINY_TEXT, generator=generator) for length in lengths]
    padded = torch.full((2, max(lengths), TINY_TEXT), 1e3)
    mask = torch.zeros(2, max(lengths), dtype=torch.long)
    for row, text in enumerate(texts):
        padded[row, : lengths[row]], mask[row, : lengths[row]] = text[0], 1
    given = {"encoder_hidden_states": padded, "encoder_hidden_states_mask": mask}
    with torch.no_grad():
        for network in (base, student):
            both = network(x, T, given)
            for row, text in enumerate(texts):
                one = slice(row, row + 1)
                alone = network(x[one], T[one], {"encoder_hidden_states": text})
                for whole, part in zip(_tensors(both), _tensors(alone), strict=True):
                    torch.testing.assert_close(whole[one], part, rtol=0, atol=1e-5)
        unmasked = base(x, T, {"encoder_hidden_states": padded})
        assert (unmasked - base(x, T, given))[0].abs().max() > 1e-3


# Style LoRAs.


def styled(transformer: Any, name: str = "style", loaded: bool = False, seed: int = 11) -> None:
    """Add a LoRA that is none of ours, on a layer of the student's and on one that is not."""
    mlp = "ff.linear_out" if "Flux2" in type(transformer).__name__ else "ff.net.2"
    mlp = "img_mlp.net.2" if "Qwen" in type(transformer).__name__ else mlp
    targets = [f"transformer_blocks.0.{layer}" for layer in ("attn.to_q", mlp)]
    generator = keyed_generator(seed, name)
    weights = {
        f"{target}.lora_{factor}.weight": torch.randn(shape, generator=generator)
        for target in targets
        for factor, shape in zip(
            "AB",
            [(2, transformer.get_submodule(target).in_features), (transformer.get_submodule(target).out_features, 2)],
            strict=True,
        )
    }
    if loaded:
        transformer.load_lora_adapter(weights, adapter_name=name, prefix=None)
        return
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), name)
    parameters = dict(transformer.named_parameters())
    with torch.no_grad():
        for key, value in weights.items():
            parameters[key.replace(".weight", f".{name}.weight")].copy_(value)


@every_backbone
@pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
def test_style_lora_stacks_in_any_order(backbone: TextToImage, loaded: bool) -> None:
    backbone = tiny(backbone)
    x, given = latents(backbone), conditions(backbone)
    base, student = made(backbone, HEADS["dx"])
    with torch.no_grad():
        plain_u, plain = base(x, T, given), shaken(student)(x, T, given).velocities
        styled(base.transformer, loaded=loaded)
        u, both = base(x, T, given), student(x, T, given).velocities

        first = backbone.teacher(keyed_generator(0, "teacher"))
        styled(first.transformer, loaded=loaded)
        assert torch.equal(first(x, T, given), u)
        later = shaken(student_on(first, backbone, HEADS["dx"]))
        assert torch.equal(first(x, T, given), u)
        torch.testing.assert_close(later(x, T, given).velocities, both)
        assert not any("style" in name for name in trained(later))
        assert all(f".{ADAPTER}." in name for name in trained(later) if "lora" in name)

        anew = student_on(first, backbone, HEADS["dx"])
        assert torch.equal(first(x, T, given), u)
        torch.testing.assert_close(shaken(anew)(x, T, given).velocities, both)

        assert (u - plain_u).abs().max() > 1e-2
        assert (both - plain).abs().max() > 1e-2
        base.transformer.delete_adapters("style")
        assert torch.equal(base(x, T, given), plain_u)
        assert torch.equal(student(x, T, given).velocities, plain)


def test_fused_style_lora_is_refused_as_peft_would_leave_the_students_out() -> None:
    backbone = tiny(QwenImage())
    base, student = made(backbone, HEADS["dx"])
    styled(base.transformer)
    base.transformer.fuse_lora(adapter_names=["style"])
    with pytest.raises(ValueError, match="LoRA style is fused"):
        student(latents(backbone), T, conditions(backbone))
    base.transformer.unfuse_lora()
    student(latents(backbone), T, conditions(backbone))


# Precision.


@every_backbone
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_a_bf16_base_serves_float32_heads_and_lora(backbone: TextToImage, autocast: bool) -> None:
    backbone = tiny(backbone, dtype="bf16")
    base, network = made(backbone, HEADS["gm"])
    x, given = latents(backbone), conditions(backbone)
    student = NetworkStudent(network, HEADS["gm"], SCHEDULE, backbone.factorisation)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        u = Teacher(base).velocity(x, T, given)
        outputs = network(x, T, given)
        policy = student(x, T, given)
    assert {value.dtype for value in outputs} == {torch.float32}
    velocity = policy.velocity(PIXELWISE.pack(x), T)
    assert velocity.dtype == u.dtype == torch.float32
    exact = tiny(backbone, dtype="float32").teacher(keyed_generator(0, "teacher"))
    exact.load_state_dict({name: value.float() for name, value in _without_lora(base).items()})
    with torch.no_grad():
        assert (u - exact(x, T, given)).abs().max() < 0.05 * u.abs().max()
    velocity.square().mean().backward()
    parameters = trained(network)
    assert {value.dtype for value in parameters.values()} == {torch.float32}
    assert all(value.grad is not None and value.grad.isfinite().all() for value in parameters.values())


def _without_lora(base: Base) -> dict[str, Tensor]:
    state = base.state_dict()
    return {name.replace(".base_layer", ""): value for name, value in state.items() if "lora_" not in name}


# What is refused.


@every_backbone
def test_latents_that_do_not_fit_are_refused(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base, student = made(backbone, HEADS["gm"])
    given = conditions(backbone)
    x = latents(backbone)
    for network in (base, student):
        with pytest.raises(ValueError, match=f"must have {backbone.channels} channels"):
            network(x[:, 1:], T, given)
        for wrong in (x[..., 1:, :], x[..., 1:], x[0]):
            with pytest.raises(ValueError, match="with even H and W"):
                network(wrong, T, given)


@every_backbone
def test_missing_conditions_are_named(backbone: TextToImage) -> None:
    backbone = tiny(backbone)
    base, student = made(backbone, HEADS["gm"])
    given = conditions(backbone)
    for network in (base, student):
        with pytest.raises(ValueError, match=r"needs conditions \['encoder_hidden_states'"):
            network(latents(backbone), T)
        for name in backbone.form.conditions:
            with pytest.raises(ValueError, match=rf"needs conditions \['{name}'\]"):
                network(latents(backbone), T, {**given, name: None})


def test_lora_on_a_module_that_is_not_there_is_refused_and_nothing_changes() -> None:
    backbone = tiny(QwenImage())
    base, student = made(backbone, HEADS["gm"])
    names = [name for name, _ in base.named_parameters()]
    with pytest.raises(ValueError, match="has no module 'proj_in' for LoRA"):
        AdaptedPolicy(base, HEADS["gm"].sizes, backbone.lora, backbone.head, keyed_generator(0, "student"), ["proj_in"])
    assert [name for name, _ in base.named_parameters()] == names
    student(latents(backbone), T, conditions(backbone))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rank": 0}, "rank must be at least 1, got 0"), ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0")],
)
def test_lora_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**options)


def test_a_student_can_be_copied() -> None:
    backbone = tiny(QwenImage())
    _, student = made(backbone, HEADS["gm"])
    x, given = latents(backbone), conditions(backbone)
    own = copy.deepcopy(student)
    shaken(student)
    fresh = made(backbone, HEADS["gm"])[1]
    with torch.no_grad():
        assert torch.equal(own(x, T, given).velocities, fresh(x, T, given).velocities)
