"""Scorers of single images: how well one shows what was asked for, or how much people would like it.

    clip:MODEL         the cosine of a CLIP model's embeddings of image and prompt; MODEL is a folder or a hub id
    MODULE:FUNCTION    any function (images, prompts or labels) -> a number for each

A package adds its own by the entry point `[project.entry-points."pitools.scorers"] NAME = "package.module:make"`, where
`make(argument, device)` returns such a function. Two that publications report, each with its own package installed:

    def vqascore(argument, device):        # t2v_metrics; takes files
        import t2v_metrics
        model = t2v_metrics.VQAScore(model=argument or "clip-flant5-xxl", device=str(device))

        def score(images, prompts):
            with tempfile.TemporaryDirectory() as folder:
                files = [f"{folder}/{number}.png" for number in range(len(images))]
                for image, file in zip(images, files):
                    image.save(file)
                return [float(model(images=[file], texts=[text])) for file, text in zip(files, prompts)]

        return score

    def hpsv2(argument, device):           # hpsv2; takes pictures
        import hpsv2
        return lambda images, prompts: [
            float(hpsv2.score(image, text, hps_version="v2.1")[0]) for image, text in zip(images, prompts)
        ]

Neither package is installed where this is tested. Prompts of their benchmarks, and of OneIG-Bench, are read by
`scale.prompts.read_records`; OneIG-Bench's own protocol looks at folders of its own form, and runs beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from pitools.evaluation.plugins import named

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageScorer(Protocol):
    """What `--scorer` names; any function of this form is one."""

    def __call__(self, images: list[Image], asked: list[Any]) -> Sequence[float] | Tensor:
        """A number for each of the images, which show the prompts or labels `asked`: the higher, the better."""
        ...


def load_scorer(name: str, device: torch.device | str = "cpu") -> ImageScorer:
    """The scorer that `name` means, as the head of this module lists them; `pitools.evaluation.plugins.named` says what
    is raised."""
    return cast(ImageScorer, named("scorer", "pitools.scorers", name, device))


@torch.no_grad()
def scores_of(scorer: ImageScorer, name: str, images: Sequence[Any], asked: Sequence[object]) -> Tensor:
    """`[B]`, float64, on the CPU. `ValueError` for an answer that is not a number for each image."""
    answer = scorer(list(images), list(asked))
    wanted = f"the scorer {name} must return a number for each of the {len(images)} images"
    try:
        scores = torch.as_tensor(answer, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {answer!r:.80}") from error
    if scores.shape != (len(images),):
        raise ValueError(f"{wanted}, got numbers of shape {tuple(scores.shape)}")
    return scores
