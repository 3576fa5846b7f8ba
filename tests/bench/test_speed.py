"""The sides of `pitools bench` under pytest-benchmark: `python -m pytest tests/bench --benchmark-group-by group`.

In parallel (-n) pytest-benchmark only runs them. Bounds are generous: they catch a kernel that is no longer taken.
"""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture  # type: ignore[import-untyped]
from torch import Tensor

from pitools import integrate, kernels
from pitools.bench.elementwise import Elementwise, image
from pitools.bench.parts import SHAPES, Settings, Shape, plainly, rollouts
from pitools.kernels import native

CPU = torch.device("cpu")
SMALL = (Shape("DiT", 1, 8, 8, 32, 4, 32), Shape("FLUX", 1, 16, 16, 8, 16, 32), Shape("toys", 256, 1, 1, 32, 2, 32))
TARGETS = {"DiT-XL/2": 15, "FLUX, Qwen 512²": 25, "FLUX, Qwen 1024²": 25, "2-D toys": 40}


def side(name: str, shape: Shape) -> Callable[[], Tensor]:
    policy = shape.policy(CPU)
    x = policy.x_src

    def library() -> Tensor:
        return integrate(policy, x, 1.0, 0.0, "euler", step_size=1 / shape.substeps)

    if name == "elementwise":
        written, latent = Elementwise.of(policy, shape.height, shape.width), image(x, shape.height, shape.width)
        return lambda: written.rollout(latent, 1.0, 0.0, shape.substeps)
    return library if name == "fused" else lambda: plainly(library)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["elementwise", "plain", "fused"])
def test_rollout(benchmark: BenchmarkFixture, name: str, shape: Shape) -> None:
    benchmark.group = f"roll-out, {shape.name}"
    end = benchmark.pedantic(side(name, shape), rounds=3, warmup_rounds=1)
    assert end.isfinite().all()


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_gradient(benchmark: BenchmarkFixture, name: str) -> None:
    benchmark.group = "gradient of the state, FLUX"
    policy = SMALL[1].policy(CPU)
    x = policy.x_src.clone().requires_grad_()

    def library() -> Tensor:
        return torch.autograd.grad(integrate(policy, x, 0.5, 0.4, "euler", step_size=1 / 32).sum(), x)[0]

    benchmark.pedantic(library if name == "fused" else lambda: plainly(library), rounds=3, warmup_rounds=1)


@pytest.mark.skipif(isinstance(native.library(), str), reason="needs a compiler")
def test_the_kernel_is_taken_and_not_slower() -> None:
    (row,) = (case.measure() for case in rollouts(Settings(CPU, SMALL[1:2], rounds=5)))
    assert row.by == "C++"
    assert row.ratios["plain/fused"] > 1


@pytest.mark.slow
@pytest.mark.skipif(isinstance(native.library(), str), reason="needs a compiler")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_full_size(shape: Shape) -> None:
    """Half of what `pitools bench` shows on two quiet cores with AVX-512."""
    (row,) = (case.measure() for case in rollouts(Settings(CPU, [shape])))
    assert row.ratios["elementwise/fused"] > TARGETS[shape.name] / 2


def test_the_plain_path_is_plain() -> None:
    policy = SMALL[0].policy(CPU)
    with kernels.plain():
        assert isinstance(kernels.choose(policy, policy.x_src, torch.ones(1)), str)
