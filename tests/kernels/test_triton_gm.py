"""The Triton kernels, in Triton's interpreter on the CPU, against the rows executed one by one.

The interpreter must be chosen before triton is imported, which other tests may have done: this file runs itself in
a process of its own.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from programmes import Run, executed, gradients, random_run

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, with Triton's interpreter")

RUNS: dict[str, tuple[Any, ...]] = {  # B, L, K, C, R and flags
    "euler": (2, 9, 8, 16, 6),
    "more factors than a block": (3, 23, 5, 3, 3),
    "times of each sample": (3, 5, 3, 5, 5, "own times"),
    "one number": (5, 1, 1, 1, 4, "own times"),
    "large": (1, 2, 64, 64, 2),
    "one long component": (1, 5, 1, 33, 3),
    "many short components": (1, 17, 37, 1, 3, "own variances"),
    "points": (2, 3, 7, 2, 5, "points", "dropped"),
    "a variance each": (2, 3, 7, 4, 5, "own variances", "dropped"),
    "points, a variance each": (2, 3, 4, 6, 4, "own variances", "points"),
    "far off": (2, 4, 8, 4, 5, "far off"),
    "close": (2, 4, 8, 4, 5, "close", "own variances"),
    "commits": (2, 5, 6, 3, 8, "combine", "dropped"),
    "commits of each sample": (4, 3, 6, 3, 7, "combine", "own times", "own variances"),
    "history": (2, 5, 8, 7, 9, "history", "own variances"),
    "history of each sample": (3, 4, 5, 2, 8, "history", "own times", "dropped"),
    "no combination": (2, 3, 4, 4, 6, "moves", "own times"),
    "no row": (2, 3, 4, 4, 0),
}


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_the_interpreter() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env=own | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{2 * len(RUNS) + 3} passed" in done.stdout


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, relative to the largest value wanted."""
    assert got.shape == wanted.shape
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)) if wanted.numel() else 0.0


@interpreted
@pytest.mark.parametrize("name", RUNS)
def test_states_are_those_of_the_rows_one_by_one(name: str) -> None:
    from pitools.kernels import triton_gm

    run = random_run(list(RUNS).index(name), *RUNS[name])
    wanted = executed(run)
    assert error(triton_gm.forward(run.arguments), wanted) < 1e-12
    single = triton_gm.forward(run.to(torch.float32).arguments)
    assert single.dtype == torch.float32
    assert error(single, wanted) < 1e-5


@interpreted
@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_those_of_autograd(name: str) -> None:
    from pitools.kernels import triton_gm

    run = random_run(100 + list(RUNS).index(name), *RUNS[name])
    out_bar = torch.randn(len(run.stops), *run.x.shape, generator=torch.Generator().manual_seed(1)).double()
    got = triton_gm.backward(run.arguments, out_bar)
    for mine, wanted in zip(got, gradients(run, out_bar), strict=True):
        # One component alone has a log-weight without effect: rounding, on the scale of the other gradients.
        assert (mine - wanted).abs().max() < 1e-10 * max(1.0, float(wanted.abs().max()))
    single = triton_gm.backward(run.to(torch.float32).arguments, out_bar.float())
    for mine, wanted in zip(single, got, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - wanted).abs().max() < 1e-3 * max(1.0, float(wanted.abs().max()))


@interpreted
def test_strides_are_the_callers() -> None:
    from pitools.kernels import triton_gm

    run = random_run(7, 2, 3, 6, 5, 4)
    out_bar = torch.ones(len(run.stops), *run.x.shape, dtype=torch.float64)
    loose = Run(
        run.means.contiguous(),
        run.log_weights.mT.contiguous().mT,
        run.variance[:1].expand(6, 1),
        *run.arguments[3:],
        run.history,
    )
    tight = Run(run.means, run.log_weights, run.variance[:1].repeat(6, 1), *run.arguments[3:], run.history)
    assert torch.equal(triton_gm.forward(loose.arguments), triton_gm.forward(tight.arguments))
    pairs = zip(triton_gm.backward(loose.arguments, out_bar), triton_gm.backward(tight.arguments, out_bar), strict=True)
    assert all(torch.equal(mine, wanted) for mine, wanted in pairs)


@interpreted
def test_dropped_components_have_no_gradient() -> None:
    from pitools.kernels import triton_gm

    run = random_run(8, 2, 3, 6, 5, 4, "own variances", "dropped")
    gone = run.log_weights == -torch.inf
    assert gone.any()
    out_bar = torch.ones(len(run.stops), *run.x.shape, dtype=torch.float64)
    for given in triton_gm.backward(run.arguments, out_bar)[:3]:
        assert given.isfinite().all()
        assert (given[gone] == 0).all()


@interpreted
def test_rows_of_another_length_are_refused() -> None:
    from pitools.kernels import triton_gm

    run = random_run(9, 1, 2, 2, 2, 2)
    with pytest.raises(ValueError, match="coefficients"):
        triton_gm.forward(run.arguments._replace(coefficients=run.coefficients[:, :4]))
