"""Tests that need a GPU; without one, all of them are skipped."""

import pytest
import torch

HERE = __file__.rpartition("conftest.py")[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what lies in this folder where torch sees no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if str(item.path).startswith(HERE):
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))
