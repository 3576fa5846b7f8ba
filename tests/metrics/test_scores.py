"""The Inception Score against torchmetrics and known answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools.metrics import InceptionScore, inception_score


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save", r"ignore:std\(\). degrees of freedom")
@given(st.integers(0, 2**31), st.integers(1, 8), st.sampled_from([1, 2, 5]), st.integers(2, 12))
def test_the_score_is_torchmetrics(seed: int, each: int, splits: int, classes: int) -> None:
    from torchmetrics.image.inception import InceptionScore as Theirs

    logits = 3 * randn(random(seed), each * splits, classes)
    theirs = Theirs(feature=torch.nn.Identity(), splits=splits)
    theirs.set_dtype(torch.float64)
    theirs.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mean, std = theirs.compute()  # shuffles, and divides by splits - 1
        torch.manual_seed(seed)
        order = torch.randperm(len(logits))
    found = inception_score(logits[order], splits)
    assert found.mean == pytest.approx(float(mean), rel=1e-9)
    if splits > 1:
        assert found.std == pytest.approx(float(std) * math.sqrt((splits - 1) / splits), rel=1e-6, abs=1e-12)
    else:
        assert found.std == 0


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 9))
def test_logits_log_probabilities_and_the_definition_agree(seed: int, classes: int, samples: int) -> None:
    g = random(seed)
    logits = 4 * randn(g, samples, classes)
    p = logits.softmax(1).tolist()
    marginal = [sum(column) / samples for column in zip(*p, strict=True)]
    kl = [sum(a * math.log(a / b) for a, b in zip(row, marginal, strict=True)) for row in p]
    known = pytest.approx(math.exp(sum(kl) / samples), rel=1e-9)
    assert inception_score(logits) == InceptionScore(known, 0.0)
    assert inception_score(logits.log_softmax(1)).mean == known
    assert inception_score(100 + logits[torch.randperm(samples, generator=g)].flip(1)).mean == known


@pytest.mark.parametrize("classes", [2, 10])
def test_known_scores(classes: int) -> None:
    sure = torch.eye(classes).repeat(6, 1).log()  # -inf but for one class
    assert inception_score(sure).mean == pytest.approx(classes, rel=1e-12)
    assert inception_score(1e4 * torch.eye(classes)).mean == pytest.approx(classes, rel=1e-12)
    assert inception_score(torch.zeros(7, classes)).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(sure[:1].expand(7, -1)).mean == 1
    # Two classes only, and never in doubt.
    assert inception_score(sure[torch.tensor([0, 1, 1, 0])]).mean == pytest.approx(2, rel=1e-12)


def test_order_decides_the_splits() -> None:
    classes = torch.eye(4).log()
    together, apart = classes.repeat_interleave(3, 0), classes.repeat(3, 1)
    assert inception_score(together, 4) == InceptionScore(1.0, 0.0)
    assert inception_score(apart, 3).mean == pytest.approx(4)
    # Seven samples in three parts: 3, 2 and 2.
    found = inception_score(classes[torch.tensor([0, 1, 2, 0, 0, 1, 2])], 3)
    assert found.mean == pytest.approx((3 + 1 + 2) / 3)
    assert found.std == pytest.approx(math.sqrt(2 / 3))


def test_logits_that_do_not_fit_are_refused() -> None:
    for bad in (torch.zeros(3), torch.zeros(3, 1), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match=r"logits must be \[S, classes\]"):
            inception_score(bad)
    for splits in (0, 4):
        with pytest.raises(ValueError, match=rf"splits must lie in 1\.\.3.*got {splits}"):
            inception_score(torch.zeros(3, 2), splits)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite or -inf"):
            inception_score(torch.tensor([[0.0, value]]))
    with pytest.raises(ValueError, match="at least one finite"):
        inception_score(torch.full((1, 2), -math.inf))
    with pytest.raises(ValueError, match="give their logarithm"):
        inception_score(randn(random(0), 5, 3).softmax(1).bfloat16())
