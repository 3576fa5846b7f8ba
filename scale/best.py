"""Best-of-N over seeds: of N images for each one wanted, the one that a scorer likes best (FreeFlow, section 5.2).

Image i of all is drawn from the seeds s + N i ... s + N i + N - 1, where s is the first.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from PIL.Image import Image
from torch import Tensor

from pitools.sampling import improves


class ImageScorer(Protocol):
    """What `--scorer MODULE:NAME` names; any function of this form is one."""

    def __call__(self, images: list[Image], asked: list[Any]) -> Sequence[float] | Tensor:
        """A number for each of the images, which show the prompts or labels `asked`: the higher, the better."""
        ...


@dataclass(frozen=True)
class Search:
    """count: N.  scorer: chooses among them.  name: its own, as it was given."""

    count: int
    scorer: ImageScorer
    name: str


@dataclass(frozen=True)
class Drawn:
    """An image, the seed that it was drawn from, and its score, None where nothing was scored."""

    image: Any
    seed: int
    score: float | None = None


def seeds_each(search: Search | None) -> int:
    """Seeds that an image takes."""
    return 1 if search is None else search.count


def settings_of(search: Search | None) -> dict[str, object]:
    """What `samples.json` tells of a search."""
    return {} if search is None else {"best_of": search.count, "scorer": search.name}


def drawn(
    draw: Callable[[list[torch.Generator]], Sequence[Any]], asked: Sequence[object], first: int, search: Search | None
) -> list[Drawn]:
    """An image for each prompt or label that is `asked`, by `draw` from a generator for each.

    first: the first of the seeds.  Of those that score the same, the first wins; NaN is no score.
    Raises `ValueError` for scores that are no numbers, or another count of them, and where all of an image are NaN.
    """
    count = seeds_each(search)
    best: list[Drawn] = []
    scores = torch.full([len(asked)], torch.nan, dtype=torch.float64)
    for n in range(count):
        seeds = [first + count * i + n for i in range(len(asked))]
        images = list(draw([torch.Generator().manual_seed(seed) for seed in seeds]))
        if search is None:
            return [Drawn(image, seed) for image, seed in zip(images, seeds, strict=True)]
        found = _scores(search, images, asked)
        better = improves(found, scores)
        scores = torch.where(better, found, scores)
        new = [Drawn(*row) for row in zip(images, seeds, found.tolist(), strict=True)]
        best = [new[i] if better[i] or n == 0 else best[i] for i in range(len(asked))]
    if search is not None and bool(scores.isnan().any()):
        missing = int(scores.isnan().nonzero()[0])
        raise ValueError(f"the scorer {search.name} answers NaN to all {count} images of {asked[missing]!r}")
    return best


def named_scorer(name: str) -> ImageScorer:
    """The function that "MODULE:NAME" names, of a module that is installed or lies in the current folder.

    `ValueError` for a module or a function that cannot be had.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'a scorer is named as "MODULE:FUNCTION", got {name!r}')
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's file does
        raise ValueError(f"the scorer's module {module_name!r} cannot be imported: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        instead = "" if found is None else f", but a value of type {type(found).__name__}"
        raise ValueError(f"the scorer's module {module_name!r} has no function {attribute!r}{instead}")
    return cast(ImageScorer, found)


@torch.no_grad()
def _scores(search: Search, images: list[Any], asked: Sequence[object]) -> Tensor:
    answer = search.scorer(list(images), list(asked))
    wanted = f"the scorer {search.name} must return a number for each of the {len(images)} images"
    try:
        scores = torch.as_tensor(answer, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{wanted}, got {answer!r:.80}") from error
    if scores.shape != (len(images),):
        raise ValueError(f"{wanted}, got numbers of shape {tuple(scores.shape)}")
    return scores
