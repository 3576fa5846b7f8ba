"""The optimiser of a recipe, its learning rate, and 8-bit steps on sharded weights."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from pitools.training import Optimiser, build_optimiser, clip_at, learning_rate_at
from pitools.training.checkpoint import optimiser_tensors, restore_optimiser


def test_the_learning_rate_warms_up_and_stays_or_falls_along_a_cosine() -> None:
    constant = Optimiser(learning_rate=2.0, warmup_steps=4)
    assert [learning_rate_at(constant, step, 100) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = Optimiser(learning_rate=2.0, warmup_steps=4, decay="cosine")
    rates = [learning_rate_at(cosine, step, 12) for step in range(13)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[6] == pytest.approx(1 + math.sqrt(0.5))
    assert rates[8] == pytest.approx(1)
    assert rates[12] == pytest.approx(0, abs=1e-12)
    assert learning_rate_at(cosine, 20, 12) == pytest.approx(0, abs=1e-12)
    cold = Optimiser(learning_rate=2.0, warmup_steps=0, decay="cosine")
    assert learning_rate_at(cold, 0, 10) == 2.0
    assert learning_rate_at(cosine, 4, 4) == 2.0  # a run that ends with its warm-up


def test_gradients_are_clipped_from_the_end_of_the_warm_up_on() -> None:
    section = Optimiser(clip=50.0, warmup_steps=3)
    assert [clip_at(section, step) for step in range(5)] == [math.inf, math.inf, math.inf, 50.0, 50.0]
    assert clip_at(Optimiser(clip=0.0, warmup_steps=3), 9) == math.inf
    # An infinite limit is one that torch's clipping takes.
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert float(nn.utils.clip_grad_norm_([weight], math.inf)) == 5.0
    assert weight.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("name", "sgd"),
        ("decay", "linear"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("eps", 0.0),
        ("weight_decay", -0.1),
        ("clip", -1.0),
        ("clip", math.inf),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("warmup_steps", -1),
        ("warmup_steps", 0.5),
    ],
)
def test_a_section_says_what_it_does_not_take(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        Optimiser(**{name: value})  # type: ignore[arg-type]


def test_the_settings_reach_the_optimiser() -> None:
    section = Optimiser(learning_rate=0.1, betas=(0.5, 0.25), weight_decay=0.01, eps=1e-3)
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    optimiser = build_optimiser(section, layer.parameters(), sharded=False)
    assert type(optimiser) is torch.optim.AdamW
    (group,) = optimiser.param_groups
    assert group["params"] == [layer.weight]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.5, 0.25), 0.01, 1e-3)
    with pytest.raises(ValueError, match="parameters"):
        build_optimiser(section, [layer.bias], sharded=False)


def test_8bit_is_bitsandbytes() -> None:
    optim = pytest.importorskip("bitsandbytes.optim")
    section = Optimiser("adamw8bit", learning_rate=0.1, betas=(0.5, 0.25), weight_decay=0.01, eps=1e-3)
    optimiser = build_optimiser(section, nn.Linear(2, 2).parameters(), sharded=False)
    assert isinstance(optimiser, optim.AdamW8bit)
    (group,) = optimiser.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.1, (0.5, 0.25), 0.01, 1e-3)


@pytest.mark.parametrize("sharded", [True, False])
def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, sharded: bool) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install pitools\[scale\]"):
        build_optimiser(Optimiser("adamw8bit"), nn.Linear(2, 2).parameters(), sharded)


def test_a_shard_that_is_not_contiguous_steps_and_a_lost_state_starts_anew() -> None:
    pytest.importorskip("bitsandbytes.optim")
    section = Optimiser("adamw8bit", learning_rate=1e-2)
    whole = nn.Parameter(torch.randn(64, 80))
    turned = nn.Parameter(whole.detach().clone().T.contiguous().T)
    assert not turned.is_contiguous()
    plain, shards = build_optimiser(section, [whole], False), build_optimiser(section, [turned], True)
    for optimiser in (plain, shards, shards):
        optimiser.state.clear()  # the last: as restoring does where nothing was saved
        (parameter,) = optimiser.param_groups[0]["params"]
        parameter.grad = torch.linspace(-1, 1, 64 * 80).reshape(64, 80)
        before = parameter.detach().clone()
        optimiser.step()
        if optimiser is shards:
            assert optimiser.state[turned]["step"] == 1
        if parameter is whole:
            moved = whole.detach() - before
        else:
            torch.testing.assert_close(turned.detach() - before, moved, rtol=0, atol=1e-6)


def test_accelerates_wrapper_hides_no_shards() -> None:
    pytest.importorskip("bitsandbytes.optim")
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    try:
        layer = nn.Linear(2, 2)
        wrapped = accelerator.prepare_optimizer(build_optimiser(Optimiser("adamw8bit"), layer.parameters(), True))
        layer(torch.ones(1, 2)).sum().backward()
        wrapped.step()
        tensors = optimiser_tensors(wrapped, layer.named_parameters())
        assert "weight/state1/rank0of1" in tensors
        wrapped.state.clear()
        restore_optimiser(wrapped, layer.named_parameters(), tensors)
        assert torch.equal(wrapped.state[layer.weight]["state1"], tensors["weight/state1/rank0of1"])
    finally:
        accelerate.state.AcceleratorState._reset_state(True)


WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from pitools.training import Optimiser, build_optimiser
from pitools.training.checkpoint import load, optimiser_tensors, restore_optimiser, save, taken

rank, world, folder, names = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)

class Group:
    main = rank == 0
    def on_each(self, action):
        everyone = [None] * world
        distributed.all_gather_object(everyone, action())
        return everyone

def network():
    torch.manual_seed(0)
    # 8,192 elements; 5,120, fewer than 4,096 on each of two; small ones; and one row, so none on the second of two.
    return nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 40), nn.Linear(40, 1))

def make(module, name, sharded):
    return build_optimiser(Optimiser(name, learning_rate=1e-2, weight_decay=0.1), module.parameters(), sharded)

def train(module, optimiser, steps):
    for step in steps:
        for group in optimiser.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        module(x).square().mean().backward()  # the same data everywhere: the mean of gradients is each one
        optimiser.step()
        optimiser.zero_grad()

def sharded(module):
    fully_shard(module)
    return module

def whole(value):
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach()

def weights(module):
    return {key: whole(value).clone() for key, value in module.named_parameters()}

def same(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())

def states(optimiser, module):
    return {
        f"{key}/{part}": whole(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
        for key, parameter in module.named_parameters()
        for part, value in optimiser.state.get(parameter, {}).items()
    }

def put(name, form, optimiser, module):
    tensors = {
        "optimiser": optimiser_tensors(optimiser, module.named_parameters(), form),
        "model": taken(dict(module.named_parameters()), form),
    }
    if form == "consolidated" and rank:
        assert not any(tensors.values())  # the main process has it all
    save(folder / name, 5, tensors, {}, form=form, processes=Group())
    distributed.barrier()
    return load(folder / name / "step-00000005")

def resume(saved, name, shard):
    module = network()
    module.load_state_dict(saved.tensors["model"])
    optimiser = make(sharded(module) if shard else module, name, shard)
    restore_optimiser(optimiser, module.named_parameters(), saved.tensors["optimiser"])
    return module, optimiser

def moments(optimiser, module):
    '''Each moment whole and in float32.'''
    from bitsandbytes.functional import dequantize_blockwise
    found = {}
    for key, parameter in module.named_parameters():
        for n in (1, 2):
            state = optimiser.state.get(parameter, {})
            own = state.get(f"state{n}", torch.zeros(0, *parameter.shape[1:]))
            if f"qmap{n}" in state:
                own = dequantize_blockwise(own, absmax=state[f"absmax{n}"], code=state[f"qmap{n}"], blocksize=256)
            parts = [None] * world
            distributed.all_gather_object(parts, own)
            found[f"{key}/{n}"] = torch.cat(parts) if isinstance(parameter, DTensor) else own
    return found

def apart(one, other):
    assert one.keys() == other.keys()
    return max(float((value - other[key]).abs().max()) for key, value in one.items())

def check(name):
    plain, module = network(), sharded(network())
    reference, optimiser = make(plain, name, False), make(module, name, True)
    if name == "adamw8bit":
        reference.args.min_8bit_size = 4096 * world  # what the threshold on the shards amounts to
    train(plain, reference, range(5))
    train(module, optimiser, range(5))
    at_5 = weights(module)
    assert same(at_5, weights(plain))
    assert not torch.equal(at_5["0.weight"], network()[0].weight)

    if name == "adamw8bit":
        for key, parameter in module.named_parameters():
            count, own = parameter.to_local().numel(), optimiser.state.get(parameter, {})
            if count == 0:
                assert not own, key
            else:
                expected = torch.uint8 if count >= 4096 else torch.float32
                assert own["state1"].dtype == own["state2"].dtype == expected, key

    moments_at_5 = moments(optimiser, module) if name == "adamw8bit" else {}
    saved = {form: put(f"{name}-{world}-{form}", form, optimiser, module) for form in ("consolidated", "sharded")}
    files = {path.name for path in saved["sharded"].path.iterdir()}
    kinds = ("model", "optimiser")
    assert files == {"manifest.json", *(f"{kind}-rank{r}of{world}.safetensors" for kind in kinds for r in range(world))}
    for kind in kinds:
        assert same(saved["sharded"].tensors[kind], saved["consolidated"].tensors[kind])
    state = saved["sharded"].tensors["optimiser"]
    if name == "adamw8bit":
        for r in range(world):
            assert state[f"0.weight/state1/rank{r}of{world}"].dtype == torch.uint8
            assert state[f"0.weight/state1/rank{r}of{world}"].shape == (128 // world, 64)
        assert state[f"1.weight/state1/rank0of{world}"].dtype == (torch.uint8 if world == 1 else torch.float32)
        assert (f"2.weight/none/rank{world - 1}of{world}" in state) == (world == 2)

    resumed = {form: resume(each, name, True) for form, each in saved.items()}
    for one, its in resumed.values():
        assert same(weights(one), at_5)
        assert same(states(its, one), states(optimiser, module))
        if name == "adamw":
            assert isinstance(its.state[one[0].weight]["exp_avg"], DTensor)
    for one, its in ((module, optimiser), *resumed.values()):
        train(one, its, range(5, 8))
    ends = weights(module)
    assert not torch.equal(ends["0.weight"], at_5["0.weight"])
    for one, _ in resumed.values():
        assert same(weights(one), ends)

    # Cut in other ways: from whole weights, and from the other number of processes, which went before.
    if rank == 0:
        save_file(moments_at_5, folder / f"moments-{world}")
        save_file(ends, folder / f"ends-{world}")
    unsharded = put(f"{name}-{world}-plain", "consolidated", reference, plain)
    others = [(unsharded, world, True), (saved["sharded"], world, False)]
    if world == 1:
        two = [load(folder / f"{name}-2-{form}" / "step-00000005") for form in saved]
        others += [(each, 2, shard) for each in two for shard in (True, False)]
    for other, cut, shard in others:
        one, its = resume(other, name, shard)
        if name == "adamw":
            assert same(states(its, one), states(reference, plain))
            continue
        assert {state["step"] for state in its.state.values()} == {5}
        found = moments(its, one)
        for key, value in load_file(folder / f"moments-{cut}").items():
            # 8 bits tell numbers near a block's largest 0.014 of it apart, in blocks that may have changed.
            assert (found[key] - value).abs().max() <= 0.01 * value.abs().max(), (key, cut, shard)
        for parameter, state in its.state.items():
            count = (parameter.to_local() if shard else parameter).numel()
            assert state["state1"].dtype == (torch.uint8 if count >= 4096 else torch.float32)
        train(one, its, range(5, 8))
        assert apart(weights(one), load_file(folder / f"ends-{cut}")) < 5e-4
    if name == "adamw8bit":  # and this is how far a lost state leads
        anew = network()
        anew.load_state_dict(at_5)
        train(anew, make(anew, name, False), range(5, 8))
        assert apart(weights(anew), ends) > 5e-3

for name in names:
    check(name)
distributed.destroy_process_group()
"""


def test_steps_on_shards_are_those_on_whole_weights(tmp_path: Path) -> None:
    """FSDP2 on the CPU, by one process and by two, and resumed from a checkpoint: all bit for bit.

    Checkpoints go on in the same cut bit for bit, and in others, too: 8-bit states then within their rounding.
    With 8 bits on two processes because 4,096 elements are a whole number of blocks, and the whole weights' states
    are 8-bit where the shards' are. With the usual threshold for the whole ones, weights that had moved by 0.023 in
    five steps differed by 0.005; so far apart are 8-bit and float32 states.
    """
    names = ["adamw", *(["adamw8bit"] if find_spec("bitsandbytes") else [])]
    for world in (2, 1):
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), str(world), str(tmp_path), *names],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            outputs = [worker.communicate(timeout=120)[0] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
        for worker, output in zip(workers, outputs, strict=True):
            assert worker.returncode == 0, output
