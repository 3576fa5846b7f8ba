"""The compiled kernels: built once, found again, and done without where there is no compiler."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pitools import GaussianMixture, GMPolicy, integrate
from pitools.kernels import Kernel, choose, native, plain

PROGRAMME = """
import torch
from pitools import GaussianMixture, GMPolicy, integrate
from pitools.kernels import choose
g = torch.Generator().manual_seed(0)
mixture = GaussianMixture(torch.randn(2, 3, 4, 2, generator=g), torch.zeros(2, 3, 4), 0.1)
policy = GMPolicy(mixture, torch.ones(2, 3, 2), 1.0)
end = integrate(policy, policy.x_src, 1.0, 0.5)
print(choose(policy, policy.x_src, torch.ones(1)).name, end.flatten().tolist(), sep="|")
"""


def run(cache: Path, **environment: str) -> tuple[str, torch.Tensor]:
    """The name of the kernel and an end point, in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "PITOOLS_KERNELS")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMME],
        env={**clean, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    name, values = done.stdout.strip().split("|")
    return name, torch.tensor(json.loads(values))


@pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")
def test_it_is_built_once_and_found_again(tmp_path: Path) -> None:
    name, first = run(tmp_path)
    assert name == "C++"
    (built,) = (tmp_path / "pitools").iterdir()
    when = built.stat().st_mtime_ns
    again = run(tmp_path)
    assert again[0] == "C++"
    assert torch.equal(again[1], first)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "pitools").iterdir()] == [when]


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler", ""])
def test_without_a_compiler_the_result_is_the_same(tmp_path: Path, compiler: str) -> None:
    name, slow = run(tmp_path, CXX=compiler)
    assert name != "C++"
    assert "compiler" in name or "/bin/false" in name or "no-such-compiler" in name
    g = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(torch.randn(2, 3, 4, 2, generator=g), torch.zeros(2, 3, 4), 0.1)
    policy = GMPolicy(mixture, torch.ones(2, 3, 2), 1.0)
    with plain():
        reference = integrate(policy, policy.x_src, 1.0, 0.5).flatten()
    torch.testing.assert_close(slow, reference, rtol=1e-5, atol=1e-6)


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "pitools").write_text("a file where the folder should be")
    name, _ = run(tmp_path)
    assert "could not be built" in name


@pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")
def test_several_threads_may_roll_out_at_once() -> None:
    g = torch.Generator().manual_seed(0)
    mixture = GaussianMixture(torch.randn(3, 400, 8, 4, generator=g), torch.zeros(3, 400, 8), 0.1)
    policy = GMPolicy(mixture, torch.randn(3, 400, 4, generator=g), 1.0)
    assert isinstance(choose(policy, policy.x_src, torch.ones(1)), Kernel)
    expected, got = integrate(policy, policy.x_src, 1.0, 0.1), {}

    def work(n: int) -> None:
        got[n] = integrate(policy, policy.x_src, 1.0, 0.1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[n], expected) for n in range(4))


@pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")
def test_a_file_that_is_no_library_is_built_anew(tmp_path: Path) -> None:
    _, first = run(tmp_path)
    (built,) = (tmp_path / "pitools").iterdir()
    built.write_bytes(b"not a library")
    name, again = run(tmp_path)
    assert name == "C++"
    assert torch.equal(again, first)


@pytest.mark.skipif(isinstance(native.library(), str), reason=f"needs a compiler: {native.library()}")
def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    old = tmp_path / "pitools" / "building-old"
    fresh = tmp_path / "pitools" / "building-fresh"
    for folder in (old, fresh):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    run(tmp_path)
    assert not old.exists()
    assert fresh.exists()
