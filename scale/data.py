"""What students of diffusers transformers train on: a recipe's section `[data]`.

    name = "cache"          what `pitools cache` wrote: prompts or class labels, and latents where it was given images
    name = "classes"        class labels alone, for flow maps, which see no images
    name = "stub-prompts"   random conditions and latents for tiny models, which need no files

A batch is of one size. Latents of several sizes are bucketed: in each epoch every bucket is shuffled and cut into
batches, and the batches of all buckets are shuffled. What is left of a bucket sits out that epoch, other samples in
each; one that holds less than a batch never takes part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pitools.training import keyed_generator
from pitools.training.data import data_indices
from pitools.training.errors import CheckpointError
from pitools.types import Conditions, VelocityField
from scale.backbone import TINY_TEXT
from scale.cache import LABELS, LATENTS, TEXT, Cache, Sample, collate

VAE, PATCH = 8, 2
"""Pixels to a latent pixel, and latent pixels to a token, along each axis."""

SHEET_WIDTH = 8


@dataclass(frozen=True)
class CachedSamples:
    """The section `[data]` with `name = "cache"`.

    folder: that `pitools cache` wrote.  height, width: of images, in pixels, where the cache has none to tell, and
    where they are of one size, as for classes.  channels: of a latent: 16, or 32 for FLUX.2, or 4 for a DiT.
    """

    folder: Path
    height: int = 1024
    width: int = 1024
    channels: int = 16

    def __post_init__(self) -> None:
        check_size("height", self.height)
        check_size("width", self.width)
        if self.channels < 1:
            raise ValueError(f"channels must be at least 1, got {self.channels}")

    @cached_property
    def cache(self) -> Cache:
        """The cache, opened when it is first asked for; see there for what is refused."""
        return Cache(self.folder)

    @property
    def backbone(self) -> str | None:
        """The name of the backbone that the cache was encoded for, where it says so."""
        return self.cache.identity.get("backbone")

    @property
    def classes(self) -> int | None:
        """The number of classes, without the null one; None for prompts, and as long as there is no whole cache."""
        try:
            return self.cache.identity.get("classes")
        except CheckpointError:
            return None  # whoever needs the cache is told

    @property
    def has_latents(self) -> bool:
        """Whether there are images: without, only data-free distillation can use the cache."""
        return self.cache.sizes is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent of the section's own size."""
        return self.channels, self.height // VAE, self.width // VAE

    @property
    def null_conditions(self) -> Conditions:
        """The conditions of the null prompt or class, `[1, ...]`."""
        return collate([self.cache.null], self.cache.masked)

    def __len__(self) -> int:
        """The number of prompts, or of images with a class."""
        return len(self.cache)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        """Latents `[B, C, H, W]` and conditions, on the CPU; without images the latents are zeros of `shape`.

        `ValueError` for latents of several sizes, and for those that `indices` refuses.
        """
        self._check_latents()
        samples: list[Sample] = [self.cache[index] for index in indices]
        conditions = collate(samples, self.cache.masked)
        if not self.has_latents:
            return torch.zeros(len(samples), *self.shape), conditions
        shapes = sorted({tuple(sample[LATENTS].shape) for sample in samples})
        if len(shapes) > 1:
            raise ValueError(f"indices must be of samples of one size, got latents {shapes}; take them from `indices`")
        return torch.stack([sample[LATENTS] for sample in samples]).float(), conditions

    def indices(self, seed: int, step: int, batch: int, rows: Sequence[int]) -> list[int]:
        """Which samples the given rows of a step's global batch are: all rows of one step are of one size.

        `ValueError` where no size has as many samples as `batch`, where latents have another number of channels than
        the section, and those of classes another size.
        """
        self._check_latents()
        buckets = self._buckets
        if len(buckets) == 1:
            return data_indices(seed, len(self), step, batch, rows)
        batches = sum(len(bucket) // batch for bucket in buckets)
        if batches == 0:
            most = max(map(len, buckets))
            raise ValueError(f"batch {batch} is more than there are samples of any one size, at most {most}; lower it")
        own = _batches(buckets, seed, batch, step // batches)[step % batches]
        return [int(own[row]) for row in rows]

    @cached_property
    def _first(self) -> tuple[int, ...] | None:
        """The shape of the first sample's latents; None where there are none."""
        return tuple(self.cache[0][LATENTS].shape) if self.has_latents else None

    def _check_latents(self) -> None:
        if self._first is None:
            return
        if self._first[0] != self.channels:
            raise ValueError(f"channels is {self.channels}, and the cache has latents of {self._first[0]}")
        if self.classes is not None and self._first != self.shape:  # a network for classes is for one size
            height, width = (VAE * size for size in self._first[1:])
            raise ValueError(
                f"height x width is {self.height} x {self.width}, and the cache has images of {height} x {width}; "
                "set that in [data]"
            )

    @cached_property
    def _buckets(self) -> tuple[Tensor, ...]:
        """The indices of the samples of each size."""
        sizes = self.cache.sizes
        if sizes is None:
            return (torch.arange(len(self)),)
        found, which = torch.unique(sizes, dim=0, return_inverse=True)
        return tuple((which == bucket).nonzero().squeeze(1) for bucket in range(len(found)))

    def evaluation(self, teacher: VelocityField, device: torch.device | str = "cpu") -> None:
        """None: what there is to see are sheets of samples."""

    def draw_sheet(self, path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
        """A picture of latents: see the function `draw_sheet`."""
        draw_sheet(path, rows)


@dataclass(frozen=True)
class ClassLabels:
    """The section `[data]` with `name = "classes"`: as many labels, and images that there are none of.

    height, width: of images, in pixels.  channels: of a latent.
    """

    classes: int = 1000
    height: int = 256
    width: int = 256
    channels: int = 4

    def __post_init__(self) -> None:
        check_size("height", self.height)
        check_size("width", self.width)
        for name in ("classes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def has_latents(self) -> bool:
        """There are no images."""
        return False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        return self.channels, self.height // VAE, self.width // VAE

    @property
    def null_conditions(self) -> Conditions:
        """The label after the last."""
        return {LABELS: self.classes}

    def __len__(self) -> int:
        """The number of classes."""
        return self.classes

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        """Zeros of `shape` in the place of latents, and the labels themselves; `ValueError` for one outside."""
        outside = [index for index in indices if not 0 <= index < self.classes]
        if outside:
            raise ValueError(f"indices must lie in 0..{self.classes - 1}, got {outside[0]}")
        return torch.zeros(len(indices), *self.shape), {LABELS: torch.tensor(list(indices))}

    def evaluation(self, teacher: VelocityField, device: torch.device | str = "cpu") -> None:
        """None: what there is to see are sheets of samples."""

    def draw_sheet(self, path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
        """A picture of latents: see the function `draw_sheet`."""
        draw_sheet(path, rows)


@dataclass(frozen=True)
class StubPrompts:
    """The section `[data]` with `name = "stub-prompts"`: random samples, each a function of its index alone.

    backbone: for which tiny model.  height, width: of images that there are none of, in pixels.  samples: how many.
    """

    backbone: Literal["qwen", "flux", "flux2", "dit"] = "qwen"
    height: int = 64
    width: int = 96
    samples: int = 8

    def __post_init__(self) -> None:
        check_size("height", self.height)
        check_size("width", self.width)
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent."""
        channels: Mapping[str, int] = {"flux2": 32, "dit": 4}
        return channels.get(self.backbone, 16), self.height // VAE, self.width // VAE

    @property
    def classes(self) -> int | None:
        """The number of classes that a tiny DiT has, without the null one; None for the others."""
        return 10 if self.backbone == "dit" else None

    @property
    def null_conditions(self) -> Conditions:
        """The label after the last, or random conditions of their own."""
        if self.classes is not None:
            return {LABELS: self.classes}
        return collate([self._text(-1)], self._masked)

    def __len__(self) -> int:
        """The number of samples."""
        return self.samples

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        """Latents `[B, C, H, W]`, standard normal, and conditions; `ValueError` for an index outside 0..len - 1."""
        outside = [index for index in indices if not 0 <= index < self.samples]
        if outside:
            raise ValueError(f"indices must lie in 0..{self.samples - 1}, got {outside[0]}")
        latents = [torch.randn(self.shape, generator=_of_sample("latents", index)) for index in indices]
        if self.classes is not None:
            return torch.stack(latents), {LABELS: torch.tensor(list(indices)) % self.classes}
        return torch.stack(latents), collate([self._text(index) for index in indices], self._masked)

    @property
    def _masked(self) -> bool:
        return self.backbone == "qwen"

    def _text(self, index: int) -> dict[str, Tensor]:
        """A sample's conditions; of a length of its own where there is a mask."""
        generator = _of_sample("text", index)
        length = 3 + (3 * index) % 7 if self._masked else 6
        sample = {TEXT: torch.randn(length, TINY_TEXT, generator=generator)}
        if self.backbone == "flux":
            sample["pooled_projections"] = torch.randn(TINY_TEXT, generator=generator)
        return sample

    def evaluation(self, teacher: VelocityField, device: torch.device | str = "cpu") -> None:
        """None: random samples show nothing."""

    def draw_sheet(self, path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
        """A picture of latents: see the function `draw_sheet`."""
        draw_sheet(path, rows)


def draw_sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """A PNG of the first 8 of each (title, latents `[N, C, H, W]`), a row each, in the order given.

    Latents are not decoded: red, green and blue are the three main directions in which the channels of the first
    row's pixels vary, from their 1st to their 99th percentile, and the same for all rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(title, latents[:SHEET_WIDTH].detach().cpu().double()) for title, latents in rows]
    colours = _Colours(shown[0][1])
    columns = max(len(latents) for _, latents in shown)
    figure = Figure(figsize=(1.4 * columns + 2.2, 1.5 * len(shown) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Latents, not decoded: three principal components as colours", fontsize=9)
    axes = figure.subplots(len(shown), columns, squeeze=False)
    for line, (title, latents) in zip(axes, shown, strict=True):
        for axis in line:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for axis, latent in zip(line, latents, strict=False):
            axis.imshow(colours(latent).numpy(), interpolation="nearest")
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")


class _Colours:
    """Latents `[C, H, W]` to colours `[H, W, 3]` in [0, 1], by the principal components of `reference` [N, C, H, W]."""

    def __init__(self, reference: Tensor) -> None:
        pixels = reference.nan_to_num().movedim(1, -1).flatten(0, -2)
        self.mean = pixels.mean(dim=0)
        centred = pixels - self.mean
        directions = torch.linalg.eigh(centred.mT @ centred).eigenvectors[:, -3:].flip(-1)
        # A direction's sign is nobody's choice: the largest of its entries is positive.
        largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
        self.directions = directions * largest.sign()
        seen = centred @ self.directions
        quantiles = torch.quantile(seen[:: -(-len(seen) // 100_000)], torch.tensor([0.01, 0.99]).double(), dim=0)
        self.low, self.range = quantiles[0], (quantiles[1] - quantiles[0]).clamp_min(1e-9)

    def __call__(self, latent: Tensor) -> Tensor:
        seen = ((latent.movedim(0, -1) - self.mean) @ self.directions - self.low) / self.range
        seen = seen.nan_to_num().clamp(0, 1)
        return torch.nn.functional.pad(seen, (0, 3 - seen.shape[-1]))


@lru_cache(maxsize=4)
def _batches(buckets: tuple[Tensor, ...], seed: int, batch: int, epoch: int) -> Tensor:
    """An epoch's batches `[N, batch]`, each of one bucket."""
    batches: list[Tensor] = []
    for number, bucket in enumerate(buckets):
        order = torch.randperm(len(bucket), generator=keyed_generator(seed, "bucket order", epoch, sample=number))
        batches.append(bucket[order][: len(bucket) // batch * batch].reshape(-1, batch))
    together = torch.cat(batches)
    return together[torch.randperm(len(together), generator=keyed_generator(seed, "batch order", epoch))]


def check_size(name: str, pixels: int) -> None:
    """`ValueError` for a height or width of images, as `name` says, of which no whole number of tokens can be made."""
    unit = VAE * PATCH
    if pixels < 1 or pixels % unit:
        near = max(unit, round(pixels / unit) * unit)
        raise ValueError(f"{name} must be a multiple of {unit} pixels, got {pixels}; use {near}")


def _of_sample(what: str, index: int) -> torch.Generator:
    return keyed_generator(0, f"stub {what}", sample=index)
