"""What is measured of images, and what of it is better.

Images are seen once, batch by batch: of patches only moments are kept, of whole images features and logits. What
compares every two of them is taken of `subset` at most of each set, drawn once by the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from pitools.evaluation.extractors import Extractor, extracted
from pitools.evaluation.images import batches, to_pil
from pitools.evaluation.scorers import ImageScorer, scores_of
from pitools.evaluation.targets import Entry
from pitools.metrics import (
    FeatureSet,
    Moments,
    class_diversity,
    density_coverage,
    endpoint_rmse,
    frechet_distance,
    inception_score,
    kernel_distance,
    pairwise_diversity,
    patches,
    precision_recall,
)
from pitools.training.data import OnChunk
from pitools.training.random import keyed_generator

SPLIT = 5000
"""Samples of a part of an Inception Score."""


@dataclass(frozen=True)
class Column:
    """A number that is measured. better: which way; None where neither is. digits: that are shown, or "%"."""

    title: str
    better: Literal["lower", "higher"] | None
    digits: int | Literal["%"]
    about: str

    @property
    def heading(self) -> str:
        """With an arrow to where it is better."""
        return self.title + {"lower": " ↓", "higher": " ↑", None: ""}[self.better]

    def shown(self, value: float) -> str:
        """As a table has it."""
        return f"{value:.1%}" if self.digits == "%" else f"{value:.{self.digits}f}"


COLUMNS: Mapping[str, Column] = {
    "frechet": Column(
        "FD", "lower", 3, "Fréchet distance of the features' mean and covariance to the reference's; FID where they "
        "are Inception's. It falls with the number of samples: compare at one number only."
    ),
    "patch_frechet": Column(
        "patch FD", "lower", 3, "The same of crops of the middle at full resolution, which show details that the "
        "extractor's own size hides."
    ),
    "kernel": Column(
        "KD", "lower", 4, "Kernel distance, MMD² with a cubic kernel; KID where features are Inception's. It has no "
        "bias for few samples, and lies about 0, also below, where the distributions are one."
    ),
    "inception_score": Column(
        "IS", "higher", 2, "Inception Score: how sure the classifier is of each image, and how many classes it sees."
    ),
    "precision": Column("precision", "higher", "%", "Share of the images that lie where the reference's do."),
    "recall": Column("recall", "higher", "%", "Share of the reference that lies where the images do."),
    "density": Column(
        "density", "higher", 3, "How many of the reference's neighbourhoods an image lies in, over k: 1 for the "
        "reference's distribution, more where images keep to its densest parts."
    ),
    "coverage": Column("coverage", "higher", "%", "Share of the reference's neighbourhoods with an image in them."),
    "diversity": Column(
        "diversity", None, 3, "Mean distance of the features of two images: right where it is the reference's own."
    ),
    "class_diversity": Column(
        "per prompt", None, 3, "The same of images of one prompt or class, where all have several."
    ),
    "right_class": Column("right class", "higher", "%", "Share of the images taken for the class that was asked for."),
    "endpoint_rmse": Column(
        "RMSE", "lower", 4, "Root mean square difference to the teacher's images of the same noises, pixels in [-1, 1]."
    ),
}  # fmt: skip


def columns_of(inception: bool, classes: bool, scorers: Iterable[str]) -> dict[str, Column]:
    """All columns, by the names that they go by.

    inception: whether features are Inception's.  classes: whether these are what was asked for, and not prompts.
    """
    names = {"frechet": "FID", "patch_frechet": "pFID", "kernel": "KID"} if inception else {}
    names |= {"class_diversity": "per class" if classes else "per prompt"}
    found = {key: replace(column, title=names.get(key, column.title)) for key, column in COLUMNS.items()}
    about = "Mean of this scorer's answers, of images and what was asked for."
    return found | {scorer: Column(scorer, "higher", 4, about) for scorer in scorers}


@dataclass(frozen=True)
class Measuring:
    """How images are measured.

    extractor, features: the network and its name.  patch: pixels of a side, None for no patches.  k: neighbours of
    precision, recall, density and coverage; None for the 3 and 5 of publications.  classes: whether the logits are of
    the classes that were asked for.  scorers: by name.
    """

    extractor: Extractor
    features: str
    device: torch.device
    patch: int | None = None
    k: int | None = None
    batch: int = 64
    subset: int = 10_000
    seed: int = 0
    classes: bool = False
    scorers: Mapping[str, ImageScorer] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Seen:
    """What is kept of a set of images. features: None where there are only moments of them."""

    moments: Moments
    features: Tensor | None = None
    logits: Tensor | None = None
    patches: Moments | None = None


def see(entry: Entry, how: Measuring, on_chunk: OnChunk) -> tuple[Seen, dict[str, float]]:
    """What the extractor makes of images, and the mean of each scorer's answers.

    `ValueError` for answers of the extractor or of a scorer that are none, images too small for a patch, or fewer than
    two images.
    """
    if len(entry.images) < 2:
        raise ValueError(f"{entry.source}, {entry.title} has {len(entry.images)} images, and at least 2 are needed")
    whole, parts, done, logits = FeatureSet(keep=True), FeatureSet(), 0, True
    totals = dict.fromkeys(how.scorers, 0.0)
    for images in batches(entry.images, how.batch):
        images = images.to(how.device)
        found = extracted(how.extractor, how.features, images)
        logits = found.logits is not None
        whole.add(found.features, found.logits)
        if how.patch is not None:
            parts.add(extracted(how.extractor, how.features, patches(images, how.patch)).features)
        if how.scorers and entry.asked is not None:
            pictures, asked = [to_pil(image) for image in images], entry.asked[done : done + len(images)]
            for name, scorer in how.scorers.items():
                scores = scores_of(scorer, name, pictures, asked)
                if bool(scores.isnan().any()):
                    bad = int(scores.isnan().nonzero()[0])
                    raise ValueError(f"the scorer {name} answers NaN to an image of {asked[bad]!r}")
                totals[name] += float(scores.sum())
        done += len(images)
        on_chunk(done, len(entry.images))
    scored = {name: total / done for name, total in totals.items()} if entry.asked is not None else {}
    patch_moments = parts.moments if how.patch is not None else None
    return Seen(whole.moments, whole.features, whole.logits if logits else None, patch_moments), scored


def alone(entry: Entry, seen: Seen, how: Measuring) -> dict[str, float]:
    """What needs no reference."""
    found: dict[str, float] = {}
    if seen.features is None:
        return found
    features, asked = _subset(seen.features, how), entry.asked
    if seen.logits is not None:
        order = torch.randperm(len(seen.logits), generator=keyed_generator(how.seed, "splits"))
        found["inception_score"] = inception_score(seen.logits[order], max(1, round(len(order) / SPLIT))).mean
    found["diversity"] = pairwise_diversity(features)
    if asked is not None:
        names = {one: number for number, one in enumerate(dict.fromkeys(asked))}
        labels = torch.tensor([names[one] for one in asked])
        if int(labels.bincount().min()) > 1:
            found["class_diversity"] = class_diversity(seen.features, labels)
        if how.classes and seen.logits is not None:
            right = seen.logits.argmax(1) == torch.tensor([int(str(one)) for one in asked])
            found["right_class"] = float(right.double().mean())
    return found


def compared(seen: Seen, reference: Seen, how: Measuring) -> dict[str, float]:
    """What images and a reference, both seen by one extractor, come to.

    `ValueError` for features of another width, and for sets too small for what is measured.
    """
    widths = [len(one.moments.mean) for one in (seen, reference)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"features of {how.features} are {widths[0]} wide, and those of the reference {widths[1]}; name the "
            "extractor that the reference was measured by"
        )
    found = {"frechet": frechet_distance(seen.moments, reference.moments)}
    if seen.patches is not None and reference.patches is not None:
        found["patch_frechet"] = frechet_distance(seen.patches, reference.patches)
    if seen.features is not None and reference.features is not None:
        own, other = _subset(seen.features, how), _subset(reference.features, how)
        found["kernel"] = kernel_distance(own, other).mean
        found |= vars(precision_recall(own, other, how.k or 3))
        found |= vars(density_coverage(own, other, how.k or 5))
    return found


def measured(entry: Entry, reference: Seen, how: Measuring, progress: Callable[[str], OnChunk]) -> dict[str, float]:
    """All numbers of a set of images, in the order of the columns."""
    seen, scored = see(entry, how, progress(f"{entry.source}, {entry.title}"))
    found = {**compared(seen, reference, how), **alone(entry, seen, how)}
    if entry.paired is not None and isinstance(entry.images, Tensor):
        found["endpoint_rmse"] = endpoint_rmse(entry.images, entry.paired)
    return {**{key: found[key] for key in COLUMNS if key in found}, **scored}


def _subset(features: Tensor, how: Measuring) -> Tensor:
    features = features.to(how.device)
    if len(features) <= how.subset:
        return features
    rows = torch.randperm(len(features), generator=keyed_generator(how.seed, "subset"))[: how.subset]
    return features[rows.to(features.device)]
