"""The digits recipe's data, and how samples of digits compare with the teacher's and with held-out data.

Latents are scikit-learn's handwritten digits, `[B, 1, 8, 8]` in [-1, 1], of ten classes. A fixed fifth of them is
held out. Nothing here depends on the seed of a run, so that runs compare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pitools import draws
from pitools.guidance import Conditioned
from pitools.metrics import class_diversity, endpoint_rmse, frechet_distance
from pitools.rollout import integrate
from pitools.sampling import best_of, sample
from pitools.training import keyed_generator, sample_generators
from pitools.types import Conditions, Student, VelocityField
from toys.classifier import Classifier, train_classifier
from toys.evaluation import EVALUATION_SEED

SHAPE = (1, 8, 8)
CLASSES = 10
CHUNK = 250
HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """Images `[N, 1, 8, 8]` in [-1, 1], float32, and labels `[N]` in 0..9, for training and held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def load_digits_split() -> Split:
    """The 1,438 digits to train on and the 359 held out, a fifth of each class; always the same ones."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.as_tensor(data.data, dtype=torch.float32).reshape(-1, *SHAPE) / 8 - 1
    labels = torch.as_tensor(data.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=keyed_generator(EVALUATION_SEED, "digits split"))
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(CLASSES):
        members = order[labels[order] == label]
        held_out[members[: round(HELD_OUT * len(members))]] = True
    return Split(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


@cache
def load_classifier() -> Classifier:
    """The classifier of the training images, on the CPU: trained on the first call, in about three seconds."""
    split = load_digits_split()
    return train_classifier(split.train_images, split.train_labels, CLASSES, EVALUATION_SEED)


@dataclass(frozen=True)
class DigitsData:
    """The [data] section of a digits recipe.

    samples: noises that an evaluation starts from, at least 20: two of each class.  best_of: N of a search for the
    noises whose samples the classifier is surest of, by each student for the teacher; 0 for none.
    """

    samples: int = 1000
    best_of: int = 0

    def __post_init__(self) -> None:
        if self.best_of < 0:
            raise ValueError(f"best_of must not be negative, got {self.best_of}")
        if self.samples < 2 * CLASSES:
            raise ValueError(f"samples must be at least {2 * CLASSES}, two of each class, got {self.samples}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent, without the batch."""
        return SHAPE

    @property
    def classes(self) -> int:
        """The number of classes, without the null one."""
        return CLASSES

    @property
    def null_conditions(self) -> Conditions:
        """What stands for no class, one value for each sample: the label after the last."""
        return {"class_labels": CLASSES}

    def __len__(self) -> int:
        """The number of training images."""
        return len(load_digits_split().train_labels)

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Conditions]:
        """The training images `[B, 1, 8, 8]` at `indices` and their classes, on the CPU.

        `ValueError` for an index outside 0..len - 1.
        """
        rows, count = torch.as_tensor(indices, dtype=torch.long), len(self)
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside):
            raise ValueError(f"indices must lie in 0..{count - 1}, got {int(outside[0])}")
        split = load_digits_split()
        return split.train_images[rows], {"class_labels": split.train_labels[rows]}

    @property
    def features(self) -> str:
        """The extractor of these images: the classifier."""
        return "digits"

    def held_out(self) -> tuple[Tensor, Conditions]:
        """The digits that nothing was trained on `[359, 1, 8, 8]` and their classes, on the CPU."""
        split = load_digits_split()
        return split.test_images, {"class_labels": split.test_labels}

    def conditions(self, count: int) -> Conditions:
        """`count` classes in turn, 0 to 9 and again, on the CPU."""
        return {"class_labels": torch.arange(count) % CLASSES}

    def evaluation(self, teacher: VelocityField, device: torch.device | str = "cpu") -> DigitsEvaluation:
        """How students of `teacher` compare with it, from this section's number of noises."""
        return DigitsEvaluation.prepare(teacher, self.samples, device, self.best_of)

    def draw_sheet(self, path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
        """A picture of samples: see the function `draw_sheet`."""
        draw_sheet(path, rows)


@dataclass(frozen=True)
class DigitsEvaluation:
    """Fixed noises `[S, 1, 8, 8]` and classes on the teacher's device, and its end points for them.

    held_out: features `[R, F]` of the data that nothing was trained on.  best_of: N of `search`, or 0.
    """

    teacher: VelocityField
    noise: Tensor
    conditions: Conditions
    classifier: Classifier
    held_out: Tensor
    best_of: int = 0
    _references: dict[tuple[float, float], Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def prepare(
        cls, teacher: VelocityField, samples: int, device: torch.device | str = "cpu", best_of: int = 0
    ) -> DigitsEvaluation:
        """`samples` noises, class by class in turn; fewer samples have the first of the noises that more have."""
        data = DigitsData(samples)
        # Drawn on the CPU: the same on every device.
        keys = sample_generators(EVALUATION_SEED, "digits noise", 0, range(samples))
        noise = draws.normal((samples, *SHAPE), keys, torch.empty(0))
        labels = data.conditions(samples)["class_labels"]
        classifier = load_classifier()
        held_out = classifier.features(load_digits_split().test_images)
        return cls(teacher, noise.to(device), {"class_labels": labels.to(device)}, classifier, held_out, best_of)

    @torch.no_grad()
    def reference(
        self,
        step_size: float = 1 / 128,
        shift: float = 1.0,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """The teacher's end points `[S, 1, 8, 8]`: Euler, in steps of `step_size` in raw time; kept once known.

        on_chunk: told after every 250 samples how many are done, and of how many.
        """
        key = (step_size, shift)
        if key not in self._references:

            def answer(noise: Tensor, conditions: Conditions) -> Tensor:
                given = Conditioned(self.teacher, conditions)
                return integrate(given, noise, 1.0, 0.0, step_size=step_size, shift=shift)

            self._references[key] = self._in_chunks(self.noise, answer, on_chunk)
        return self._references[key]

    @torch.no_grad()
    def search(
        self,
        student: Student,
        nfe: int,
        step_size: float = 1 / 128,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """The teacher's end points `[S, 1, 8, 8]` from the noises whose samples by the student score best.

        Of `best_of` fresh noises for each sample; see `score`.
        """

        def noises(n: int) -> Tensor:
            keys = sample_generators(EVALUATION_SEED, "digits search", n, range(len(self.noise)))
            return draws.normal(self.noise.shape, keys, torch.empty(0)).to(self.noise.device)

        candidates = torch.stack([noises(n) for n in range(self.best_of)], dim=1)

        def answer(noise: Tensor, conditions: Conditions) -> Tensor:
            best = best_of(student, noise.unbind(1), self.score, conditions, nfe)
            return integrate(Conditioned(self.teacher, conditions), best.noise, 1.0, 0.0, step_size=step_size)

        return self._in_chunks(candidates, answer, on_chunk)

    @torch.no_grad()
    def score(self, latents: Tensor, conditions: Conditions | None) -> Tensor:
        """`[B]`: the logarithm of how likely the classifier takes each image to be of the class asked for."""
        labels: Tensor = (conditions or {})["class_labels"].cpu()
        logits: Tensor = self.classifier(latents.cpu().float())
        return logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1).to(latents.device)

    def student(
        self,
        student: Student,
        nfe: int,
        on_chunk: Callable[[int, int], None] = lambda done, total: None,
    ) -> Tensor:
        """A student's end points `[S, 1, 8, 8]` in `nfe` network evaluations, from the same noises."""
        return self._in_chunks(self.noise, lambda noise, conditions: sample(student, noise, nfe, conditions), on_chunk)

    def metrics(self, samples: Tensor, reference: Tensor) -> dict[str, float]:
        """Samples `[S, 1, 8, 8]` beside the teacher's from the same noises, both of this evaluation's classes.

        class_accuracy: share of the samples that the classifier takes for the class they were asked to be.
        frechet_data: d² between features of the samples and of the held-out digits.
        frechet_teacher: d² between features of the samples and of the reference. The two share their noises, so
            that what sampling itself would add cancels: 0 for the teacher, and not a distance between
            distributions as frechet_data is.
        diversity_ratio: mean feature distance of pairs of one class, over the reference's.
        endpoint_rmse: root mean square over all pixels of the difference, in the pixels' units.
        score: the mean of what `search` maximises, where it has something to choose among.
        Raises `ValueError` for a wrong shape, values that are not finite, or a reference of one image a class.
        """
        for name, images in (("samples", samples), ("reference", reference)):
            if images.shape != self.noise.shape:
                expected, got = tuple(self.noise.shape), tuple(images.shape)
                raise ValueError(f"{name} must be {expected}, one image for each noise, got {got}")
            if not bool(images.isfinite().all()):
                raise ValueError(f"{name} must be finite, got {int((~images.isfinite()).sum())} pixels that are not")
        # The classifier stays on the CPU: its answers are the same wherever the samples were made.
        samples, reference = samples.detach().cpu().float(), reference.detach().cpu().float()
        labels = self.conditions["class_labels"].cpu()
        features, teachers = self.classifier.features(samples), self.classifier.features(reference)
        spread = class_diversity(teachers, labels)
        if spread == 0:
            raise ValueError("the reference holds one image a class: there is no diversity to compare with")
        scores = {"score": float(self.score(samples, {"class_labels": labels}).mean())} if self.best_of else {}
        return {
            "class_accuracy": float((self.classifier.classify(samples) == labels).double().mean()),
            "frechet_data": frechet_distance(features, self.held_out),
            "frechet_teacher": frechet_distance(features, teachers),
            "diversity_ratio": class_diversity(features, labels) / spread,
            "endpoint_rmse": endpoint_rmse(samples, reference),
            **scores,
        }

    def _in_chunks(
        self, noise: Tensor, answer: Callable[[Tensor, Conditions], Tensor], on_chunk: Callable[[int, int], None]
    ) -> Tensor:
        total, parts = len(noise), []
        for start in range(0, total, CHUNK):
            rows = slice(start, start + CHUNK)
            parts.append(answer(noise[rows], {key: value[rows] for key, value in self.conditions.items()}))
            on_chunk(min(start + CHUNK, total), total)
        return torch.cat(parts)


def draw_sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """A PNG of the first 20 images of each (title, images `[N, 1, 8, 8]`), a row each, in the order given.

    The teacher's row above the students', from the same noises, shows whether they draw the same digits.
    """
    from toys.plots import SHEET_COLUMNS, sheet

    sheet(path, [(title, images[:SHEET_COLUMNS]) for title, images in rows])
