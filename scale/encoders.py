"""Prompts, classes and images to what a transformer takes, by the encoders that it was trained with.

    text     the pipeline's own `encode_prompt`; Qwen-Image's is trimmed to its mask, the others' is of a fixed length
    class    its number
    image    z = mode of the VAE's posterior, then     Qwen-Image   (z - mean) / std, for each channel
                                                       FLUX.1       (z - shift) * scale
                                                       FLUX.2       (z - mean) / std, for each channel of a 2 x 2 patch
                                                       ImageNet     z * scale

Latents are `[C, H/8, W/8]`, as the transformer's adapter takes them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from einops import rearrange
from rich.console import Console
from torch import Tensor

from pitools.training.checkpoint import JSON
from scale.cache import LABELS, LATENTS, TEXT, Cache, Sample, write_cache
from scale.data import VAE
from scale.prompts import Labelled, Record, read_classes, read_records

TOKENS = 512
"""The most of a prompt that is encoded: what all three pipelines do unless told otherwise."""

R = TypeVar("R")

IMAGENET_VAE = "stabilityai/sd-vae-ft-ema"
"""Whose latents, times 0.18215, DiT, SiT and REPA were trained on."""


class Family(Protocol):
    """What the pipelines of one family of transformers differ in."""

    @property
    def pipeline(self) -> str:
        """The name of the diffusers pipeline."""
        ...

    @property
    def transformer(self) -> str:
        """The name of its transformer's class."""
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
class QwenEncoders:
    """`QwenImagePipeline`: a text's length is its own."""

    pipeline: str = "QwenImagePipeline"
    transformer: str = "QwenImageTransformer2DModel"
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
class FluxEncoders:
    """`FluxPipeline`: T5 and its padding, on which the transformer was trained, and pooled CLIP."""

    pipeline: str = "FluxPipeline"
    transformer: str = "FluxTransformer2DModel"
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
class Flux2Encoders:
    """`Flux2Pipeline`: three layers of its text encoder and their padding."""

    pipeline: str = "Flux2Pipeline"
    transformer: str = "Flux2Transformer2DModel"
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
    families: Mapping[str, Family] = {"qwen": QwenEncoders(), "flux": FluxEncoders(), "flux2": Flux2Encoders()}
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
        vae = self.pipeline.vae
        pixels = _pixels(self.pipeline.image_processor, paths, height, width)
        return self.family.latents(vae, pixels.to(self.device, vae.dtype)).cpu()


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
    Raises `ValueError` for weights that cannot be had, saying why, or are of another family, and for another kind;
    `ImportError` without diffusers.
    """
    family = family_of(kind)
    if weights in ("random", "tiny"):
        raise ValueError(f"weights {weights!r} come without encoders; name a hub id or a folder of a pipeline")
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f'encoding needs diffusers ({error}): run `pip install "pitools[scale]"`') from error
    unread = {"transformer": None, **({} if images else {"vae": None})}
    own = getattr(diffusers, family.pipeline)
    try:
        _, found = own.load_config(weights, revision=revision).get("transformer", (None, None))
        if found not in (None, family.transformer):
            raise ValueError(f"they are those of a {found}, not of a {family.transformer}")
        pipeline = own.from_pretrained(weights, revision=revision, torch_dtype=dtype, **unread)
    except (OSError, ValueError) as error:
        raise ValueError(f"weights {weights!r} cannot be loaded: {error}") from error
    return Encoder(pipeline.to(device), family, torch.device(device))


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """An `AutoencoderKL` apart from any pipeline, in float32: what the ImageNet DiTs have."""

    vae: Any
    device: torch.device

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Of the latents of an image of `height` x `width` pixels."""
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        return config.latent_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_images(self, paths: Sequence[Path], height: int, width: int) -> Tensor:
        """Latents `[B, C, H/8, W/8]`, float32, on the CPU; images are cut to size as by `Encoder.encode_images`."""
        from diffusers.image_processor import VaeImageProcessor

        pixels = _pixels(VaeImageProcessor(), paths, height, width).to(self.device)
        latents: Tensor = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return latents.cpu()


def image_encoder_for(vae: str, device: torch.device | str, *, revision: str | None = None) -> ImageEncoder:
    """The encoder of images of classes.

    vae: hub id of an `AutoencoderKL`, or a folder as diffusers saves one.
    Raises `ValueError` for weights that cannot be had, saying why; `ImportError` without diffusers.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ImportError(f'encoding needs diffusers ({error}): run `pip install "pitools[scale]"`') from error
    model: Any = AutoencoderKL
    try:
        kind = model.load_config(vae, revision=revision).get("_class_name")
        if kind != "AutoencoderKL":
            raise ValueError(f"it is a {kind}, not an AutoencoderKL")
        loaded = model.from_pretrained(vae, revision=revision, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae {vae!r} cannot be loaded: {error}") from error
    return ImageEncoder(loaded.eval().to(device), torch.device(device))


def _pixels(processor: Any, paths: Sequence[Path], height: int, width: int) -> Tensor:
    """Images `[B, 3, height, width]` in [-1, 1], turned, scaled and cropped. `ValueError` for one that is damaged."""
    from diffusers.utils.loading_utils import load_image

    parts: list[Tensor] = []
    for path in paths:  # one by one: the processor takes them for equally large
        with _told_of(path):
            parts.append(processor.preprocess(load_image(str(path)), height, width, resize_mode="crop"))
    return torch.cat(parts)


@contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Within it, what Pillow says of a file that it cannot read becomes a `ValueError` that names it."""
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # a SyntaxError is of a broken PNG
        raise ValueError(f"the image {path} cannot be read ({error}); replace it or leave it out") from error


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

    with _told_of(path), Image.open(path) as image:
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
    limit: int | None = None,
    console: Console | None = None,
) -> Cache:
    """Encode a prompt list, and with `images` the images beside it, into `folder`, or go on where it was interrupted.

    The encoders are loaded only if there is something left to encode.  height, width: whose product is about the
    number of pixels of every image, each of which keeps its shape; see `bucket_of`.  null_prompt: what stands for no
    prompt in guidance.  limit: only the first so many of the list.
    Raises what `read_records`, `encoder_for` and `write_cache` raise.
    """
    family = family_of(kind)
    records = read_records(prompts_source, column, image_column if images else None)[:limit]
    listed = [[record.prompt, _place(record.image)] for record in records]
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

    return _written(folder, records, encode, Record(null_prompt), identity, family.masked, batch_size, console)


def _place(path: Path | None) -> str | None:
    """Where an image lies: one that is mended there is the same, one of the same name elsewhere is another."""
    return None if path is None else str(path.resolve())


def build_class_cache(
    classes: int,
    folder: Path,
    *,
    images: Path | None = None,
    height: int = 256,
    width: int = 256,
    channels: int = 4,
    vae: str = IMAGENET_VAE,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    console: Console | None = None,
) -> Cache:
    """Encode images of classes into `folder`, or go on where it was interrupted.

    The null class is `classes`, the label after the last.  images: a folder with a subfolder for each class; None for
    labels alone, one of each class.  height, width: to which every image is scaled and cropped.  channels: of a
    latent.  vae: see `image_encoder_for`; it is loaded only if there is something left to encode.
    Raises what `read_classes`, `image_encoder_for` and `write_cache` raise, and `ValueError` for a VAE with latents
    of other sizes.
    """
    records = [Labelled(label) for label in range(classes)] if images is None else read_classes(images, classes)
    listed = [[record.label, _place(record.image)] for record in records]
    identity: dict[str, JSON] = {
        "backbone": "dit",
        "classes": classes,
        "vae": None if images is None else vae,
        "records": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
        "size": None if images is None else [height, width],
    }

    @once
    def encoder() -> ImageEncoder:
        loaded = image_encoder_for(vae, device)
        wanted, found = (channels, height // VAE, width // VAE), loaded.shape(height, width)
        if found != wanted:
            raise ValueError(f"vae {vae!r} makes latents {found} of {height} x {width} pixels, and {wanted} are needed")
        return loaded

    def encode(part: Sequence[Labelled]) -> Sequence[Sample]:
        samples: list[dict[str, Tensor]] = [{LABELS: torch.tensor(record.label)} for record in part]
        if images is None:
            return samples
        loaded = encoder()  # for the null class, too: what is wrong with it is told before anything is written
        if paths := [record.image for record in part if record.image is not None]:
            for sample, latents in zip(samples, loaded.encode_images(paths, height, width), strict=True):
                sample[LATENTS] = latents
        return samples

    return _written(folder, records, encode, Labelled(classes), identity, False, batch_size, console)


def _written(
    folder: Path,
    records: Sequence[R],
    encode: Callable[[Sequence[R]], Sequence[Sample]],
    null: R,
    identity: Mapping[str, JSON],
    masked: bool,
    batch_size: int,
    console: Console | None,
) -> Cache:
    """What `write_cache` writes, while a bar shows how far it is, and how much it will be."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    told: list[str] = []

    def measured(part: Sequence[R]) -> Sequence[Sample]:
        samples = encode(part)
        if not told and part[0] is not null:
            each = sum(value.nbytes for sample in samples for value in sample.values()) / len(samples)
            told.append(f"{len(records):,} samples of about {each / 1e6:.2f} MB: {each * len(records) / 1e9:.2f} GB")
            progress.console.print(told[0], highlight=False)
        return samples

    with Progress(*columns, console=console) as progress:
        task = progress.add_task("Encoding", total=len(records))
        write_cache(
            folder,
            records,
            measured,
            null=null,
            identity=identity,
            masked=masked,
            batch_size=batch_size,
            on_samples=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return Cache(folder)
