"""Prompts and images to what a transformer takes, by the encoders that its diffusers pipeline comes with.

    text     the pipeline's own `encode_prompt`; Qwen-Image's is trimmed to its mask, the others' is of a fixed length
    image    z = mode of the VAE's posterior, then     Qwen-Image   (z - mean) / std, for each channel
                                                       FLUX.1       (z - shift) * scale
                                                       FLUX.2       (z - mean) / std, for each channel of a 2 x 2 patch

Latents are `[C, H/8, W/8]`, as the transformer's adapter takes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from rich.console import Console
from torch import Tensor

from pitools.training.checkpoint import JSON
from scale.cache import LATENTS, TEXT, Cache, Sample, write_cache
from scale.prompts import Record, read_records

TOKENS = 512
"""The most of a prompt that is encoded: what all three pipelines do unless told otherwise."""


class Family(Protocol):
    """What the pipelines of one family of transformers differ in."""

    @property
    def pipeline(self) -> str:
        """The name of the diffusers pipeline."""
        ...

    @property
    def masked(self) -> bool:
        """Whether texts differ in length, and a batch of them has a mask."""
        ...

    def texts(self, pipeline: Any, prompts: list[str], device: torch.device) -> list[dict[str, Tensor]]:
        """The conditions of each prompt."""
        ...

    def latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """Latents `[B, C, H/8, W/8]`, float32, of pixels `[B, 3, H, W]` in [-1, 1]."""
        ...


@dataclass(frozen=True)
class Qwen:
    """`QwenImagePipeline`: a text's length is its own."""

    pipeline: str = "QwenImagePipeline"
    masked: bool = True

    def texts(self, pipeline: Any, prompts: list[str], device: torch.device) -> list[dict[str, Tensor]]:
        """encoder_hidden_states `[T, D]`, without padding."""
        embeds, mask = pipeline.encode_prompt(prompts, device=device, max_sequence_length=TOKENS)
        if mask is None:  # nothing is padded
            return [{TEXT: text} for text in embeds]
        return [{TEXT: text[kept.bool()]} for text, kept in zip(embeds, mask, strict=True)]

    def latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """An image is a video of one frame to this VAE."""
        z: Tensor = vae.encode(pixels.unsqueeze(2)).latent_dist.mode().squeeze(2).float()
        config = vae.config
        mean, std = (torch.tensor(each).to(z).view(-1, 1, 1) for each in (config.latents_mean, config.latents_std))
        return (z - mean) / std


@dataclass(frozen=True)
class Flux:
    """`FluxPipeline`: T5 and its padding, on which the transformer was trained, and pooled CLIP."""

    pipeline: str = "FluxPipeline"
    masked: bool = False

    def texts(self, pipeline: Any, prompts: list[str], device: torch.device) -> list[dict[str, Tensor]]:
        """encoder_hidden_states `[512, D]` and pooled_projections `[P]`."""
        embeds, pooled, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=TOKENS)
        return [{TEXT: text, "pooled_projections": own} for text, own in zip(embeds, pooled, strict=True)]

    def latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """One shift and one scale for all channels."""
        z: Tensor = vae.encode(pixels).latent_dist.mode().float()
        shift: float = vae.config.shift_factor
        scale: float = vae.config.scaling_factor
        return (z - shift) * scale


@dataclass(frozen=True)
class Flux2:
    """`Flux2Pipeline`: three layers of its text encoder and their padding."""

    pipeline: str = "Flux2Pipeline"
    masked: bool = False

    def texts(self, pipeline: Any, prompts: list[str], device: torch.device) -> list[dict[str, Tensor]]:
        """encoder_hidden_states `[512, D]`."""
        embeds, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=TOKENS)
        return [{TEXT: text} for text in embeds]

    def latents(self, vae: Any, pixels: Tensor) -> Tensor:
        """By the running statistics of the VAE's batch norm, which is over patches."""
        z = rearrange(vae.encode(pixels).latent_dist.mode().float(), "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)
        mean, variance = (value.float().view(-1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        normed: Tensor = (z - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        return rearrange(normed, "b (c p q) h w -> b c (h p) (w q)", p=2, q=2)


def family_of(kind: str) -> Family:
    """The family that recipes call `kind`, "qwen", "flux" or "flux2"; `ValueError` for another."""
    families: Mapping[str, Family] = {"qwen": Qwen(), "flux": Flux(), "flux2": Flux2()}
    if kind not in families:
        raise ValueError(f"kind must be one of {', '.join(families)}, got {kind!r}")
    return families[kind]


@dataclass(frozen=True, eq=False)
class Encoder:
    """The encoders of a diffusers pipeline, which needs no transformer, and for prompts alone no VAE."""

    pipeline: Any
    family: Family
    device: torch.device

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The conditions of each prompt, on the CPU and without a batch axis."""
        samples = self.family.texts(self.pipeline, list(prompts), self.device)
        return [{name: value.cpu() for name, value in sample.items()} for sample in samples]

    @torch.no_grad()
    def encode_images(self, paths: Sequence[Path], height: int, width: int) -> Tensor:
        """Latents `[B, C, H/8, W/8]`, float32, on the CPU, of images cut to `height` x `width` pixels.

        An image is turned as its own note on orientation says, scaled to cover that size, and cropped around its
        centre.
        """
        from diffusers.utils.loading_utils import load_image

        images = [load_image(str(path)) for path in paths]
        processor, vae = self.pipeline.image_processor, self.pipeline.vae
        # One by one: the processor takes them for equally large.
        parts = [processor.preprocess(image, height, width, resize_mode="crop") for image in images]
        return self.family.latents(vae, torch.cat(parts).to(self.device, vae.dtype)).cpu()


def encoder_for(
    weights: str,
    kind: str,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    images: bool = False,
    revision: str | None = None,
) -> Encoder:
    """The encoders of a pipeline, whose transformer stays unread.

    weights: hub id, or a folder as diffusers saves pipelines.  images: whether its VAE is wanted, too.
    Raises `ValueError` for weights that cannot be had, saying why, and for another kind; `ImportError` without
    diffusers.
    """
    family = family_of(kind)
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f'encoding needs diffusers ({error}): run `pip install "pitools[scale]"`') from error
    unread = {"transformer": None, **({} if images else {"vae": None})}
    try:
        pipeline = getattr(diffusers, family.pipeline).from_pretrained(
            weights, revision=revision, torch_dtype=dtype, **unread
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {weights!r} cannot be loaded: {error}") from error
    return Encoder(pipeline.to(device), family, torch.device(device))


def bucket_of(width: int, height: int, area: int) -> tuple[int, int]:
    """The size (width, height) that an image of `width` x `height` is brought to, about as many pixels as `area`.

    Both sides are multiples of about a sixteenth of the square's side, and of 16: of 64 for 1024 x 1024. Of those
    sizes of at most `area`, with sides of up to 1 : 4, it is the one of the nearest shape.
    """
    for name, value in (("width", width), ("height", height)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if area < 256:
        raise ValueError(f"area must be at least 256 pixels, 16 x 16, got {area}")
    side = math.isqrt(area)
    step = max(16, round(side / 256) * 16)
    candidates = [(w, area // w // step * step) for w in range(step, 2 * side + 1, step)]
    fitting = [(w, h) for w, h in candidates if h and max(w, h) <= 4 * min(w, h)]
    return min(fitting, key=lambda size: (abs(math.log(size[0] / size[1] * height / width)), -size[0] * size[1]))


def image_size(path: Path) -> tuple[int, int]:
    """The (width, height) of an image, turned as its own note on orientation says, without decoding it."""
    from PIL import ExifTags, Image

    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (height, width) if turned else (width, height)


def build_cache(
    weights: str,
    kind: str,
    prompts_source: str | Path,
    folder: Path,
    *,
    images: bool = False,
    height: int = 1024,
    width: int = 1024,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    null_prompt: str = "",
    column: str = "prompt",
    image_column: str = "image",
    revision: str | None = None,
    console: Console | None = None,
) -> Cache:
    """Encode a prompt list, and with `images` the images beside it, into `folder`, or go on where it was interrupted.

    The encoders are loaded only if there is something left to encode.  height, width: whose product is about the
    number of pixels of every image, each of which keeps its shape; see `bucket_of`.  null_prompt: what stands for no
    prompt in guidance.
    Raises what `read_records`, `encoder_for` and `write_cache` raise.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    family = family_of(kind)
    records = read_records(prompts_source, column, image_column if images else None)
    listed = [[record.prompt, record.image.name if record.image else None] for record in records]
    identity: dict[str, JSON] = {
        "backbone": kind,
        "weights": weights,
        "revision": revision,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": TOKENS,
        "null_prompt": null_prompt,
        "records": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "pixels": height * width if images else None,
    }
    # Bound late, and once: a cache that is complete needs no encoder.
    encoder = once(lambda: encoder_for(weights, kind, device, dtype, images=images, revision=revision))

    def encode(part: Sequence[Record]) -> Sequence[Sample]:
        samples = encoder().encode([record.prompt for record in part])
        for sample, record in zip(samples, part, strict=True):
            if record.image is not None:
                own_width, own_height = bucket_of(*image_size(record.image), height * width)
                sample[LATENTS] = encoder().encode_images([record.image], own_height, own_width)[0]
        return samples

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Encoding", total=len(records))
        write_cache(
            folder,
            records,
            encode,
            null=Record(null_prompt),
            identity=identity,
            masked=family.masked,
            batch_size=batch_size,
            on_samples=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return Cache(folder)
