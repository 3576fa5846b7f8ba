"""Networks whose features compare images.

    images [B, C, H, W] in [-1, 1]  -->  features [B, F], and where the network is a classifier logits [B, classes]

    digits             the classifier of the digits recipes, for 8 x 8 pixels
    inception:FILE     Inception-v3 as FIDs are published with, from a TorchScript file
    MODULE:FUNCTION    any function of images, of a module that is installed or lies in the current folder

A package adds its own by the entry point `[project.entry-points."pitools.extractors"] NAME = "package.module:make"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from pitools.evaluation.plugins import named

SIDE = 299  # of the images that Inception was trained on


class Extracted(NamedTuple):
    """features: `[B, F]`.  logits: `[B, classes]`, or logarithms of probabilities; None for a network without."""

    features: Tensor
    logits: Tensor | None = None


class Extractor(Protocol):
    """What `--features` names; any function of this form is one."""

    def __call__(self, images: Tensor) -> Extracted | Tensor:
        """Of images `[B, C, H, W]` in [-1, 1]; a tensor is the features alone."""
        ...


def load_extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """The extractor that `name` means, as the head of this module lists them; `pitools.evaluation.plugins.named` says
    what is raised."""
    return cast(Extractor, named("feature extractor", "pitools.extractors", name, device))


@torch.no_grad()
def extracted(extractor: Extractor, name: str, images: Tensor) -> Extracted:
    """What the extractor `name` says of images `[B, C, H, W]`; `ValueError` for an answer of another form."""
    answer: object = extractor(images)
    if isinstance(answer, Tensor):
        answer = Extracted(answer)
    wanted = f"the feature extractor {name} must return features [{len(images)}, F] of {len(images)} images"
    if not isinstance(answer, Extracted):
        raise ValueError(f"{wanted}, got a value of type {type(answer).__name__}")
    for what, value in (("features", answer.features), ("logits", answer.logits)):
        if value is not None and (not isinstance(value, Tensor) or value.ndim != 2 or len(value) != len(images)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{wanted}, and logits [{len(images)}, classes] or none, got {what} {shape}")
    return answer


@dataclass(frozen=True, eq=False)
class Inception:
    """Inception-v3 with the weights of 2015, which FIDs are published with: F = 2048, 1008 classes.

    network: takes uint8 images `[B, 3, H, W]` of any size and resizes them itself; with `return_features=True` it
    answers with features, with `no_output_bias=True` with the probabilities that the Inception Score is defined by.
    """

    network: Any
    device: torch.device

    def __call__(self, images: Tensor) -> Extracted:
        """Of images `[B, 3, H, W]`, or of grey ones `[B, 1, H, W]`."""
        pixels = (images.to(self.device) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        pixels = pixels.expand(-1, 3, -1, -1).contiguous()
        features = self.network(pixels, return_features=True)
        return Extracted(features, self.network(pixels, no_output_bias=True).log())


def inception(argument: str, device: torch.device) -> Inception:
    """`inception:FILE`: the TorchScript file that the evaluations of StyleGAN and EDM take.

    `ValueError` for a file that is not there, is damaged, or holds something else.
    """
    what = "the TorchScript file inception-2015-12-05.pt of StyleGAN2-ADA's metrics"
    if not argument:
        raise ValueError(f"inception needs a file, as inception:FILE: {what}")
    if not Path(argument).is_file():
        raise ValueError(f"there is no file {argument!r} to take Inception from; download {what}")
    try:
        network = torch.jit.load(argument, map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{argument} cannot be read as TorchScript ({reason}); download it again: {what}") from error
    made = Inception(network, device)
    try:
        extracted(made, "inception", torch.zeros(1, 3, SIDE, SIDE))
    except (RuntimeError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{argument} is TorchScript, but not the Inception network ({reason}); use {what}") from error
    return made
