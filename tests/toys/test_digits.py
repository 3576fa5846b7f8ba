"""The digits recipe's data, its classifier, and metrics that answer to what is wrong with samples."""

import hashlib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import random
from torch import Tensor

from pitools import Schedule, draws, integrate, sample
from pitools.evaluation.extractors import extracted, load_extractor
from pitools.guidance import Conditioned
from pitools.metrics import class_diversity, frechet_distance
from pitools.policies import FlowMapStudent, GMHead
from pitools.training import sample_generators
from pitools.types import PIXELWISE, Conditions, Time, patchwise
from toys.classifier import Classifier, train_classifier
from toys.digits import DigitsData, DigitsEvaluation, draw_sheet, load_classifier, load_digits_split
from toys.evaluation import EVALUATION_SEED
from toys.network import ToyStudent
from toys.targets import Target, load_target

SAMPLES = 300  # more than a chunk, and not a multiple of one


class Spy:
    """A teacher that counts: the exact one, with what it was asked."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.batches: list[int] = []

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(x_t))
        return self.target.velocity(x_t, t, conditions)


@pytest.fixture(scope="module")
def evaluation() -> DigitsEvaluation:
    return DigitsEvaluation.prepare(load_target("digits"), SAMPLES)


@pytest.fixture(scope="module")
def reference(evaluation: DigitsEvaluation) -> Tensor:
    return evaluation.reference(step_size=1 / 16, shift=4.0)


def test_the_split_is_fixed() -> None:
    split, digest = load_digits_split(), hashlib.sha256()
    for part in (split.train_images, split.train_labels, split.test_images, split.test_labels):
        digest.update(part.numpy().tobytes())
    assert digest.hexdigest() == "7a47082597a58b72b6b626c3083d92affb10859b471c3d0d10517d4e117988ce"


def test_the_split_is_the_data_set_in_two_parts_of_equal_mix() -> None:
    split = load_digits_split()
    assert split.train_images.shape == (1438, 1, 8, 8)
    assert split.test_images.shape == (359, 1, 8, 8)
    assert split.train_images.dtype == torch.float32
    images = torch.cat([split.train_images, split.test_images])
    labels = torch.cat([split.train_labels, split.test_labels])
    assert (float(images.min()), float(images.max())) == (-1, 1)
    # The 1,797 digits all differ, so that equal sets mean that each lies in one part, once, with its label.
    pairs = {(label, bytes(image.numpy().tobytes())) for image, label in zip(images, labels.tolist(), strict=True)}
    priors = load_target("digits").priors
    assert pairs == {(label, bytes(x.numpy().tobytes())) for label, prior in enumerate(priors) for x in prior.means}
    assert len(pairs) == 1797
    for label in range(10):
        held_out, whole = int((split.test_labels == label).sum()), int((labels == label).sum())
        assert abs(held_out - whole / 5) <= 0.5


def test_the_data_section() -> None:
    data, split = DigitsData(), load_digits_split()
    assert (data.samples, data.shape, data.classes, len(data)) == (1000, (1, 8, 8), 10, 1438)
    assert data.null_conditions == {"class_labels": 10}
    assert data.conditions(12)["class_labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    indices = [3, 1437, 0, 3]
    images, conditions = data.batch(indices)
    assert images.shape == (4, 1, 8, 8)
    assert set(conditions) == {"class_labels"}
    for image, label, index in zip(images, conditions["class_labels"], indices, strict=True):
        assert torch.equal(image, split.train_images[index])
        assert label == split.train_labels[index]
    held_out, own = data.held_out()
    assert torch.equal(held_out, split.test_images)
    assert torch.equal(own["class_labels"], split.test_labels)
    images.zero_()  # a batch is the caller's own
    assert split.train_images[3].abs().max() > 0
    with pytest.raises(FrozenInstanceError):
        data.samples = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="samples must be at least 20, two of each class, got 19"):
        DigitsData(samples=19)
    for bad in (-1, 1438):
        with pytest.raises(ValueError, match=rf"indices must lie in 0..1437, got {bad}"):
            data.batch([0, bad])


def test_the_classifier_knows_digits_that_it_has_not_seen() -> None:
    split, classifier = load_digits_split(), load_classifier()
    right = classifier.classify(split.test_images) == split.test_labels
    assert float(right.double().mean()) >= 0.98
    features = classifier.features(split.test_images)
    assert features.shape == (359, 48)
    torch.testing.assert_close(classifier.outlet(features), classifier(split.test_images))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    assert load_classifier() is classifier
    with pytest.raises(ValueError, match=r"images must be \[S, 1, 8, 8\], got \(4, 64\)"):
        classifier.features(torch.zeros(4, 64))


def test_the_digits_network_answers_as_the_classifier() -> None:
    digits, classifier, images = load_extractor("digits"), load_classifier(), load_digits_split().test_images[:20]
    found = extracted(digits, "digits", images)
    assert torch.equal(found.features, classifier.features(images))
    assert found.logits is not None
    torch.testing.assert_close(found.logits, classifier(images))
    # Coloured, and of another size: pixels that are repeated and averaged again are the same ones.
    large = images.repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    same = extracted(digits, "digits", large)
    torch.testing.assert_close(same.features, found.features)
    with pytest.raises(ValueError, match="digits takes no argument, got 'x'"):
        load_extractor("digits:x")


def test_the_classifier_is_a_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toys.classifier.STEPS", 20)
    split = load_digits_split()

    def weights(seed: int, state: int) -> list[Tensor]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        classifier = train_classifier(split.train_images, split.train_labels, 10, seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert not torch.is_grad_enabled()
        return list(classifier.parameters())

    with torch.random.fork_rng(), torch.no_grad():
        first, again, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with torch.inference_mode():
        inferred = train_classifier(split.train_images, split.train_labels, 10, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, inferred.parameters(), strict=True))
    assert all(bool((a != b).any()) for a, b in zip(first, Classifier(10, random(0)).parameters(), strict=True))


def test_the_shipped_classifier_is_the_same_bit_for_bit() -> None:
    split, classifier = load_digits_split(), load_classifier()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        load_classifier.cache_clear()
        again = load_classifier()
    assert again is not classifier
    assert torch.equal(again.features(split.test_images), classifier.features(split.test_images))


def test_the_evaluation_depends_on_nothing_but_its_size() -> None:
    target = load_target("digits")
    noises = []
    for state, count in ((1, 40), (2, 40), (1, 60)):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            before = torch.get_rng_state()
            one = DigitsData(samples=count).evaluation(target)
            assert torch.equal(torch.get_rng_state(), before)
        assert one.noise.shape == (count, 1, 8, 8)
        assert one.conditions["class_labels"].tolist() == [i % 10 for i in range(count)]
        noises.append(one.noise)
    assert torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2][:40])
    assert len({float(x) for x in noises[2].flatten()}) > 3800  # of 3840: no noise is another's
    assert float(noises[2].mean()) == pytest.approx(0, abs=0.06)
    assert float(noises[2].std()) == pytest.approx(1, abs=0.04)


def test_the_reference_is_the_teachers_in_chunks_and_once(evaluation: DigitsEvaluation) -> None:
    spy, calls = Spy(load_target("digits")), []
    # Classes in no order: one chunk must not be given another's.
    conditions = {"class_labels": torch.randint(10, (SAMPLES,), generator=random(0))}
    own = replace(evaluation, teacher=spy, conditions=conditions)
    answer = own.reference(1 / 8, 4.0, on_chunk=lambda done, total: calls.append((done, total)))
    assert spy.batches == [250] * 8 + [50] * 8
    assert calls == [(250, 300), (300, 300)]

    class Whole:
        def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
            return spy.target.velocity(x_t, t, conditions)

    whole = integrate(Whole(), evaluation.noise, 1.0, 0.0, step_size=1 / 8, shift=4.0)
    torch.testing.assert_close(answer, whole, rtol=0, atol=1e-4)
    assert own.reference(1 / 8, 4.0) is answer
    assert len(spy.batches) == 16
    assert (own.reference(1 / 8, 1.0) - answer).abs().max() > 0.01
    assert (own.reference(1 / 4, 4.0) - answer).abs().max() > 0.01


def test_a_students_end_points_are_those_of_sample(evaluation: DigitsEvaluation) -> None:
    student = ToyStudent(
        GMHead(3), Schedule(nfe=2), patchwise(2), (1, 8, 8), classes=10, width=16, generator=random(0)
    ).eval()
    calls: list[tuple[int, int]] = []
    x = evaluation.student(student, 2, lambda done, total: calls.append((done, total)))
    assert calls == [(250, 300), (300, 300)]
    assert not x.requires_grad
    with torch.no_grad():
        expected = sample(student, evaluation.noise, 2, evaluation.conditions)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


def test_the_teacher_beside_itself(evaluation: DigitsEvaluation, reference: Tensor) -> None:
    own = evaluation.metrics(reference, reference.clone())
    assert list(own) == ["class_accuracy", "frechet_data", "frechet_teacher", "diversity_ratio", "endpoint_rmse"]
    assert own["endpoint_rmse"] == 0
    assert own["diversity_ratio"] == 1
    assert own["frechet_teacher"] == pytest.approx(0, abs=1e-20)
    assert own["class_accuracy"] >= 0.98  # its data is what the classifier learnt from, but for the held-out fifth


def test_metrics_are_what_they_say(evaluation: DigitsEvaluation, reference: Tensor) -> None:
    moved = reference + 0.1 * torch.randn(reference.shape, generator=random(0))
    result, classifier = evaluation.metrics(moved, reference), load_classifier()
    labels, split = evaluation.conditions["class_labels"], load_digits_split()
    features, teachers = classifier.features(moved), classifier.features(reference)
    assert result == {
        "class_accuracy": float((classifier(moved).argmax(1) == labels).sum()) / SAMPLES,
        "frechet_data": frechet_distance(features, classifier.features(split.test_images)),
        "frechet_teacher": frechet_distance(features, teachers),
        "diversity_ratio": class_diversity(features, labels) / class_diversity(teachers, labels),
        "endpoint_rmse": pytest.approx(float((moved - reference).double().square().mean().sqrt()), rel=1e-6),
    }
    assert result["frechet_teacher"] < result["frechet_data"]


def test_metrics_tell_what_is_wrong(evaluation: DigitsEvaluation, reference: Tensor) -> None:
    own = evaluation.metrics(reference, reference)
    # One image a class: right digits, no variety.
    labels = evaluation.conditions["class_labels"]
    collapsed = evaluation.metrics(reference[:10][labels], reference)
    assert collapsed["class_accuracy"] >= 0.9
    assert collapsed["diversity_ratio"] == pytest.approx(0, abs=1e-6)
    assert collapsed["frechet_teacher"] > 10
    # Any digit for any class: the set is the same, its classes are not.
    shuffled = evaluation.metrics(reference[torch.randperm(SAMPLES, generator=random(0))], reference)
    assert shuffled["class_accuracy"] == pytest.approx(0.1, abs=0.06)
    assert shuffled["frechet_data"] == pytest.approx(own["frechet_data"], rel=1e-9)
    assert shuffled["diversity_ratio"] > 1.5
    # Noise: no digits at all.
    noise = evaluation.metrics(evaluation.noise, reference)
    assert noise["class_accuracy"] < 0.3
    assert noise["frechet_data"] > 10 * own["frechet_data"]
    assert noise["frechet_teacher"] > 10 * own["frechet_data"]
    assert noise["endpoint_rmse"] > 1
    # Digits that nothing was trained on are near to the data, and far from the teacher's in the pixels.
    split = load_digits_split()
    rows = [int((split.test_labels == i % 10).nonzero()[i // 10]) for i in range(SAMPLES)]
    real = evaluation.metrics(split.test_images[rows], reference)
    assert real["class_accuracy"] >= 0.97
    assert real["frechet_data"] < 0.5 * own["frechet_data"]
    assert real["diversity_ratio"] == pytest.approx(1, abs=0.2)
    assert real["endpoint_rmse"] > 0.4


@pytest.mark.filterwarnings("ignore:20 samples are too few for the covariance")
def test_a_search_hands_the_teacher_the_noises_that_score_best() -> None:
    """By a student that is the teacher itself, so that its choices are the teacher's."""
    target, count = load_target("digits"), 20
    searching = DigitsEvaluation.prepare(target, count, best_of=3)

    def ends(noise: Tensor, conditions: Conditions) -> Tensor:
        return integrate(Conditioned(target, conditions), noise, 1.0, 0.0, step_size=1 / 8)

    def mean_velocity(noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        return noise - ends(noise, conditions or {})

    found = searching.search(FlowMapStudent(mean_velocity, PIXELWISE), 1, step_size=1 / 8)
    noises = [
        draws.normal(
            (count, 1, 8, 8), sample_generators(EVALUATION_SEED, "digits search", n, range(count)), torch.empty(0)
        )
        for n in range(3)
    ]
    images = torch.stack([ends(noise, searching.conditions) for noise in noises])
    scores = torch.stack([searching.score(each, searching.conditions) for each in images])
    best = images[scores.argmax(0), torch.arange(count)]
    torch.testing.assert_close(found, best, rtol=0, atol=1e-4)
    assert len(scores.argmax(0).unique()) == 3
    reference = searching.reference(1 / 8)
    told = searching.metrics(found, reference)["score"]
    assert told == pytest.approx(float(scores.amax(0).mean()), abs=1e-4)
    assert told > searching.metrics(reference, reference)["score"]
    # Log-probabilities of the class asked for.
    logits = load_classifier()(found)
    expected = -torch.nn.functional.cross_entropy(logits, searching.conditions["class_labels"], reduction="none")
    torch.testing.assert_close(searching.score(found, searching.conditions), expected)
    with pytest.raises(ValueError, match="best_of must not be negative, got -1"):
        DigitsData(best_of=-1)


def test_what_cannot_be_compared_is_refused(evaluation: DigitsEvaluation, reference: Tensor) -> None:
    broken = reference.clone()
    broken[5, 0, 3, 3] = torch.nan
    bad: list[tuple[Any, Any, str]] = [
        (reference[:20], reference, r"samples must be \(300, 1, 8, 8\), one image for each noise, got \(20, "),
        (reference, reference.flatten(1), "reference must be"),
        (broken, reference, "samples must be finite, got 1 pixels"),
        (reference, torch.zeros_like(reference), "no diversity to compare with"),
    ]
    for samples, against, message in bad:
        with pytest.raises(ValueError, match=message):
            evaluation.metrics(samples, against)


def test_the_sheet_shows_twenty_of_each_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import toys.plots

    images = load_digits_split().test_images[:30]
    DigitsData().draw_sheet(tmp_path / "sheet.png", [("teacher", images[:3]), ("gm, 1 NFE", -images[:3])])
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    drawn: list[tuple[str, Tensor]] = []
    monkeypatch.setattr(toys.plots, "sheet", lambda path, rows: drawn.extend(rows))
    draw_sheet(tmp_path / "wide.png", [("teacher", images), ("student", -images)])
    assert [title for title, _ in drawn] == ["teacher", "student"]
    assert torch.equal(drawn[0][1], images[:20])
    assert torch.equal(drawn[1][1], -images[:20])
