"""Inception Score, of what a classifier makes of samples (Salimans et al. 2016, section 4); float64 inside.

IS = exp E KL(p(c | x) ‖ p(c)) = exp(H(E p) - E H(p)),    H the entropy over classes

1 where all samples look alike to the classifier; the number of classes where it is sure of each, and all are as many.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InceptionScore:
    """mean, std: over the splits; std is 0 for one."""

    mean: float
    std: float


def inception_score(logits: Tensor, splits: int = 1) -> InceptionScore:
    """Of a classifier's logits or log-probabilities `[S, classes]`; -inf is a probability of 0.

    splits: parts, one after another and as even as can be, that are scored on their own. Order thus decides: shuffle
        samples that are sorted, by class above all. A part knows fewer samples, and its score is lower: publications
        take 10 parts of 5000, and values compare at one S and one number of splits only.
    Raises `ValueError` for another shape, values that are NaN or +inf, a sample of no class, probabilities instead of
    their logarithms, or more splits than samples.
    """
    if logits.ndim != 2 or logits.shape[1] < 2 or not len(logits):
        raise ValueError(f"logits must be [S, classes], of a sample and two classes or more, got {tuple(logits.shape)}")
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must lie in 1..{len(logits)}, the number of samples, got {splits}")
    logits = logits.detach().double()
    if bool((logits.isnan() | logits.isposinf()).any()) or bool(logits.isneginf().all(1).any()):
        raise ValueError("logits must be finite or -inf, with at least one finite in each row")
    if bool((logits >= 0).all()) and bool((logits.sum(1) - 1).abs().max() < 1e-2):
        raise ValueError("logits must be logits or log-probabilities, and these rows sum to 1: give their logarithm")
    scores = torch.stack([_score(part) for part in logits.softmax(1).tensor_split(splits)])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _score(p: Tensor) -> Tensor:
    entropy = torch.special.entr(p)
    gain: Tensor = torch.special.entr(p.mean(0)).sum() - entropy.sum(1).mean()
    return gain.exp()
