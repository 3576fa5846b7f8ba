"""Few-step pipelines for Qwen-Image, FLUX.1 and FLUX.2: diffusers' own at both ends, `pitools.sample` between them.

    prompt --encode_prompt--> conditions,    generator --prepare_latents--> noise [B, C, H/8, W/8], float32
    latents = sample(student, noise, nfe, conditions),    images = VAE(latents)

The student is on the pipeline's own transformer, so that LoRAs loaded and weighted as diffusers does (styles, say)
stack on its own, which `set_adapters` must go on naming: "pi_flow".

All three share their keywords:

    height, width            multiples of 16; 1024 unless given
    num_inference_steps      network evaluations; the student's own unless given.  Adapters for Qwen-Image and FLUX.2
                             serve more of them, too, those for FLUX.1 do not
    guidance_scale           embedded; the student's own unless given
    force                    try other numbers than these two all the same
    num_images_per_prompt    images of one prompt follow each other
    generator                one, or one for each image: each is then as if it were alone
    renoise                  strength h of the noise between steps (see `pitools.sampling`); 0 for the ODE
    callback_on_step_end     called as f(pipeline, step, 1000 t, {"latents": x}) with the step's t and the float32
                             latents `[B, C, H/8, W/8]` after it.  It only observes: new latents are an error
    output_type              "pil", "np" `[B, H, W, 3]`, "pt" `[B, 3, H, W]`, all in [0, 1], or "latent"
                             `[B, C, H/8, W/8]`

Latents are those that the transformer sees: for FLUX.2 after the normalisation of its patches. (`self: Any` and
`transformer: Any` are for the type checker, to which diffusers' pipelines look empty.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from diffusers import (
    Flux2Pipeline,
    FluxPipeline,
    ImagePipelineOutput,
    QwenImagePipeline,
)
from diffusers.utils import make_image_grid  # type: ignore[attr-defined]
from rich.console import Console
from torch import Tensor

from pitools.policies import NetworkStudent
from pitools.sampling import Look, sample
from scale.adapted import ADAPTER, AdaptedPolicy, pack, unpack
from scale.backbone import DTYPES, Flux, Flux2, QwenImage, TextToImage, backbone_of
from scale.best import Drawn, Search, drawn, seeds_each, settings_of
from scale.published import load_adapter
from scale.quantise import Quantisation
from scale.served import CALL, COMMAND, Words, guidance_of, steps_of

OUTPUTS = ("pil", "np", "pt", "latent")

Generators: TypeAlias = torch.Generator | list[torch.Generator] | None
"""The caller's: one for the batch, one for each image, or torch's global state."""

StepEnd: TypeAlias = Callable[[Any, int, float, dict[str, Any]], Any]
"""Told the pipeline, the step from 0, 1000 t, and {"latents": x}."""


class FewSteps:
    """What all three have beside diffusers' own: a student on their transformer."""

    transformer: Any
    student: NetworkStudent | None = None

    def load_pi_adapter(
        self,
        path_or_hub_id: str | Path,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Set `student` from a published adapter, as `scale.load_adapter` does; an earlier one is taken off."""
        self.student = load_adapter(self.transformer, path_or_hub_id, subfolder, revision=revision, dtype=dtype)


class PiQwenImagePipeline(FewSteps, QwenImagePipeline):
    """Qwen-Image in a few steps. It runs without guidance, which its adapters have distilled in."""

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        force: bool = False,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        renoise: float = 0.0,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> Any:
        """`.images` for a prompt, or for its embeddings `[B, S, D]` with their mask `[B, S]` where some are padded.

        Other keywords: see the module.  Raises `ValueError` for what the student does not serve: sizes, a number of
        steps, guidance.
        """
        if true_cfg_scale not in (None, 1):
            raise ValueError(
                f"true_cfg_scale must be 1, got {true_cfg_scale}: guidance is distilled into the adapter; leave it out"
            )
        _check_output(output_type)
        height, width = _size(self, height, width)
        self.check_inputs(
            prompt,
            height,
            width,
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            max_sequence_length=max_sequence_length,
        )
        nfe, guidance = _asked(self, num_inference_steps, guidance_scale, force)
        text, mask = self.encode_prompt(
            prompt,
            prompt_embeds=prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            max_sequence_length=max_sequence_length,
        )
        given = {"encoder_hidden_states": text, "encoder_hidden_states_mask": mask}
        conditions = _conditions(given, num_images_per_prompt, guidance)
        latents = _sampled(self, height, width, nfe, conditions, generator, renoise, callback_on_step_end)
        return _finished(self, latents, output_type, return_dict)

    def decoded(self: Any, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, 16, H/8, W/8]`; the VAE's own have a frame axis."""
        config = self.vae.config
        mean, std = (latents.new_tensor(value)[:, None, None] for value in (config.latents_mean, config.latents_std))
        frames = (latents * std + mean).unsqueeze(2).to(self.vae.dtype)
        return cast(Tensor, self.vae.decode(frames, return_dict=False)[0][:, :, 0])


class PiFluxPipeline(FewSteps, FluxPipeline):
    """FLUX.1 in a few steps, at the guidance that its adapter was trained for: 3.5 for those that are published."""

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        force: bool = False,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        renoise: float = 0.0,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> Any:
        """`.images` for a prompt, or for its embeddings `[B, S, D]` and pooled ones `[B, P]`.

        Other keywords: see the module.  Raises `ValueError` for what the student does not serve: sizes, a number of
        steps, guidance.
        """
        _check_output(output_type)
        height, width = _size(self, height, width)
        self.check_inputs(
            prompt,
            None,
            height,
            width,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        nfe, guidance = _asked(self, num_inference_steps, guidance_scale, force)
        text, pooled, _ = self.encode_prompt(
            prompt,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            max_sequence_length=max_sequence_length,
        )
        given = {"encoder_hidden_states": text, "pooled_projections": pooled}
        conditions = _conditions(given, num_images_per_prompt, guidance)
        latents = _sampled(self, height, width, nfe, conditions, generator, renoise, callback_on_step_end)
        return _finished(self, latents, output_type, return_dict)

    def decoded(self: Any, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, 16, H/8, W/8]`."""
        config = self.vae.config
        own = latents / config.scaling_factor + config.shift_factor
        return cast(Tensor, self.vae.decode(own.to(self.vae.dtype), return_dict=False)[0])


class PiFlux2Pipeline(FewSteps, Flux2Pipeline):
    """FLUX.2 in a few steps, at the guidance that its adapter was trained for: 4 unless it says otherwise."""

    @torch.no_grad()
    def __call__(
        self: Any,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        force: bool = False,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        renoise: float = 0.0,
        prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
    ) -> Any:
        """`.images` for a prompt, or for its embeddings `[B, S, D]`.

        Other keywords: see the module.  Raises `ValueError` for what the student does not serve: sizes, a number of
        steps, guidance.
        """
        _check_output(output_type)
        height, width = _size(self, height, width)
        self.check_inputs(prompt, height, width, prompt_embeds=prompt_embeds)
        nfe, guidance = _asked(self, num_inference_steps, guidance_scale, force)
        text, _ = self.encode_prompt(prompt, prompt_embeds=prompt_embeds, max_sequence_length=max_sequence_length)
        conditions = _conditions({"encoder_hidden_states": text}, num_images_per_prompt, guidance)
        latents = _sampled(self, height, width, nfe, conditions, generator, renoise, callback_on_step_end)
        return _finished(self, latents, output_type, return_dict)

    def decoded(self: Any, latents: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] of latents `[B, 32, H/8, W/8]`, whose patches the VAE has normalised."""
        norm = self.vae.bn
        mean = norm.running_mean.to(latents)
        std = (norm.running_var.to(latents) + self.vae.config.batch_norm_eps).sqrt()
        own = unpack(pack(latents) * std + mean, latents.shape[-2] // 2)
        return cast(Tensor, self.vae.decode(own.to(self.vae.dtype), return_dict=False)[0])


PiPipeline: TypeAlias = PiQwenImagePipeline | PiFluxPipeline | PiFlux2Pipeline


def _student(pipe: Any) -> NetworkStudent:
    """The pipeline's, ready to sample: without dropout, and where the pipeline computes."""
    student = pipe.student
    if student is None:
        raise ValueError("the pipeline has no student; call load_pi_adapter(...) or set .student first")
    network = student.network
    if not (isinstance(network, AdaptedPolicy) and network.transformer is pipe.transformer):
        raise ValueError("the student is on another transformer than the pipeline; load it with load_pi_adapter(...)")
    active = pipe.get_active_adapters()
    if network.has_lora and ADAPTER not in active:
        raise ValueError(
            f"the student's LoRA {ADAPTER!r} is not among the active adapters {active}; name it in set_adapters(...), "
            f"or call load_pi_adapter(...) again"
        )
    network.eval()
    for own in (network.norm_out, network.heads):  # the pipeline moves the transformer, and knows nothing of these
        own.to(pipe._execution_device)
    return cast(NetworkStudent, student)


def _check_output(output_type: str) -> None:
    if output_type not in OUTPUTS:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUTS)}, got {output_type!r}")


def _size(pipe: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """In pixels; a multiple of a patch of latents."""
    unit, default = 2 * pipe.vae_scale_factor, pipe.default_sample_size * pipe.vae_scale_factor
    sizes = [default if size is None else size for size in (height, width)]
    if any(size < unit or size % unit for size in sizes):
        near = [max(unit, round(size / unit) * unit) for size in sizes]
        raise ValueError(
            f"height and width must be multiples of {unit}, got {sizes[0]} x {sizes[1]}; use {near[0]} x {near[1]}"
        )
    return sizes[0], sizes[1]


def _asked(
    pipe: Any, steps: int | None, guidance: float | None, force: bool, words: Words = CALL
) -> tuple[int, float | None]:
    """Network evaluations and embedded scale, if the pipeline's student serves them."""
    student, section = _student(pipe), backbone_of(pipe.transformer)
    trained: float | None = None
    if pipe.transformer.config.guidance_embeds:
        own = cast(AdaptedPolicy, student.network).guidance
        trained = section.usual_guidance if own is None else own
    nfe = steps_of(student.schedule.nfe, steps, force, elastic=section.elastic, words=words)
    return nfe, guidance_of(trained, guidance, force, words=words)


def _conditions(given: Mapping[str, Tensor | None], copies: int, guidance: float | None) -> dict[str, Tensor]:
    """Text conditions, each `copies` times, and guidance `[B]`.

    It is done here and not by `encode_prompt`, which repeats Qwen's mask in another order than its embeddings, and
    FLUX.1's embeddings not at all where they are given.
    """
    conditions = {name: value.repeat_interleave(copies, 0) for name, value in given.items() if value is not None}
    if guidance is not None:
        text = conditions["encoder_hidden_states"]
        conditions["guidance"] = torch.full([len(text)], guidance, device=text.device)
    return conditions


def _sampled(
    pipe: Any,
    height: int,
    width: int,
    nfe: int,
    conditions: Mapping[str, Tensor],
    generator: Generators,
    renoise: float,
    step_end: StepEnd | None,
) -> Tensor:
    """Latents at t = 0. A step has ended when the next look is taken, or when all is done."""
    count, channels = len(conditions["encoder_hidden_states"]), pipe.transformer.config.in_channels // 4
    # float32 whatever the transformer's dtype. FLUX's pipelines answer with places of tokens, too.
    made = pipe.prepare_latents(count, channels, height, width, torch.float32, pipe._execution_device, generator)
    noise = unpack(made if isinstance(made, Tensor) else made[0], height // 16)
    times: list[float] = []

    def end(latents: Tensor) -> None:
        bar.update()
        if step_end is None:
            return
        shown = latents.clone()
        answer = step_end(pipe, len(times) - 1, 1000 * times[-1], {"latents": shown})
        if isinstance(answer, Mapping) and answer.get("latents", shown) is not shown:
            raise ValueError("callback_on_step_end may only look at the latents, but returned others; return {}")

    def look(seen: Look) -> None:
        if times:
            end(seen.x)
        times.append(seen.t_src)

    with pipe.progress_bar(total=nfe) as bar:
        latents = sample(
            pipe.student, noise, nfe, conditions=conditions, generator=generator, renoise=renoise, callback=look
        )
        end(latents)
    return latents


def _finished(pipe: Any, latents: Tensor, output_type: str, return_dict: bool) -> Any:
    """Latents as they are, or decoded."""
    images: Any = latents
    if output_type != "latent":
        images = pipe.image_processor.postprocess(pipe.decoded(latents), output_type=output_type)
    pipe.maybe_free_model_hooks()
    output: Any = ImagePipelineOutput
    return output(images=images) if return_dict else (images,)


PIPELINES: Mapping[str, tuple[type[TextToImage], Any]] = {
    QwenImage.kind: (QwenImage, PiQwenImagePipeline),
    Flux.kind: (Flux, PiFluxPipeline),
    Flux2.kind: (Flux2, PiFlux2Pipeline),
}
"""What recipes call a backbone, its section, and its pipeline."""


def pipeline_for(
    kind: str,
    weights: str | None = None,
    dtype: Literal["bf16", "float32"] = "bf16",
    device: torch.device | str = "cpu",
    quantise: Quantisation = "none",
    generator: torch.Generator | None = None,
    revision: str | None = None,
    offload: bool = False,
) -> PiPipeline:
    """The pipeline of a backbone, without a student.

    kind: "qwen", "flux" or "flux2".  weights: hub id or folder of a diffusers pipeline, None for the backbone's own,
    or "tiny" for random ones between stubs (`scale.stubs`), drawn from `generator`, which lives on the CPU.
    quantise: of the transformer's linear layers.  revision: of a hub id.  offload: keep on the device only the model
    that computes.
    Raises `ValueError` for an unknown kind, for offloading to the CPU, for weights that cannot be had, and for a
    pipeline of another backbone.
    """
    if offload and torch.device(device).type == "cpu":
        raise ValueError("offload keeps models on the CPU until they are needed elsewhere, and the device is the CPU")
    if kind not in PIPELINES:
        raise ValueError(f"kind must be one of {', '.join(PIPELINES)}, got {kind!r}")
    section_class, pipeline_class = PIPELINES[kind]
    chosen: dict[str, Any] = {} if weights is None else {"weights": weights}
    section = section_class(**chosen, revision=revision, dtype=dtype, quantise=quantise)
    if section.weights == "random":
        raise ValueError('weights "random" come without a text encoder and a VAE; use "tiny", a hub id or a folder')
    if section.weights != "tiny":  # before its transformer is loaded, which takes minutes
        try:
            index = pipeline_class.load_config(section.weights, revision=revision)
        except OSError as error:
            raise ValueError(f"weights {section.weights!r} cannot be loaded: {error}") from error
        _, found = index.get("transformer", (None, None))
        if found not in (None, section.class_name):
            raise ValueError(f"weights {section.weights!r} are of a {found}, and a {section.class_name} is needed")
    drawn = torch.Generator().manual_seed(0) if generator is None else generator
    transformer = section.transformer(drawn).requires_grad_(False).eval()
    if section.weights == "tiny":
        from scale.stubs import tiny_pipeline

        pipe: Any = tiny_pipeline(kind, transformer)
    else:
        try:
            pipe = pipeline_class.from_pretrained(
                section.weights, revision=revision, transformer=transformer, torch_dtype=DTYPES[section.dtype]
            )
        except OSError as error:
            raise ValueError(f"weights {section.weights!r} cannot be loaded: {error}") from error
    if offload:
        pipe.enable_model_cpu_offload(device=device)
        return cast(PiPipeline, pipe)
    return cast(PiPipeline, pipe.to(device))


def sample_images(
    pipe: PiPipeline,
    prompts: Sequence[str],
    *,
    nfe: int | None,
    seed: int,
    height: int | None,
    width: int | None,
    per_prompt: int,
    renoise: float,
    guidance: float | None,
    force: bool,
    out: Path,
    console: Console,
    search: Search | None = None,
) -> list[Path]:
    """Write `per_prompt` images for each prompt to `out` as PNG files, and return their paths.

    Image i of all has the seed `seed` + i, whatever it is sampled with, or with a `search` the best of N of its own
    (see `scale.best`); `samples.json` has it, with the settings.
    More than one are put together in `sheet.png`, too, a prompt in each row.  None: as in the pipeline's call.
    Raises `ValueError` as that does, and where there is nothing to sample.
    """
    if not prompts or per_prompt < 1:
        raise ValueError(f"there is nothing to sample for {len(prompts)} prompts with {per_prompt} images each")
    _size(pipe, height, width)
    steps, scale = _asked(pipe, nfe, guidance, force, COMMAND)
    out.mkdir(parents=True, exist_ok=True)
    images: list[Drawn] = []
    for prompt in prompts:

        def draw(generators: list[torch.Generator], prompt: str = prompt) -> Any:
            return pipe(
                prompt,
                height=height,
                width=width,
                num_inference_steps=nfe,
                guidance_scale=guidance,
                force=force,
                num_images_per_prompt=per_prompt,
                generator=generators,
                renoise=renoise,
            ).images

        images += drawn(draw, [prompt] * per_prompt, seed + len(images) * seeds_each(search), search)
    settings = {"pipeline": type(pipe).__name__, "nfe": steps, "guidance": scale, "renoise": renoise}
    return write_images(out, images, "prompt", prompts, {**settings, **settings_of(search)}, console)


def write_images(
    out: Path,
    images: Sequence[Drawn],
    key: str,
    asked: Sequence[object],
    settings: Mapping[str, object],
    console: Console,
) -> list[Path]:
    """Write images as PNG files, as many for each of what was `asked`, and what `sample_images` says beside them."""
    each = len(images) // len(asked)
    paths = [out / f"{i:04d}.png" for i in range(len(images))]
    for path, one in zip(paths, images, strict=True):
        one.image.save(path)
    if len(images) > 1:
        make_image_grid([one.image for one in images], rows=len(asked), cols=each).save(out / "sheet.png")
    rows = []
    for i, (path, one) in enumerate(zip(paths, images, strict=True)):
        score = {} if one.score is None else {"score": one.score}
        rows.append({"file": path.name, key: asked[i // each], "seed": one.seed, **score})
    first = images[0].image
    told = {**settings, "height": first.height, "width": first.width, "images": rows}
    (out / "samples.json").write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"Wrote {len(paths)} image{'s' if len(paths) > 1 else ''} to {out}/.", highlight=False)
    return paths
