"""The moving average of weights."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recipes import tiny
from rich.console import Console
from torch import nn

from pitools.training import EMA, CheckpointError, keyed_generator, loop
from pitools.training.engine import Engine
from pitools.training.jobs import FlowMatching
from pitools.training.recipe import plan


def linear(dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(3, 2, dtype=dtype)


def power_profile(history: list[torch.Tensor], gamma: float) -> torch.Tensor:
    """In closed form and float64: the weights of a product of (1 - β_j) and later β's."""
    weights, left = [], 1.0
    for step in range(len(history), 0, -1):
        beta = (1 - 1 / step) ** (gamma + 1)
        weights.insert(0, left * (1 - beta))
        left *= beta
    assert sum(weights) == pytest.approx(1)  # nothing is left of the initial weights
    return torch.stack([w * h.double() for w, h in zip(weights, history, strict=True)]).sum(0)


@pytest.mark.parametrize("dtype", [torch.float64, None])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 7.0])
def test_ema_is_karras_power_profile(gamma: float, dtype: torch.dtype | None) -> None:
    layer = linear()
    ema, history = EMA(layer, gamma, dtype), []
    for step in range(1, 30):
        with torch.no_grad():
            layer.weight.fill_(torch.sin(torch.tensor(float(step))))
        ema.update(layer)
        history.append(layer.weight.detach().clone())
    assert ema.steps == 29
    torch.testing.assert_close(ema.averages["weight"], power_profile(history, gamma), rtol=1e-12, atol=1e-12)


def test_ema_of_long_runs_follows_the_power_of_the_step() -> None:
    gamma, steps = 7.0, 4000
    layer = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    ema = EMA(layer, gamma, torch.float64)
    for step in range(1, steps + 1):
        nn.init.constant_(layer.weight, step / steps)
        ema.update(layer)
    # ∫ s · s^γ ds / ∫ s^γ ds over [0, 1]
    assert float(ema.averages["weight"]) == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)


def test_a_float32_average_of_bfloat16_weights_moves_where_a_bfloat16_one_stalls() -> None:
    layer = linear(torch.bfloat16)
    fine, coarse, history = EMA(layer), EMA(layer, dtype=None), []
    for step in range(1, 1501):
        nn.init.constant_(layer.weight, 1.0 if step <= 1000 else 1.25)
        fine.update(layer)
        coarse.update(layer)
        history.append(layer.weight.detach().clone())
    assert fine.averages["weight"].dtype == torch.float32
    assert coarse.averages["weight"].dtype == torch.bfloat16
    expected = power_profile(history, 7.0)
    torch.testing.assert_close(fine.averages["weight"].double(), expected, rtol=0, atol=1e-4)
    assert float(expected.min()) > 1.2
    assert float(coarse.averages["weight"].max()) == 1.0
    fine.copy_to(layer)
    assert torch.equal(layer.weight, fine.averages["weight"].bfloat16())


def test_only_what_trains_is_averaged_and_written() -> None:
    norm = nn.BatchNorm1d(2)
    norm.bias.requires_grad_(False)
    ema = EMA(norm)
    assert list(ema.averages) == ["weight"]
    assert not ema.averages["weight"].requires_grad
    with torch.no_grad():
        norm.weight.fill_(3.0)
    norm.weight.requires_grad_(False)  # as when adapters are switched off for a moment
    ema.update(norm)
    norm(torch.randn(8, 2))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    other = copy.deepcopy(norm)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.fill_(9.0)
    ema.copy_to(other)
    assert other.weight.tolist() == [3.0, 3.0]
    assert other.bias.tolist() == [9.0, 9.0]
    assert torch.equal(other.running_mean, before["running_mean"])


def test_the_averages_are_their_own_memory() -> None:
    layer = linear(torch.float32)
    ema = EMA(layer, dtype=None)
    before = layer.weight.detach().clone()
    nn.init.zeros_(layer.weight)
    assert torch.equal(ema.averages["weight"], before)


def test_applied_restores_every_bit_also_after_an_error() -> None:
    layer = linear(torch.bfloat16)
    ema = EMA(layer)
    ema.update(layer)
    with torch.no_grad():
        layer.weight.normal_()
        layer.weight[0, 0] = torch.nan
    before = layer.weight.detach().view(torch.int16).clone()
    with ema.applied(layer):
        assert torch.equal(layer.weight, ema.averages["weight"].bfloat16())
    assert torch.equal(layer.weight.view(torch.int16), before)
    with pytest.raises(KeyError), ema.applied(layer):
        raise KeyError
    assert torch.equal(layer.weight.view(torch.int16), before)


def test_state_round_trips_and_what_does_not_fit_is_named() -> None:
    layer = linear()
    ema, resumed = EMA(layer), EMA(layer)
    for step in range(4):
        nn.init.constant_(layer.weight, float(step))
        ema.update(layer)
    resumed.load_state_dict(ema.state_dict())
    nn.init.constant_(layer.weight, 0.1)
    for one in (ema, resumed):
        one.update(layer)
    assert resumed.steps == 5
    assert all(torch.equal(resumed.averages[name], ema.averages[name]) for name in ("weight", "bias"))

    state = ema.state_dict()
    lost = {key: value for key, value in state.items() if key != "averages/bias"}
    with pytest.raises(CheckpointError, match=r"missing \(averages/bias\)"):
        resumed.load_state_dict(lost)
    with pytest.raises(CheckpointError, match=r"surplus \(averages/other\)"):
        resumed.load_state_dict({**state, "averages/other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"averages/bias has the shape \(1,\)"):
        resumed.load_state_dict({**state, "averages/bias": torch.zeros(1)})


def test_errors_name_the_argument() -> None:
    layer = linear()
    with pytest.raises(ValueError, match="gamma"):
        EMA(layer, -1.0)
    with pytest.raises(ValueError, match="dtype"):
        EMA(layer, dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing to average"):
        EMA(linear().requires_grad_(False))
    for call in (EMA(layer).update, EMA(layer).copy_to):
        with pytest.raises(ValueError, match="'weight'"):
            call(nn.Sequential(linear()))


SHARDED = """
import copy
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from pitools.training import EMA
from pitools.training.checkpoint import taken

torch.set_num_threads(1)
distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).bfloat16()
plain[0].bias.requires_grad_(False)
sharded = copy.deepcopy(plain)
fully_shard(sharded)
ema, reference = EMA(sharded), EMA(plain)
assert isinstance(ema.averages["0.weight"], DTensor)
for step in range(5):
    for module in (plain, sharded):
        with torch.no_grad():
            for index, parameter in enumerate(module.parameters()):
                parameter.mul_(1.1).add_(0.01 * index)
    ema.update(sharded)
    reference.update(plain)

def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)

assert equal(taken(ema.averages), reference.averages)
own = taken(dict(sharded.named_parameters()))
with ema.applied(sharded):
    reference.copy_to(plain)
    assert equal(taken(dict(sharded.named_parameters())), dict(plain.named_parameters()))
    assert not equal(taken(dict(sharded.named_parameters())), own)
assert equal(taken(dict(sharded.named_parameters())), own)
resumed = EMA(sharded, device="cpu")
resumed.load_state_dict(taken(ema.state_dict()))
assert isinstance(resumed.averages["0.weight"], DTensor)
assert equal(taken(resumed.state_dict()), taken(ema.state_dict()))
distributed.destroy_process_group()
print("as unsharded")
"""


def test_the_average_of_sharded_weights_is_that_of_whole_ones() -> None:
    run = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "as unsharded"


def trajectory(ema: EMA, layer: nn.Linear) -> None:
    for step in range(6):
        with torch.no_grad():
            layer.weight.mul_(0.9).add_(0.01 * step)
            layer.bias.add_(0.1)
        ema.update(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_averages_on_the_cpu_are_those_on_the_weights_own_device(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = linear(torch.bfloat16)
    other = copy.deepcopy(layer)
    own, placed = EMA(layer, dtype=dtype), EMA(other, dtype=dtype, device="cpu")
    trajectory(own, layer)
    trajectory(placed, other)
    for name, average in placed.averages.items():
        assert average.device.type == "cpu"
        assert torch.equal(average, own.averages[name])
    with placed.applied(other), own.applied(layer):
        assert torch.equal(other.weight, layer.weight)


def test_averages_live_where_they_are_told_to() -> None:
    layer = linear(torch.bfloat16)
    ema = EMA(layer, device="meta")  # the one other device that is everywhere; it has no values
    trajectory(ema, layer)
    assert layer.weight.device.type == "cpu"
    for name, average in ema.averages.items():
        assert (average.device.type, average.dtype) == ("meta", torch.float32)
        assert average.shape == getattr(layer, name).shape
    ema.load_state_dict(EMA(layer).state_dict())
    assert ema.averages["weight"].device.type == "meta"


def test_a_recipe_says_where_averages_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    class Seen(EMA):
        def __init__(self, module: nn.Module, gamma: float, dtype: torch.dtype | None, device: str | None) -> None:
            asked.append(device)
            super().__init__(module, gamma, dtype, device)

    monkeypatch.setattr(loop, "EMA", Seen)
    weights = [
        loop.train(
            FlowMatching(digits.backbone.teacher(keyed_generator(0, "a")), digits.data.null_conditions),
            digits.recipe.training,
            digits.data,
            Engine(digits.recipe.engine),
            seed=0,
            folder=tmp_path / place,
            name="a",
            console=Console(quiet=True),
        )
        for place in ("own", "cpu")
        for digits in [plan(tiny(**{"training.ema_device": place}), "recipe")]
    ]
    assert asked == [None, "cpu"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
