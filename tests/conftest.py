"""Shared settings and the random objects that many tests draw."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("default")

# One thread a worker, and for the commands that it starts: the tensors are small, and pytest-xdist fills the cores.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

LONGEST = ("test_distributed.py", "test_tiny_recipes.py", "test_cli.py")
"""Files that begin first where two processes share the files, so that none is left alone with them at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist keeps the order of files."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, and within each all as it was."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
