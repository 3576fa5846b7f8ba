"""Images of classes: a student of the DiT, and the `AutoencoderKL` whose latents it was trained on.

noise [B, C, size, size] --pitools.sample--> latents,    images = VAE(latents / scaling factor)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from torch import Tensor

from pitools.sampling import sample
from scale.best import Drawn, Search, drawn, seeds_each, settings_of
from scale.dit import DiTFlowMap, DiTPolicy
from scale.pipelines import Generators, write_images
from scale.served import CALL, COMMAND, Words, steps_of
from scale.whole import DiTFlowMapStudent, WholeStudent


@dataclass
class PiDiTPipeline:
    """Classes to images: a student has its teacher's guidance in it, or a flow map's is chosen within its interval.

    student: on a DiT.  vae: an `AutoencoderKL`, or what decodes as one.
    """

    student: WholeStudent
    vae: Any
    elastic: ClassVar[bool] = False
    """Whether students serve more evaluations than they were trained for."""

    def __call__(
        self,
        labels: Sequence[int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        force: bool = False,
        generator: Generators = None,
        renoise: float = 0.0,
        output_type: str = "pil",
    ) -> Any:
        """An image for each label: "pil", "np" `[B, H, W, 3]` or "pt" `[B, 3, H, W]` in [0, 1], or "latent".

        num_inference_steps: network evaluations, the student's own unless given; others with `force`.
        guidance_scale: γ of a flow map, its own unless given; outside of its interval with `force`.  generator: one, or
        one for each image.  renoise: strength h of the noise between steps.
        Raises `ValueError` for labels that are none, and for other steps or guidance without `force`.
        """
        from diffusers.image_processor import VaeImageProcessor

        network = self.student.network
        assert isinstance(network, DiTPolicy | DiTFlowMap)
        config = network.transformer.config
        unknown = [label for label in labels if not 0 <= label < config.num_embeds_ada_norm]
        if unknown or not labels:
            raise ValueError(f"labels must lie in 0..{config.num_embeds_ada_norm - 1}, got {(unknown or labels)[:1]}")
        steps = steps_of(self.student.schedule.nfe, num_inference_steps, force, elastic=self.elastic)
        strength = strength_for(self.student, guidance_scale, force)
        device = next(network.parameters()).device
        conditions: dict[str, Any] = {"class_labels": torch.tensor(list(labels), device=device)}
        if strength is not None:
            conditions["guidance"] = strength
        shape = (config.in_channels, config.sample_size, config.sample_size)
        latents = sample(
            self.student,
            _noise(len(labels), shape, generator).to(device),
            steps,
            conditions=conditions,
            generator=generator,
            renoise=renoise,
        )
        if output_type == "latent":
            return latents
        with torch.no_grad():
            own = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            images = self.vae.decode(own, return_dict=False)[0]
        processor: Any = VaeImageProcessor()
        return processor.postprocess(images.float(), output_type=output_type)


def strength_for(student: WholeStudent, asked: float | None, force: bool, *, words: Words = CALL) -> float | None:
    """The γ of a flow map that has one, else None.

    asked: None for its own.  `ValueError` for one outside the interval that it was trained for, unless by force, and
    for any where none is embedded.
    """
    interval = student.strengths if isinstance(student, DiTFlowMapStudent) else None
    if not isinstance(student, DiTFlowMapStudent) or interval is None:
        if asked is not None:
            raise ValueError(f"{words.guidance} cannot be chosen: this student has its teacher's in it; leave it out")
        return None
    low, high = interval
    if asked is not None and not force and not low <= asked <= high:
        raise ValueError(
            f"{words.guidance} must lie in [{low:g}, {high:g}], which the flow map was trained for, got {asked:g}; "
            f"{words.force} tries it all the same"
        )
    return student.guidance if asked is None else asked


def sample_classes(
    pipe: PiDiTPipeline,
    labels: Sequence[int],
    *,
    nfe: int | None,
    seed: int,
    per_label: int,
    renoise: float,
    guidance: float | None = None,
    force: bool,
    out: Path,
    console: Console,
    search: Search | None = None,
) -> list[Path]:
    """As `scale.pipelines.sample_images`, with classes in the place of prompts."""
    steps = steps_of(pipe.student.schedule.nfe, nfe, force, elastic=pipe.elastic, words=COMMAND)
    strength = strength_for(pipe.student, guidance, force, words=COMMAND)
    images: list[Drawn] = []
    for label in labels:

        def draw(generators: list[torch.Generator], label: int = label) -> Any:
            return pipe(
                [label] * per_label,
                num_inference_steps=nfe,
                guidance_scale=guidance,
                force=force,
                generator=generators,
                renoise=renoise,
            )

        images += drawn(draw, [label] * per_label, seed + len(images) * seeds_each(search), search)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"pipeline": type(pipe).__name__, "nfe": steps, "guidance": strength, "renoise": renoise}
    return write_images(out, images, "label", labels, {**settings, **settings_of(search)}, console)


def _noise(count: int, shape: tuple[int, ...], generator: Generators) -> Tensor:
    if isinstance(generator, list):
        if len(generator) != count:
            raise ValueError(f"generator must be one, or one for each of the {count} images, got {len(generator)}")
        return torch.stack([torch.randn(shape, generator=own, device=own.device).cpu() for own in generator])
    return torch.randn(count, *shape, generator=generator, device=generator.device if generator else "cpu")
