"""What follows from a claim's numbers, students that are trained once, and every claim at next to no size."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mixtures import random
from test_cli import pitools

import toys.lab
from pitools.training import DivergenceError
from toys.claims import CLAIMS, QUICK, Bench, Size, UpTo
from toys.evidence import Check, Finding, Ratio
from toys.lab import TO_TEACHER, Lab, Source
from toys.targets import load_target
from toys.verdicts import _read, _told, markdown

TINY = Size(range(2), ("spiral",), ("ring8",), plane=(3, 16), images=(3, 16), calls=0.008, samples=(40, 20))


def test_the_interval_is_students() -> None:
    check = Check("", (1.0, 2.0, 3.0))
    half = 4.302652729911275 / math.sqrt(3)  # a table's t at 2 degrees of freedom, and a standard deviation of 1
    assert check.mean == 2
    assert check.interval == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert Check("", (1.0,)).interval == (-math.inf, math.inf)


def test_the_interval_of_a_ratio_is_that_of_its_logarithm() -> None:
    ratio, logs = Ratio("", (0.5, 1.0, 4.0)), Check("", (math.log(0.5), 0.0, math.log(4.0)))
    assert ratio.mean == pytest.approx(2 ** (1 / 3))
    assert ratio.interval == pytest.approx([math.exp(end) for end in logs.interval])
    # One over the ratio says the same.
    other = Ratio("", (2.0, 1.0, 0.25))
    assert ratio.interval == pytest.approx([1 / end for end in reversed(other.interval)])
    assert Ratio("", (math.inf, 2.0, 2.1), 1).verdict == "holds"
    assert Ratio("", (0.0, 0.5, 0.51), at_most=1).verdict == "holds"
    assert Ratio("", (math.inf, 0.0), 1).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("values", "at_least", "at_most", "verdict"),
    [
        ((1.0, 1.1, 1.2), 0.8, None, "holds"),
        ((1.0, 1.1, 1.2), 1.0, None, "inconclusive"),
        ((1.0, 1.1, 1.2), 1.4, None, "does not hold"),
        ((1.0, 1.1, 1.2), None, 1.4, "holds"),
        ((1.0, 1.1, 1.2), None, 0.8, "does not hold"),
        ((1.0, 1.1, 1.2), 0.8, 1.4, "holds"),
        ((1.0, 1.1, 1.2), 0.8, 1.2, "inconclusive"),
        ((1.0, 1.1, 1.2), None, None, None),
        ((5.0,), 1.0, None, "inconclusive"),
        ((math.inf, math.inf), 1.0, None, "holds"),
        ((math.inf, 2.0, 2.1), 1.0, None, "holds"),
        ((math.inf, 2.0), 1.0, None, "inconclusive"),
        ((math.inf, 2.0, 2.1), None, 1.0, "does not hold"),
        ((-math.inf, 2.0, 2.1), None, 4.0, "holds"),
        ((math.nan, 2.0), 1.0, None, "inconclusive"),
    ],
)
def test_a_verdict_is_of_the_interval(values, at_least, at_most, verdict) -> None:  # type: ignore[no-untyped-def]
    assert Check("", values, at_least, at_most).verdict == verdict


def test_a_claim_holds_if_all_its_checks_do() -> None:
    holds, fails = Check("", (1.0, 1.0), at_least=0), Check("", (1.0, 1.0), at_most=0)
    unsure, told = Check("", (1.0, -1.0), at_least=0), Check("", (1.0, -1.0))
    for checks, verdict in (
        ([holds, told], "holds"),
        ([holds, unsure], "inconclusive"),
        ([holds, unsure, fails], "does not hold"),
        ([told], "inconclusive"),
    ):
        assert Finding("", checks, 0.0).verdict == verdict


def test_a_student_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Bench(tmp_path, TINY).gm("ring8", seed=0, K=4)
    first = Bench(tmp_path, TINY).lab.student(run).state_dict()

    def refuse(*_: object) -> None:
        raise DivergenceError("step 1: trained again")

    monkeypatch.setattr(toys.lab, "distill", refuse)
    again = Bench(tmp_path, TINY).lab.student(run).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for other in (replace(run, seed=1), replace(run, training=replace(run.training, steps=4))):
        with pytest.raises(DivergenceError, match="trained again"):
            Bench(tmp_path, TINY).lab.student(other)
    monkeypatch.undo()
    # What diverged is known to have, and is infinitely bad.
    bench = Bench(tmp_path, TINY)
    with pytest.raises(DivergenceError, match="trained again"):
        bench.lab.student(replace(run, seed=1))
    metrics = bench.lab.metrics(replace(run, seed=1))
    assert {metrics[name] for name in ("endpoint_rmse", TO_TEACHER)} == {math.inf}
    assert metrics["diversity"] == 0


def test_a_weak_teacher_is_right_on_its_path_and_knows_the_mean_off_it() -> None:
    target, weak = load_target("ring8"), Source("ring8", weak=True).load()
    means, std = target.modes.means, target.modes.std  # type: ignore[union-attr]
    for t in (0.1, 0.5, 1.0):
        x_t = (1 - t) * target.sample(200, random(0)) + t * torch.randn(200, 2, generator=random(1))
        gaps = torch.cdist(x_t, (1 - t) * means).amin(1) / math.hypot((1 - t) * std, t)
        near = (gaps < 3.9).nonzero().squeeze(1)
        assert len(near) > 190
        u, v = (field.velocity(x_t[near], t) for field in (target, weak))
        torch.testing.assert_close(v, u, rtol=1e-4, atol=1e-4)
    far = torch.tensor([[9.0, 0.0]])
    torch.testing.assert_close(weak.velocity(far, 0.1), far / 0.1, rtol=1e-3, atol=1e-5)  # x̂ = 0, the data's mean


def test_blurred_data_is_beside_the_same_teacher() -> None:
    target, blurred = load_target("ring8"), Source("ring8", blur=0.5).load()
    x = torch.randn(50, 2, generator=random(0))
    assert torch.equal(target.velocity(x, 0.5), blurred.velocity(x, 0.5))
    own, other = (field.sample(4000, random(1)) for field in (target, blurred))
    torch.testing.assert_close(other.var() - own.var(), torch.tensor(0.25), rtol=0, atol=0.05)


def test_times_up_to_a_bound() -> None:
    drawn = UpTo(most=0.6).draw(5000, random(0), torch.empty(0))
    assert 0 <= drawn.min() < 0.01
    assert 0.59 < drawn.max() < 0.6
    assert drawn.mean() == pytest.approx(0.3, abs=0.01)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("students"), TINY)


SOON = ("push", "synergy")
MEASURED = [
    pytest.param(claim, id=claim.name, marks=[] if claim.name in SOON else [pytest.mark.slow]) for claim in CLAIMS
]


@pytest.mark.parametrize("claim", MEASURED)
def test_a_claim_is_measured_on_every_seed(claim, bench: Bench) -> None:  # type: ignore[no-untyped-def]
    checks = claim.measure(bench)
    assert checks
    assert all(len(check.values) == len(TINY.seeds) for check in checks)
    assert any(check.verdict is not None for check in checks)
    assert len({check.says for check in checks}) == len(checks)
    text = markdown([Finding(claim.name, checks, 1.0)], quick=False)
    assert f"## {claim.name}\n\n{claim.says} ({claim.source})" in text
    assert all(check.says in text for check in checks)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_is_told_where_all_diverges(claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def diverge(*_: object, **__: object) -> None:
        raise DivergenceError("step 1: loss nan")

    monkeypatch.setattr(Lab, "student", diverge)
    monkeypatch.setattr("toys.claims.distill", diverge)
    monkeypatch.setattr("toys.claims.train", diverge)
    finding = Finding(claim.name, claim.measure(Bench(tmp_path, TINY)), 1.0)
    assert all(len(check.values) == len(TINY.seeds) for check in finding.checks)
    told = json.loads(json.dumps(_told(finding), allow_nan=False))
    again = _read(told)
    assert [check.verdict for check in again.checks] == [check.verdict for check in finding.checks]
    assert claim.says in markdown([again], quick=False)


def test_claims_have_names_of_their_own() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.says.endswith(".") for claim in CLAIMS)


def test_an_unknown_claim_is_refused(tmp_path: Path) -> None:
    output = pitools("claims", "--only", "magic", cwd=tmp_path, code=2)
    assert "unknown claim 'magic'; the claims are gm-beats-dx" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_quick_run_writes_its_folder_and_goes_on(tmp_path: Path) -> None:
    """Under 15 minutes on two cores; then only what is lacking is done."""
    pitools("claims", "--quick", cwd=tmp_path, timeout=900)
    folder = tmp_path / "runs" / "claims" / "quick"
    found = json.loads((folder / "claims.json").read_text())
    assert [finding["name"] for finding in found] == [claim.name for claim in CLAIMS]
    assert {len(check["values"]) for finding in found for check in finding["checks"]} == {len(QUICK.seeds)}
    assert "**A quick run**" in (folder / "CLAIMS.md").read_text()
    students = sorted((folder / "students").iterdir())
    pitools("claims", "--quick", "--only", "gm-beats-dx,push", cwd=tmp_path)
    assert sorted((folder / "students").iterdir()) == students
    again = json.loads((folder / "claims.json").read_text())
    assert [(one["name"], one["checks"]) for one in again] == [(one["name"], one["checks"]) for one in found]
