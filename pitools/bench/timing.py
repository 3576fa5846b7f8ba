"""Times of several ways to do one thing, and what the machine can do at most.

    ratio of two sides = median of the one's times / median of the other's

Sides take turns, round by round, after a warm-up, so that what slows the machine down for a while slows down all.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from pitools.kernels import native

SHORTEST = 0.02
"""Seconds that a turn takes at least: a side that is faster is called several times in it."""

MOST_CALLS = 200

WARM = 0.5
"""Seconds from which on a first call is warm-up enough."""

TRIES = 10

FEWEST_ROUNDS, PATIENCE = 3, 3.0


def interleaved(
    sides: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, shortest: float = SHORTEST
) -> dict[str, float]:
    """The median milliseconds of a call of each side, over `rounds` rounds in which each has one turn.

    After `PATIENCE` seconds, three rounds are enough.
    """
    calls = {}
    for name, side in sides.items():
        if elapsed(side, device) < WARM:  # the first call compiles kernels and takes memory
            calls[name] = min(MOST_CALLS, max(1, round(shortest / elapsed(side, device))))
    taken: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.perf_counter() - began > PATIENCE:
            break
        for name, side in sides.items():
            taken[name].append(1e3 * elapsed(side, device, calls.get(name, 1)) / calls.get(name, 1))
    return {name: median(values) for name, values in taken.items()}


def elapsed(side: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds of so many calls; on a GPU by its own events."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(calls):
                side()
            end.record()
            end.synchronize()
            return max(float(start.elapsed_time(end)) / 1e3, 1e-9)
    began = time.perf_counter()
    for _ in range(calls):
        side()
    return max(time.perf_counter() - began, 1e-9)


@dataclass(frozen=True)
class Ceilings:
    """What this machine does in this run: GFLOP/s of a product of square matrices, GB/s of a copy, read and written."""

    gflops: float
    gbytes: float

    def or_more(self, other: Ceilings) -> Ceilings:
        """The higher of each."""
        return Ceilings(max(self.gflops, other.gflops), max(self.gbytes, other.gbytes))


def ceilings(device: torch.device, tiny: bool = False) -> Ceilings:
    """The best of several tries, in float32; the copy is of 256 MiB, which few caches hold."""
    side, length = (64, 2**12) if tiny else (8192 if device.type == "cuda" else 1536, 2**26)
    a, b, c = (torch.ones(side, side, device=device) for _ in range(3))
    source = torch.ones(length, device=device)
    target = torch.empty_like(source)
    product = min(elapsed(lambda: torch.mm(a, b, out=c), device) for _ in range(TRIES))
    copy = min(elapsed(lambda: target.copy_(source), device) for _ in range(TRIES))
    return Ceilings(2 * side**3 / product / 1e9, 2 * 4 * length / copy / 1e9)


def machine(device: torch.device) -> dict[str, str | int]:
    """What the times were taken on."""
    built = native.library()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "compiler": built if isinstance(built, str) else " ".join(native._compiler() or ()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
