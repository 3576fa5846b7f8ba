"""Randomness that needs no saving: every draw is a function of (seed, purpose, step)."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(seed: int, purpose: str, step: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for the draws of one purpose at one step; the row of a draw is the global sample index.

    Two keys give unrelated streams, and the same key gives the same stream in every run.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
