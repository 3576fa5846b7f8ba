"""The Triton kernels on a GPU against the rows executed one by one; float32 there is float32 throughout."""

from typing import Any

import pytest
import torch
from programmes import executed, gradients, random_run

RUNS: dict[str, tuple[Any, ...]] = {  # B, L, K, C, R and flags
    "images": (4, 1000, 8, 16, 32),
    "times of each sample": (7, 33, 8, 16, 16, "own times"),
    "large": (3, 5, 64, 64, 4),
    "odd": (3, 37, 13, 5, 8, "own variances", "dropped"),
    "points in a plane": (1, 999, 16, 2, 16, "points"),
    "many short components": (1, 77, 64, 1, 8),
    "one long component": (1, 77, 1, 64, 8),
    "commits": (5, 20, 8, 4, 12, "combine", "own times"),
    "history": (5, 20, 8, 4, 12, "history", "own variances"),
    "history of each sample": (5, 20, 8, 4, 12, "moves", "own times"),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize(("dtype", "close", "steep"), [(torch.float32, 2e-5, 1e-3), (torch.float64, 1e-11, 1e-9)])
def test_states_and_gradients(name: str, dtype: torch.dtype, close: float, steep: float) -> None:
    from pitools.kernels import triton_gm

    run = random_run(list(RUNS).index(name), *RUNS[name])
    out_bar = torch.randn(len(run.stops), *run.x.shape, generator=torch.Generator().manual_seed(1)).double()
    there = run.to(dtype).to("cuda")
    wanted = executed(run)
    got = triton_gm.forward(there.arguments).cpu()
    assert (got - wanted).abs().max() < close * wanted.abs().max()
    grads = triton_gm.backward(there.arguments, out_bar.to("cuda", dtype))
    for mine, gradient in zip(grads, gradients(run, out_bar), strict=True):
        assert (mine.cpu() - gradient).abs().max() < steep * max(1.0, float(gradient.abs().max()))


def test_a_roll_out_takes_little_memory() -> None:
    from pitools.kernels import triton_gm

    run = random_run(0, 16, 1024, 8, 16, 4).to(torch.float32).to("cuda")
    out_bar = torch.ones(len(run.stops), *run.x.shape, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = triton_gm.backward(run.arguments, out_bar)
    gradients_themselves = sum(grad.nbytes for grad in grads)
    taken = torch.cuda.max_memory_allocated() - before - gradients_themselves
    parameters = run.means.nbytes + run.log_weights.nbytes + run.variance.nbytes
    assert taken < 0.5 * parameters
