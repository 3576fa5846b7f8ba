"""Few-step pipelines: each image as if alone, the published schedule, what is refused, and diffusers at both ends."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
)
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from pitools.policies import DXHead, DXPolicy, GMHead, GMPolicy, Head, HeadSizes, NetworkStudent, Outputs, Segment
from pitools.sampling import sample
from pitools.types import PIXELWISE, Policy, Schedule, Time
from scale import pipelines
from scale.adapted import AdaptedPolicy, Base, Heads, LoRA, unpack
from scale.backbone import Flux, Flux2, QwenImage
from scale.pipelines import PiQwenImagePipeline, pipeline_for, sample_images
from scale.published import save_adapter
from scale.stubs import stub_text

SECTIONS = {section.kind: section for section in (QwenImage, Flux, Flux2)}
PUBLISHED = Schedule(nfe=4, shift=3.2, final_step_scale=0.5, temperature="auto")
GM = GMHead(4)
SIZE = {"height": 32, "width": 16}
PROMPTS = ["a red cube", "a lighthouse at dusk"]

every_kind = pytest.mark.parametrize("kind", SECTIONS)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight substeps for the whole way, where their number is not what is tested."""
    monkeypatch.setattr(pipelines, "sample", partial(sample, step_size=1 / 8))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def shaken(module: nn.Module) -> Any:
    """The module with none of its trained weights where they started."""
    for value in module.parameters():
        if value.requires_grad:
            value.add_(0.1 * torch.randn(value.shape, generator=seeded(value.numel())))
    return module


def student_on(
    kind: str, transformer: nn.Module, head: Head = GM, schedule: Schedule = PUBLISHED, guidance: float | None = None
) -> NetworkStudent:
    base = Base(transformer, SECTIONS[kind].form)
    heads = Heads(log_std_width=16)
    network = AdaptedPolicy(base, head.sizes, LoRA(4), heads, seeded(1), guidance=guidance)
    return NetworkStudent(shaken(network), head, schedule, PIXELWISE)


def pipeline(kind: str, head: Head = GM, schedule: Schedule = PUBLISHED, guidance: float | None = None) -> Any:
    """A tiny pipeline with a student that has been away from where training starts."""
    pipe: Any = pipeline_for(kind, "tiny", "float32", generator=seeded(0))
    pipe.student = student_on(kind, pipe.transformer, head, schedule, guidance)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: str | list[str] | None = PROMPTS[0], seed: int = 5, **changed: Any) -> Tensor:
    settings = {**SIZE, "generator": seeded(seed), "output_type": "latent", **changed}
    return pipe(prompt, **settings).images


@dataclass
class Seen:
    """One look: the policy's source, what it was tempered with, and where its velocity was asked for."""

    t_src: float
    policy: Policy
    temperature: float = 1.0
    times: list[float] = field(default_factory=list)


@dataclass
class Spied:
    """A policy that writes down what is asked of it."""

    policy: Policy
    seen: Seen

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        self.seen.times.append(float(torch.as_tensor(t).flatten()[0]))
        return self.policy.velocity(x_t, t)

    def detach(self) -> "Spied":
        return Spied(self.policy.detach(), self.seen)


class SpiedGM(Spied):
    def tempered(self, temperature: float) -> Spied:
        assert isinstance(self.policy, GMPolicy)
        self.seen.temperature = temperature
        return Spied(self.policy.tempered(temperature), self.seen)


@dataclass
class Spy:
    """A head whose policies are spied on."""

    head: Head
    looks: list[Seen] = field(default_factory=list)

    @property
    def sizes(self) -> HeadSizes:
        return self.head.sizes

    @property
    def reaches_zero(self) -> bool:
        return self.head.reaches_zero

    def read(self, outputs: Outputs, x_src: Tensor, t_src: Time, segment: Segment) -> Policy:
        policy = self.head.read(outputs, x_src, t_src, segment)
        self.looks.append(Seen(float(torch.as_tensor(t_src).flatten()[0]), policy))
        return (SpiedGM if isinstance(policy, GMPolicy) else Spied)(policy, self.looks[-1])


@every_kind
def test_each_image_of_a_batch_is_as_if_it_were_alone(kind: str) -> None:
    lengths = stub_text(PROMPTS)[1].sum(1)
    assert lengths[0] != lengths[1]
    pipe = pipeline(kind)
    together = latents(pipe, PROMPTS, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(4)])
    assert together.shape == (4, SECTIONS[kind].channels, 4, 2)
    assert together.dtype == torch.float32
    for i, image in enumerate(together):
        alone = latents(pipe, PROMPTS[i // 2], seed=i)
        torch.testing.assert_close(image[None], alone, rtol=1e-4, atol=1e-4)
    with_the_other_prompt = latents(pipe, PROMPTS[1], seed=0)
    assert (together[:1] - with_the_other_prompt).abs().max() > 1e-2


@every_kind
def test_renoising_is_each_images_own_too(kind: str) -> None:
    pipe = pipeline(kind, DXHead(3))
    together = latents(pipe, [PROMPTS[0]] * 2, generator=[seeded(1), seeded(2)], renoise=0.7)
    torch.testing.assert_close(together[1:], latents(pipe, seed=2, renoise=0.7), rtol=1e-4, atol=1e-4)
    ode = latents(pipe, seed=2)
    assert torch.equal(ode, latents(pipe, seed=2, renoise=0.0))
    assert (ode - together[1:]).abs().max() > 0.1


def test_the_seed_makes_the_image() -> None:
    pipe = pipeline("qwen")
    first = latents(pipe, seed=1)
    assert torch.equal(first, latents(pipe, seed=1))
    assert (first - latents(pipe, seed=2)).abs().max() > 0.1
    with pytest.raises(ValueError, match="length 2"):
        latents(pipe, generator=[seeded(1), seeded(2)])


@pytest.mark.parametrize(
    ("nfe", "times", "substeps", "temperature"),
    [
        (None, [1, 0.8889, 0.7059, 0.3478], [37, 37, 37, 19], 0.3),
        (8, None, [18, 18, 18, 18, 18, 18, 18, 9], 0.7),
    ],
)
def test_sampling_is_as_published(
    nfe: int | None,
    times: list[float] | None,
    substeps: list[int],
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipelines, "sample", sample)
    pipe, spy = pipeline("qwen"), Spy(GM)
    pipe.student = replace(pipe.student, head=spy)
    latents(pipe, num_inference_steps=nfe)
    if times is not None:
        assert [look.t_src for look in spy.looks] == pytest.approx(times, abs=5e-5)
    assert [len(look.times) for look in spy.looks] == substeps
    *tempered, last = (look.temperature for look in spy.looks)
    assert tempered == pytest.approx([temperature] * len(tempered))
    assert last == 1


@pytest.mark.parametrize("nfe", [4, 7])
def test_a_dx_policy_keeps_the_segment_it_was_trained_on(nfe: int) -> None:
    pipe, spy = pipeline("qwen", DXHead(3)), Spy(DXHead(3))
    pipe.student = replace(pipe.student, head=spy)
    latents(pipe, num_inference_steps=nfe)
    assert len(spy.looks) == nfe
    for i, look in enumerate(spy.looks):
        raw_src = 1 - i / (nfe - 0.5)
        raw_dst = max(raw_src - 1 / 3.5, 0)
        assert isinstance(look.policy, DXPolicy)
        assert look.t_src == pytest.approx(3.2 * raw_src / (1 + 2.2 * raw_src), abs=1e-5)
        assert float(look.policy.t_dst) == pytest.approx(3.2 * raw_dst / (1 + 2.2 * raw_dst), abs=1e-5)


@every_kind
def test_the_transformer_is_asked_as_often_as_steps_are_asked_for(kind: str) -> None:
    pipe = pipeline(kind, DXHead(2), replace(PUBLISHED, nfe=3))
    asked: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, named: asked.append(float(named["timestep"][0])), with_kwargs=True
    )
    latents(pipe)
    assert len(asked) == 3
    latents(pipe, num_inference_steps=5, force=kind == "flux")
    assert asked[3:] == pytest.approx([3.2 * raw / (1 + 2.2 * raw) for raw in (1, 7 / 9, 5 / 9, 3 / 9, 1 / 9)])


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen", {"height": 40}, "multiples of 16, got 40 x 16; use 32 x 16"),
    ("flux", {"width": 0}, "got 32 x 0; use 32 x 16"),
    ("flux2", {"height": 41, "width": 1}, "use 48 x 16"),
    ("qwen", {"num_inference_steps": 3}, "num_inference_steps must be 4 or more for this adapter, got 3; force=True"),
    ("flux2", {"num_inference_steps": 3}, "must be 4 or more"),
    ("flux", {"num_inference_steps": 3}, "num_inference_steps must be 4 for"),
    ("flux", {"num_inference_steps": 8}, "num_inference_steps must be 4 for"),
    ("flux", {"guidance_scale": 4.0}, r"guidance_scale must be 3\.5.*got 4\.0; force=True"),
    ("flux2", {"guidance_scale": 2.5}, r"guidance_scale must be 4\.0.*got 2\.5; force=True"),
    ("qwen", {"guidance_scale": 4.0}, r"guidance_scale must be 1, got 4\.0"),
    ("qwen", {"guidance_scale": 4.0, "force": True}, r"guidance_scale must be 1, got 4\.0"),
    ("qwen", {"true_cfg_scale": 4.0}, r"true_cfg_scale must be 1, got 4\.0"),
    ("qwen", {"output_type": "numpy"}, "output_type must be one of pil, np, pt, latent, got 'numpy'"),
    ("flux", {"prompt_embeds": torch.zeros(1, 8, 12)}, "Cannot forward both"),
    ("flux2", {"renoise": -1.0}, "renoise must not be negative"),
]


@pytest.mark.parametrize(("kind", "asked", "message"), REFUSED)
def test_what_the_student_does_not_serve_is_refused(kind: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latents(pipeline(kind), **asked)


@pytest.mark.parametrize(
    ("kind", "trained", "asked", "seen"),
    [
        ("flux", None, {}, 3.5),
        ("flux", None, {"guidance_scale": 3.5}, 3.5),
        ("flux", 2.0, {}, 2.0),
        ("flux", None, {"guidance_scale": 5.0, "force": True}, 5.0),
        ("flux2", None, {}, 4.0),
        ("flux2", 4.0, {"guidance_scale": 2.5, "force": True}, 2.5),
        ("qwen", None, {"guidance_scale": 1.0, "true_cfg_scale": 1.0}, None),
    ],
)
def test_guidance_is_what_the_adapter_was_trained_for_unless_forced(
    kind: str, trained: float | None, asked: dict[str, Any], seen: float | None
) -> None:
    pipe = pipeline(kind, DXHead(2), Schedule(nfe=1), guidance=trained)
    given: list[Any] = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, __, named: given.append(named.get("guidance")), with_kwargs=True
    )
    latents(pipe, PROMPTS, **asked)
    assert [None if value is None else value.tolist() for value in given] == [None if seen is None else [seen] * 2]


def test_force_tries_fewer_steps() -> None:
    seen: list[int] = []
    latents(
        pipeline("flux", DXHead(2)),
        num_inference_steps=2,
        force=True,
        callback_on_step_end=lambda _, step, t, now: seen.append(step),
    )
    assert seen == [0, 1]


def test_a_pipeline_needs_a_student_of_its_own() -> None:
    pipe, other = pipeline("qwen"), pipeline("qwen")
    other.student = pipe.student
    with pytest.raises(ValueError, match="on another transformer"):
        latents(other)
    other.student = None
    with pytest.raises(ValueError, match="no student; call load_pi_adapter"):
        latents(other)


@every_kind
def test_the_state_is_float32_whatever_the_transformers_dtype(kind: str) -> None:
    pipe = pipeline(kind, DXHead(2), Schedule(nfe=1))
    pipe.to(torch.bfloat16)
    seen: list[Tensor] = []
    pipe.student.network.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    end = latents(pipe)
    channels = SECTIONS[kind].channels
    exact = torch.randn(1, channels, 4, 2, generator=seeded(5))
    if kind == "flux2":  # its pipeline draws patches
        exact = unpack(torch.randn(1, 4 * channels, 2, generator=seeded(5)).transpose(1, 2), 2)
    assert torch.equal(seen[0], exact)
    assert end.dtype == torch.float32
    assert not torch.equal(end, end.bfloat16().float())


def test_a_callback_sees_the_end_of_every_step_and_changes_nothing() -> None:
    pipe = pipeline("qwen", DXHead(3))
    told: list[tuple[int, float, Tensor]] = []

    def look(own: Any, step: int, t: float, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        assert own is pipe
        told.append((step, t, seen["latents"].clone()))
        seen["latents"].zero_()
        return seen

    sources: list[Tensor] = []
    pipe.student.network.register_forward_pre_hook(lambda _, given: sources.append(given[0].clone()))
    bars = Bars(pipe)
    end = latents(pipe, callback_on_step_end=look, renoise=0.5)
    assert [step for step, *_ in told] == [0, 1, 2, 3]
    assert [t for _, t, _ in told] == pytest.approx([1000, 888.9, 705.9, 347.8], abs=0.05)
    for (_, _, after), source in zip(told, [*sources[1:], end], strict=True):
        assert torch.equal(after, source)
    assert bars.totals == [4]
    assert bars.updates == 4
    assert torch.equal(end, latents(pipe, renoise=0.5))
    with pytest.raises(ValueError, match="may only look at the latents"):
        latents(pipe, callback_on_step_end=lambda *_: {"latents": torch.zeros(1)})


class Bars:
    """The progress bars that a pipeline opens from now on."""

    def __init__(self, pipe: Any) -> None:
        self.totals: list[int] = []
        self.updates = 0
        pipe.progress_bar = self

    def __call__(self, total: int) -> "Bars":
        self.totals.append(total)
        return self

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self) -> None:
        self.updates += 1


@every_kind
def test_embeddings_stand_for_a_prompt(kind: str) -> None:
    pipe = pipeline(kind, DXHead(2), Schedule(nfe=1))
    encoded = pipe.encode_prompt(PROMPTS)
    names = {"qwen": ["prompt_embeds", "prompt_embeds_mask"], "flux": ["prompt_embeds", "pooled_prompt_embeds"]}
    given = dict(zip(names.get(kind, ["prompt_embeds"]), encoded, strict=False))
    embedded = latents(pipe, None, num_images_per_prompt=2, **given)
    assert len(embedded) == 4
    assert torch.equal(embedded, latents(pipe, PROMPTS, num_images_per_prompt=2))


def test_images_come_as_asked_for() -> None:
    pipe = pipeline("flux", DXHead(2), Schedule(nfe=1))
    as_pt, as_np = (pipe(PROMPTS, **SIZE, generator=seeded(1), output_type=kind).images for kind in ("pt", "np"))
    as_pil = pipe(PROMPTS, **SIZE, generator=seeded(1), return_dict=False)[0]
    assert as_pt.shape == (2, 3, 32, 16)
    assert 0 <= as_pt.min() < as_pt.max() <= 1
    np.testing.assert_array_equal(as_np, as_pt.permute(0, 2, 3, 1).numpy())
    assert [image.size for image in as_pil] == [(16, 32)] * 2
    np.testing.assert_array_equal(np.asarray(as_pil[1]), (as_np[1] * 255).round())


def vae_for(kind: str) -> nn.Module:
    """A small VAE of the class that the pipeline has, with random weights and statistics."""
    four = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "layers_per_block": 1}
    down, up = (("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "qwen":
            return AutoencoderKLQwenImage(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        if kind == "flux":
            return AutoencoderKL(
                **four,
                latent_channels=16,
                scaling_factor=0.36,
                shift_factor=0.12,
                down_block_types=down,
                up_block_types=up,
            )
        vae = AutoencoderKLFlux2(**four)
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        return vae


@every_kind
def test_latents_are_decoded_as_diffusers_decodes_its_own(kind: str) -> None:
    pipe = pipeline(kind)
    pipe.vae = vae_for(kind).eval()
    pipe.student.network.eval()
    theirs = next(cls for cls in type(pipe).__mro__ if cls.__module__.startswith("diffusers"))
    encoded = pipe.encode_prompt(PROMPTS[0])
    given: dict[str, Any] = {"prompt_embeds": encoded[0], "num_inference_steps": 1}
    if kind == "flux":
        given["pooled_prompt_embeds"] = encoded[1]
    pipe.encode_prompt = lambda **named: theirs.encode_prompt(pipe, **named)

    def diffused(output: str) -> Any:
        return theirs.__call__(pipe, **SIZE, **given, generator=seeded(1), output_type=output).images

    own = (pipe.decoded(unpack(diffused("latent"), 2)) / 2 + 0.5).clamp(0, 1)
    assert own.std() > 1e-2
    torch.testing.assert_close(own, torch.as_tensor(diffused("pt")), rtol=1e-4, atol=1e-5)


def style(seed: int) -> dict[str, Tensor]:
    """A LoRA as diffusers saves it for Qwen-Image: on a layer that the student's LoRA adapts, too, and on another."""
    drawn = seeded(seed)
    sizes = {"attn.to_q": (32, 32), "img_mlp.net.2": (128, 32)}
    return {
        f"transformer.transformer_blocks.0.{name}.{side}.weight": torch.randn(*shape, generator=drawn)
        for name, (inputs, outputs) in sizes.items()
        for side, shape in {"lora_A": (2, inputs), "lora_B": (outputs, 2)}.items()
    }


def test_a_style_stacks_on_the_student_and_comes_off_without_a_trace() -> None:
    pipe = pipeline("qwen", DXHead(3))
    plain = latents(pipe)
    pipe.load_lora_weights(style(3), adapter_name="style")
    pipe.set_adapters(["style", "pi_flow"], [0.5, 1.0])
    styled = latents(pipe)
    assert (styled - plain).abs().max() > 1e-2
    pipe.set_adapters(["style"])
    with pytest.raises(ValueError, match=r"'pi_flow' is not among the active adapters \['style'\]"):
        latents(pipe)
    pipe.set_adapters(["pi_flow"])
    assert torch.equal(latents(pipe), plain)
    pipe.set_adapters(["style", "pi_flow"], [0.5, 1.0])
    assert torch.equal(latents(pipe), styled)
    pipe.delete_adapters("style")
    assert torch.equal(latents(pipe), plain)

    before: Any = pipeline_for("qwen", "tiny", "float32", generator=seeded(0))
    before.set_progress_bar_config(disable=True)
    before.load_lora_weights(style(3), adapter_name="style")
    before.set_adapters(["style"], [0.5])
    before.student = student_on("qwen", before.transformer, DXHead(3))
    torch.testing.assert_close(latents(before), styled, rtol=1e-4, atol=1e-5)
    before.delete_adapters("style")
    assert torch.equal(latents(before), plain)
    before.unload_lora_weights()
    with pytest.raises(ValueError, match=r"'pi_flow' is not among the active adapters \[\]"):
        latents(before)


@every_kind
def test_an_adapter_is_loaded_onto_the_pipelines_transformer(kind: str, tmp_path: Path) -> None:
    made, pipe = pipeline(kind), pipeline_for(kind, "tiny", "float32", generator=seeded(0))
    save_adapter(made.student, tmp_path / "adapter")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_pi_adapter(tmp_path, subfolder="adapter")
    assert pipe.student is not None
    assert pipe.student.schedule == PUBLISHED
    assert torch.equal(latents(pipe), latents(made))


def test_an_adapters_revision_and_dtype_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline("qwen", DXHead(2))
    asked: list[Any] = []
    monkeypatch.setattr(pipelines, "load_adapter", lambda *given, **named: asked.append((given, named)))
    pipe.load_pi_adapter("an/adapter", "inner", revision="v2", dtype=torch.float16)
    assert asked == [((pipe.transformer, "an/adapter", "inner"), {"revision": "v2", "dtype": torch.float16})]


def test_a_pipeline_comes_from_a_folder_as_diffusers_saves_it(tmp_path: Path) -> None:
    made = pipeline("qwen", DXHead(2), Schedule(nfe=1))
    text, _ = stub_text(PROMPTS[:1])
    expected = latents(made, None, prompt_embeds=text)
    transformer = QwenImage(weights="tiny", dtype="float32").transformer(seeded(0))
    part = FlowMatchEulerDiscreteScheduler()  # thrice: nobody will ask the text encoder or its tokenizer
    QwenImagePipeline(part, vae_for("qwen"), part, part, transformer).save_pretrained(tmp_path)
    pipe: Any = pipeline_for("qwen", str(tmp_path), "float32")
    assert type(pipe) is PiQwenImagePipeline
    assert pipe.vae.dtype == torch.float32
    pipe.student = student_on("qwen", pipe.transformer, DXHead(2), Schedule(nfe=1))
    torch.testing.assert_close(latents(pipe, None, prompt_embeds=text), expected)


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("sdxl", "tiny", "kind must be one of qwen, flux, flux2, got 'sdxl'"),
        ("qwen", "random", 'weights "random" come without a text encoder'),
        ("flux", "./nowhere", "'./nowhere' cannot be loaded"),
    ],
)
def test_a_pipeline_that_cannot_be_had_is_refused(kind: str, weights: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline_for(kind, weights)


def test_images_are_written_with_what_made_them(tmp_path: Path) -> None:
    pipe, told = pipeline("qwen", DXHead(2)), StringIO()

    def write(out: str, prompts: list[str], seed: int, per_prompt: int) -> list[Path]:
        return sample_images(
            pipe,
            prompts,
            nfe=None,
            seed=seed,
            height=16,
            width=32,
            per_prompt=per_prompt,
            renoise=0.3,
            guidance=None,
            force=False,
            out=tmp_path / out,
            console=Console(file=told, width=200),
        )

    paths = write("all", PROMPTS, 7, 2)
    assert [path.name for path in paths] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    sheet = np.asarray(Image.open(tmp_path / "all" / "sheet.png"))
    assert sheet.shape == (32, 64, 3)
    np.testing.assert_array_equal(sheet[16:, :32], np.asarray(Image.open(paths[2])))
    written = json.loads((tmp_path / "all" / "samples.json").read_text())
    assert written.pop("images")[2] == {"file": "0002.png", "prompt": PROMPTS[1], "seed": 9}
    assert written == {
        "pipeline": "TinyQwenImagePipeline",
        "nfe": 4,
        "guidance": None,
        "renoise": 0.3,
        "height": 16,
        "width": 32,
    }
    assert f"Wrote 4 images to {tmp_path / 'all'}/." in told.getvalue()
    (alone,) = write("one", PROMPTS[1:], 9, 1)
    difference = np.asarray(Image.open(alone)).astype(int) - np.asarray(Image.open(paths[2]))
    assert abs(difference).max() <= 1
    assert not (tmp_path / "one" / "sheet.png").exists()
    with pytest.raises(ValueError, match="nothing to sample for 0 prompts"):
        write("none", [], 0, 1)
