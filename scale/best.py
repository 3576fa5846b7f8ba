"""Best-of-N over seeds: of N images for each one wanted, the one that a scorer likes best (FreeFlow, section 5.2).

Image i of all is drawn from the seeds s + N i ... s + N i + N - 1, where s is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pitools.evaluation.scorers import ImageScorer, scores_of
from pitools.sampling import improves


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
        found = scores_of(search.scorer, search.name, images, asked)
        better = improves(found, scores)
        scores = torch.where(better, found, scores)
        new = [Drawn(*row) for row in zip(images, seeds, found.tolist(), strict=True)]
        best = [new[i] if better[i] or n == 0 else best[i] for i in range(len(asked))]
    if search is not None and bool(scores.isnan().any()):
        missing = int(scores.isnan().nonzero()[0])
        raise ValueError(f"the scorer {search.name} answers NaN to all {count} images of {asked[missing]!r}")
    return best
