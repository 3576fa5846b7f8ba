"""The moving average on the CPU of weights that are on a GPU."""

import copy

import pytest
import torch
from torch import nn

from pitools.training import EMA


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("averages", [torch.float32, None])
def test_averages_on_the_cpu_follow_weights_on_the_gpu(weights: torch.dtype, averages: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, dtype=weights, device="cuda")
    own, placed = EMA(layer, dtype=averages), EMA(layer, dtype=averages, device="cpu")
    for step in range(8):
        with torch.no_grad():
            layer.weight.mul_(0.9).add_(0.01 * step)
        own.update(layer)
        placed.update(layer)
    precision = averages or weights
    for name, average in placed.averages.items():
        assert average.device.type == "cpu"
        assert own.averages[name].device.type == "cuda"
        # A GPU may fuse the last product and sum, and so round once where the CPU rounds twice.
        close = 4 * torch.finfo(precision).eps
        torch.testing.assert_close(average, own.averages[name].cpu(), rtol=close, atol=close)

    before = copy.deepcopy(layer.state_dict())
    with placed.applied(layer):
        assert layer.weight.device.type == "cuda"
        assert torch.equal(layer.weight.cpu(), placed.averages["weight"].to(weights))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())

    resumed = EMA(layer, dtype=averages, device="cpu")
    resumed.load_state_dict(own.state_dict())
    assert resumed.steps == 8
    assert resumed.averages["weight"].device.type == "cpu"
    assert torch.equal(resumed.averages["weight"], own.averages["weight"].cpu())
