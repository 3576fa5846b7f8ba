"""Randomness that needs no saving: every draw is a function of (seed, purpose, step, global sample index)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


def keyed_generator(
    seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu", sample: int | None = None
) -> torch.Generator:
    """A generator for the draws of one purpose at one step; with `sample`, of that sample alone.

    Two keys give unrelated streams, and the same key gives the same stream in every run.
    """
    key = f"{seed}/{purpose}/{step}" + ("" if sample is None else f"/{sample}")
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def sample_generators(seed: int, purpose: str, step: int, samples: Iterable[int]) -> list[torch.Generator]:
    """One generator for each global sample index: a draw does not depend on how a batch is cut up."""
    return [keyed_generator(seed, purpose, step, sample=sample) for sample in samples]


@contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Within it, modules that are made draw their weights from `generator`, which lives on the CPU.

    They draw from torch's global state, which is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield
        generator.set_state(torch.get_rng_state())
