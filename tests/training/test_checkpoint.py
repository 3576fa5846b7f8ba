"""Checkpoints: whole or refused by name, whatever happens while they are written."""

import copy
import errno
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pitools.training import CheckpointError
from pitools.training.checkpoint import (
    Checkpoint,
    latest,
    load,
    newest,
    optimiser_tensors,
    read_tensors,
    restore_optimiser,
    save,
    taken,
    write_json,
    write_tensors,
)

META = {"seed": 3, "share": 0.1, "betas": [0.9, 0.95], "note": "π", "by step": {"10": None, "9": True}}
CALLS = ("fsync", "replace", "mkdir", "rmdir", "unlink")


def contents(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(30, 40, generator=generator), "scale": torch.tensor(float(step))},
        "optimiser": {"weight/step": torch.tensor(step)},
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaNs too."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    assert checkpoint.step == step
    assert checkpoint.meta == META
    expected = contents(step)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, group in expected.items():
        assert checkpoint.tensors[name].keys() == group.keys()
        assert all(same(checkpoint.tensors[name][key], value) for key, value in group.items())


def never(error: CheckpointError) -> None:
    raise AssertionError(f"refused: {error}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "bfloat16": base.bfloat16(),
        "float16": base.half(),
        "float64": base.double() / 3,
        "uint8": torch.arange(256, dtype=torch.uint8),
        "int64": torch.tensor([2**62 + 1, -1]),
        "bool": base > 0,
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "number": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "transposed": base.T,
        "column": base[:, 1],
        "tied": base,
        "also tied": base,
        "row of it": base[2],
    }
    path = save(tmp_path / "checkpoints", 12, {"all": tensors, "nothing": {}}, META)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    loaded = load(path)
    assert (loaded.step, loaded.meta, loaded.path) == (12, META, path)
    assert loaded.tensors["nothing"] == {}
    assert loaded.tensors["all"].keys() == tensors.keys()
    for name, value in tensors.items():
        assert same(loaded.tensors["all"][name], value.contiguous()), name


def test_the_last_ones_are_kept_and_later_ones_left_alone(tmp_path: Path) -> None:
    for step in (100, 200, 300, 1000):
        save(tmp_path, step, contents(step), META, keep=3)
    assert names(tmp_path) == ["step-00000200", "step-00000300", "step-00001000"]
    save(tmp_path, 250, contents(250), META, keep=1)  # someone went back by hand
    assert names(tmp_path) == ["step-00000250", "step-00000300", "step-00001000"]
    assert_is(latest(tmp_path, never), 1000)


def test_a_step_that_is_there_already_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5, {"model": {"w": torch.zeros(3)}}, {}, keep=1)
    save(tmp_path, 5, contents(5), META, keep=1)
    assert_is(latest(tmp_path, never), 5)
    assert names(tmp_path) == ["step-00000005"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "not there", never) is None
    (tmp_path / "notes.txt").write_text("mine")
    assert latest(tmp_path, never) is None


def truncate(path: Path) -> None:
    os.truncate(path / "model.safetensors", 100)


def lengthen(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"\0")


def flip(path: Path) -> None:
    data = bytearray((path / "optimiser.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "optimiser.safetensors").write_bytes(data)


def remove(path: Path) -> None:
    (path / "model.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def garble(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"\xff{not json")


def empty(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def edit(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"seed": 3', '"seed": 4'))


def from_the_future(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors is truncated: 100 bytes instead of \d+"),
        (lengthen, r"model\.safetensors is altered"),
        (flip, r"optimiser\.safetensors is altered"),
        (remove, r"model\.safetensors is missing"),
        (remove_manifest, r"manifest\.json is missing"),
        (garble, r"manifest\.json is malformed"),
        (empty, r"manifest\.json is malformed"),
        (edit, r"manifest\.json is altered"),
        (from_the_future, r"manifest\.json has format 2"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step, contents(step), META)
    damage(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError, match=rf"step-00000002/{message}"):
        load(tmp_path / "step-00000002")
    refused: list[str] = []
    assert_is(latest(tmp_path, lambda error: refused.append(str(error))), 1)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    assert len(refused) == 1
    assert re.search(message, refused[0])

    damage(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .*step-00000002.*step-00000001"):
        latest(tmp_path, lambda error: None)
    assert newest(tmp_path) is None


class Dies:
    """Wraps a function of `os`; this process kills itself at the chosen call, before it or after it."""

    calls = 0

    def __init__(self, function: Callable[..., Any], at: int, before: bool) -> None:
        self.function, self.at, self.before = function, at, before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now, Dies.calls = Dies.calls, Dies.calls + 1
        if now == self.at and self.before:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return self.function(*args, **kwargs)
        finally:
            if now == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def killed_at(call: int, before: bool, action: Callable[[], Any]) -> bool:
    """Runs `action` in a child that dies at that call of CALLS; False where it came to its end instead."""
    child = os.fork()
    if child == 0:
        try:
            for name in CALLS:
                setattr(os, name, Dies(getattr(os, name), call, before))
            action()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("step", [2, 3], ids=["step again", "new step"])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path, keep: int, step: int, before: bool) -> None:
    """At each call in turn that syncs, renames, makes or deletes something."""
    start = tmp_path / "start"
    for earlier in (1, 2):
        save(start, earlier, contents(earlier), META, keep)
    call, found = 0, set()
    while True:
        folder = tmp_path / str(call)
        shutil.copytree(start, folder)
        killed = killed_at(call, before, lambda folder=folder: save(folder, step, contents(step), META, keep))
        checkpoint = latest(folder, never)  # nothing is even refused
        assert checkpoint is not None
        assert_is(checkpoint, checkpoint.step)
        found.add(checkpoint.step)
        for path in folder.glob("step-*"):
            assert_is(load(path), int(path.name.removeprefix("step-")))  # nor is one that is half deleted
        # Life goes on: the run saves the step again, and the next one, and nothing of the accident is left.
        save(folder, step, contents(step), META, keep)
        save(folder, step + 1, contents(step + 1), META, keep)
        assert_is(latest(folder, never), step + 1)
        assert len(names(folder)) == keep
        assert not [name for name in names(folder) if name.startswith(".")]
        if not killed:
            break
        shutil.rmtree(folder)
        call += 1
    assert call >= 8
    assert found == {2, step}


def test_everything_is_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest last of the files, then the folder's list of them, the rename, and the list of checkpoints."""
    synced: list[int] = []
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        by_inode = {path.stat().st_ino: path.name for path in (source, *source.iterdir())}
        order.extend(by_inode[inode] for inode in synced)
        synced.clear()
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    save(tmp_path, 1, contents(1), META)
    assert order == ["model.safetensors", "optimiser.safetensors", "manifest.json", ".tmp-step-00000001"]
    assert synced == [tmp_path.stat().st_ino]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a real write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_keeps_what_is_there(tmp_path: Path, step: int) -> None:
    for earlier in (1, 2):
        save(tmp_path, earlier, contents(earlier), META)
    with (
        largest_file(2000),
        pytest.raises(CheckpointError, match=rf"step {step} could not .*large.*last good .*step-00000002"),
    ):
        save(tmp_path, step, contents(step), META)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert_is(latest(tmp_path, never), 2)
    assert_is(load(tmp_path / "step-00000001"), 1)


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path) -> None:
    with largest_file(2000), pytest.raises(CheckpointError, match=r"step 1 .* there is no good one"):
        save(tmp_path / "checkpoints", 1, contents(1), META)
    assert names(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("call", range(6))
def test_every_refusal_of_the_disk_is_reported_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """The syncs of two files, the manifest and its folder, then two renames, as a step is replaced."""
    for earlier in (1, 2):
        save(tmp_path, earlier, contents(earlier), META)
    done = 0

    def full(function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            nonlocal done
            done += 1
            if done == call + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args)

        return refuse

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, full(getattr(os, name)))
        with pytest.raises(CheckpointError, match=r"step 2 .*No space left.*step-00000002"):
            save(tmp_path, 2, {"model": {}, "optimiser": {}}, META)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert_is(latest(tmp_path, never), 2)


def test_what_cannot_be_saved_is_said_before_the_disk_is_touched(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(ValueError, match="step"):
        save(folder, -1, {}, {})
    with pytest.raises(ValueError, match="keep"):
        save(folder, 1, {}, {}, keep=0)
    with pytest.raises(ValueError, match=r"\.\./model"):
        save(folder, 1, {"../model": {}}, {})
    with pytest.raises(TypeError):
        save(folder, 1, {}, {"path": tmp_path})  # type: ignore[dict-item]
    assert not folder.exists()
    with pytest.raises(KeyError):
        save(folder, 1, {"model": {"w": torch.zeros(1, dtype=torch.complex128)}}, {})
    assert names(folder) == []


def test_single_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    from safetensors import safe_open

    write_json(tmp_path / "run" / "metrics.json", {"loss": [0.5, float("inf")]})
    weights = {"w": torch.randn(1000), "tied": torch.zeros(2)}
    weights["again"] = weights["tied"]
    write_tensors(tmp_path / "run" / "model.safetensors", weights, {"policy_config": "{}"})
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert file.metadata()["policy_config"] == "{}"
        assert all(same(file.get_tensor(name), value) for name, value in weights.items())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with largest_file(1000):
        with pytest.raises(CheckpointError, match=r"model\.safetensors could not be written"):
            write_tensors(tmp_path / "run" / "model.safetensors", {"w": torch.zeros(1000)})
        with pytest.raises(CheckpointError, match=r"metrics\.json could not be written"):
            write_json(tmp_path / "run" / "metrics.json", list(range(1000)))
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert json.loads(before["metrics.json"])["loss"] == [0.5, float("inf")]


def test_what_is_taken_is_a_copy() -> None:
    weight = torch.zeros(2)
    snapshot = taken({"w": weight})
    weight.fill_(1.0)
    assert snapshot["w"].tolist() == [0.0, 0.0]


# Resuming an optimiser.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.SiLU(), nn.Linear(80, 3))  # 5,120 elements, and small ones


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)


def adamw8bit(module: nn.Module) -> torch.optim.Optimizer:
    optim = pytest.importorskip("bitsandbytes.optim")
    return optim.AdamW8bit(module.parameters(), lr=1e-2, weight_decay=0.1)


def train(module: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        (module(x) - x[:, :3]).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("make", [adamw, adamw8bit])
def test_a_resumed_optimiser_goes_on_bit_for_bit(tmp_path: Path, make: Callable[..., torch.optim.Optimizer]) -> None:
    module = network()
    optimiser = make(module)
    train(module, optimiser, range(5))
    state = optimiser_tensors(optimiser, module.named_parameters())
    save(tmp_path, 5, {"model": module.state_dict(), "optimiser": state}, {})
    train(module, optimiser, range(5, 10))

    checkpoint = latest(tmp_path, never)
    assert checkpoint is not None
    resumed = network()
    resumed.load_state_dict(checkpoint.tensors["model"])
    again = make(resumed)
    train_from = {name: value.clone() for name, value in resumed.state_dict().items()}
    restore_optimiser(again, resumed.named_parameters(), checkpoint.tensors["optimiser"])
    kept = optimiser_tensors(again, resumed.named_parameters())
    assert kept.keys() == state.keys()
    assert all(same(kept[name], value) for name, value in state.items())
    for parameter, other in zip(module.parameters(), resumed.parameters(), strict=True):
        for key, value in optimiser.state[parameter].items():
            assert type(again.state[other][key]) is type(value)
    train(resumed, again, range(5, 10))
    assert not same(resumed.state_dict()["0.weight"], train_from["0.weight"])
    for name, value in module.state_dict().items():
        assert same(resumed.state_dict()[name], value), name


def test_8bit_states_are_of_the_kinds_that_bitsandbytes_keeps() -> None:
    module = network()
    optimiser = adamw8bit(module)
    train(module, optimiser, range(2))
    state = optimiser_tensors(optimiser, module.named_parameters())
    assert state["0.weight/state1"].dtype == state["0.weight/state2"].dtype == torch.uint8
    assert state["2.weight/state1"].dtype == state["2.weight/state2"].dtype == torch.float32
    assert same(state["0.weight/step"], torch.tensor(2))
    assert state["0.weight/qmap1"].shape == (256,)
    assert state["0.weight/absmax1"].shape == (20,)


def test_a_state_is_a_snapshot_and_frozen_parameters_are_passed_over() -> None:
    module = network()
    optimiser = torch.optim.AdamW(module[0].parameters())
    state = optimiser_tensors(optimiser, module.named_parameters())
    assert state.keys() == {"0.weight/none", "0.bias/none"}  # nothing yet, and it says so
    train(module, optimiser, range(1))
    restore_optimiser(optimiser, module.named_parameters(), state)
    assert not optimiser.state
    train(module, optimiser, range(1))
    state = optimiser_tensors(optimiser, module.named_parameters())
    before = {name: value.clone() for name, value in state.items()}
    train(module, optimiser, range(1, 2))
    assert all(same(state[name], value) for name, value in before.items())
    restore_optimiser(optimiser, module.named_parameters(), state)
    train(module, optimiser, range(1, 2))
    assert all(same(state[name], value) for name, value in before.items())


def test_a_state_that_does_not_fit_is_refused_by_its_keys_and_changes_nothing() -> None:
    module = network()
    optimiser = adamw(module)
    train(module, optimiser, range(2))
    state = optimiser_tensors(optimiser, module.named_parameters())
    eight = {key.replace("exp_avg_sq", "state2").replace("exp_avg", "state1"): value for key, value in state.items()}
    before = copy.deepcopy(optimiser.state_dict())
    lost_parameter = {key: value for key, value in state.items() if not key.startswith("2.bias")}
    lost_key = {key: value for key, value in state.items() if key != "2.bias/exp_avg"}
    for tensors, message in (
        (lost_parameter, r"1 missing \(2\.bias\)"),
        (lost_key, r"of 2\.bias .*1 missing \(exp_avg\)"),
        ({**state, "4.bias/step": torch.tensor(1.0)}, r"1 surplus \(4\.bias\)"),
        ({**state, "2.bias/state1": torch.zeros(3)}, r"of 2\.bias .*1 surplus \(state1\)"),
        ({**state, "2.bias/exp_avg": torch.zeros(4)}, r"2\.bias/exp_avg has the shape \(4,\)"),
        ({f"{key}/rank0of2": value for key, value in eight.items()}, r"missing \(exp_avg.* surplus \(state1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            restore_optimiser(optimiser, module.named_parameters(), tensors)
    for index, values in before["state"].items():
        assert all(same(optimiser.state_dict()["state"][index][key], value) for key, value in values.items())
    with pytest.raises(ValueError, match="named_parameters"):
        optimiser_tensors(optimiser, module[0].named_parameters())


def test_the_state_of_one_kind_of_optimiser_is_no_state_of_the_other() -> None:
    module = network()
    eight, plain = adamw8bit(module), adamw(module)
    train(module, eight, range(1))
    train(module, plain, range(1))
    for one, other in ((eight, plain), (plain, eight)):
        with pytest.raises(CheckpointError, match=r"missing .*surplus"):
            restore_optimiser(other, module.named_parameters(), optimiser_tensors(one, module.named_parameters()))


def test_weights_are_verified_when_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = {
        "a": torch.randn(4, 3, dtype=torch.bfloat16),
        "b": torch.tensor(7),
        "c": torch.empty(0),
        "d": torch.randn(2, 6).T,
    }
    write_tensors(path, tensors, {"policy": "gm"})
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    good = path.read_bytes()
    for damaged in (good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
            read_tensors(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        read_tensors(path)
