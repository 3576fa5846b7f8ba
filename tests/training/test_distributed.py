"""Real processes, by torchrun and gloo on the CPU: they train as one process does, and stop and fail as one."""

import re
import signal
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest
import torch
from processes import TIMEOUT, Ended, assert_same_weights, command, ended, launch, log, several
from recipes import tiny, write
from safetensors.torch import load_file

from pitools.training.checkpoint import load
from pitools.training.config import RecipeError
from pitools.training.engine import Engine, EngineSection

for module in ("accelerate", "diffusers", "psutil"):
    pytest.importorskip(module)

STEPS, CUT = 20, 10
STUDENT = "gm-2nfe"
SHARDS = ("engine.parallel=fsdp2", "engine.checkpoints=sharded", "training.ema_device=cpu")
HAS_8BIT = find_spec("bitsandbytes") is not None

DIVERGING = """
import os
from pitools.cli import main
from toys.digits import DigitsData
whole, calls = DigitsData.batch, []
def batch(self, indices):
    calls.append(indices)
    latents, conditions = whole(self, indices)
    return latents * (float("nan") if os.environ["RANK"] == "1" and len(calls) == 3 else 1), conditions
DigitsData.batch = batch
main()
"""

FULL = """
import os
from pitools.cli import main
from pitools.training import checkpoint
save_file = checkpoint.save_file
def refuse(tensors, path):
    if os.environ["RANK"] == "1" and "00000020" in str(path):
        raise OSError(28, "No space left on device")
    save_file(tensors, path)
checkpoint.save_file = refuse
main()
"""


assert_same_course = partial(processes.assert_same_course, first=1, last=STEPS)
cut = partial(processes.cut, last=STEPS)


def teacher(folder: Path) -> Path:
    (found,) = (folder / "teachers").iterdir()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipes; in it, a folder for each way of running them.

    data: data-dependent, and with sheets, which call the network in the midst of training with other weights.
    free: data-free, two accumulation steps of two segments each.  eight: with layers whose halves are large enough
    for 8 bits, and others whose halves are not.
    """
    folder = tmp_path_factory.mktemp("processes")
    shared = {"teacher.training.steps": STEPS, "training.steps": STEPS}
    shared |= {"teacher.training.checkpoint_every": CUT, "training.checkpoint_every": CUT}
    write(folder / "data.toml", tiny(**{**shared, "training.sheet_every": 7}))
    write(folder / "free.toml", tiny(**{**shared, "training.accumulation": 2, "students.gm.objective.data_free": True}))
    eight = {"teacher.training.steps": 2, "backbone.head_width": 32, "training.optimiser.name": "adamw8bit"}
    write(folder / "eight.toml", tiny(**{**shared, **eight}))
    return folder


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """The runs on one process."""
    result = several(root, 1, ("data.toml", "run.out=one/data"), ("free.toml", "run.out=one/free"))
    assert result.codes() == [0, 0], result.err
    return root / "one"


@pytest.fixture(scope="module")
def two(root: Path, one: Path) -> Ended:
    """The runs on two processes, and one that goes on from one process's; the last two commands are refused.

    shards: checkpoints of each process's shards, whose averages are on the CPU.
    """
    cut(one, root / "one-two")
    runs = [
        (
            f"{name}.toml",
            f"run.out={parallel}/{name}",
            f"engine.parallel={parallel}",
            f"training.ema_device={'cpu' if parallel == 'ddp' else 'own'}",
        )
        for parallel in ("ddp", "fsdp2")
        for name in ("data", "free")
    ]
    runs.append(("data.toml", "run.out=one-two/data", "engine.parallel=fsdp2"))
    runs.append(("data.toml", "run.out=shards/data", *SHARDS))
    compiled = ("data.toml", "run.out=compiled/data", "engine.parallel=fsdp2", "engine.compile=true")
    result = several(root, 2, *runs, ("free.toml", "run.out=ddp/data"), compiled)
    assert result.codes()[:-2] == [0] * len(runs), result.err
    return result


@pytest.fixture(scope="module")
def resumed(root: Path, two: Ended) -> Ended:
    """The runs on one process that go on from two processes'."""
    runs = []
    for parallel in ("ddp", "fsdp2", "shards"):
        cut(root / parallel, root / f"{parallel}-one")
        runs.append(("data.toml", f"run.out={parallel}-one/data"))
    result = several(root, 1, *runs)
    assert result.codes() == [0] * len(runs), result.err
    return result


@pytest.fixture(scope="module")
def eight(root: Path) -> None:
    """The runs with 8-bit states: on one process, on two, and on one that goes on from two's."""
    result = several(root, 1, ("eight.toml", "run.out=eight-one/eight"))
    assert result.codes() == [0], result.err
    sharded = ("eight.toml", "run.out=eight-two/eight", "engine.parallel=fsdp2")
    result = several(root, 2, sharded, ("eight.toml", "run.out=eight-ddp/eight"))
    assert result.codes() == [0, 0], result.err
    for folder in ("eight-two", "eight-ddp"):
        cut(root / folder, root / f"{folder}-one")
    result = several(root, 1, *(("eight.toml", f"run.out={folder}-one/eight") for folder in ("eight-two", "eight-ddp")))
    assert result.codes() == [0, 0], result.err


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(root: Path, one: Path, two: Ended, parallel: str) -> None:
    assert_same_course(teacher(root / parallel), teacher(one))
    for name in ("data", "free"):
        run = Path(name, STUDENT)
        assert_same_course(root / parallel / run, one / run)
        assert_same_weights(root / parallel / run, one / run)
    assert len(list((root / parallel / "data" / STUDENT / "samples").iterdir())) == 3


def test_shards_hold_what_the_main_process_would_have_written(root: Path, two: Ended) -> None:
    for run in (Path(STUDENT), Path("..", teacher(root / "fsdp2").relative_to(root / "fsdp2"))):
        path = Path("data") / run / "checkpoints" / f"step-{STEPS:08d}"
        files = {file.name for file in (root / "shards" / path).iterdir()}
        kinds = ("model", "ema", "optimiser")
        assert files == {"manifest.json", *(f"{kind}-rank{rank}of2.safetensors" for kind in kinds for rank in (0, 1))}
        sharded, whole = load(root / "shards" / path).tensors, load(root / "fsdp2" / path).tensors
        assert sharded.keys() == whole.keys() == set(kinds)
        for kind in kinds:
            assert sharded[kind].keys() == whole[kind].keys()
            assert all(torch.equal(value, whole[kind][name]) for name, value in sharded[kind].items())


def test_two_processes_go_on_from_their_shards(root: Path, two: Ended) -> None:
    cut(root / "shards", root / "shards-two")
    result = several(root, 2, ("data.toml", "run.out=shards-two/data", *SHARDS))
    assert result.codes() == [0], result.err
    assert result.out.count("Going on from") == 2
    ends = [load_file(root / folder / "data" / STUDENT / "student.safetensors") for folder in ("shards", "shards-two")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2", "shards"])
def test_one_process_goes_on_from_two(root: Path, one: Path, resumed: Ended, parallel: str) -> None:
    folder = root / f"{parallel}-one"
    assert_same_course(teacher(folder), teacher(one), first=CUT + 1)
    assert_same_course(folder / "data" / STUDENT, one / "data" / STUDENT, first=CUT + 1)
    assert_same_weights(folder / "data" / STUDENT, one / "data" / STUDENT)


def test_two_processes_go_on_from_one(root: Path, one: Path, two: Ended) -> None:
    folder = root / "one-two"
    assert_same_course(teacher(folder), teacher(one), first=CUT + 1)
    assert_same_course(folder / "data" / STUDENT, one / "data" / STUDENT, first=CUT + 1)
    assert_same_weights(folder / "data" / STUDENT, one / "data" / STUDENT)


def test_an_error_of_the_main_process_is_every_ones(two: Ended) -> None:
    assert [two.codes(rank)[-2] for rank in (0, 1)] == [2, 2]
    assert two.err.count("ddp/data holds a run of another recipe") == 2


def test_a_compiled_network_is_not_sharded(root: Path, two: Ended) -> None:
    assert two.codes()[-1] == 2
    assert "Error: [engine] compile = true and parallel = " in two.err
    assert not (root / "compiled").exists()


def test_only_the_main_process_speaks(two: Ended) -> None:
    # A teacher and two students for each way of sharing; a teacher and a student that go on, and others in shards.
    assert two.out.count(f"step {STEPS}/{STEPS}") == 2 * 3 + 2 + 2
    assert two.out.count("Going on from") == 2


@pytest.mark.slow
@pytest.mark.skipif(not HAS_8BIT, reason="needs bitsandbytes")
def test_8bit_states_of_shards(root: Path, eight: None) -> None:
    # Fewer tensors are in 8 bits than on one process, and the others are cut into other blocks.
    run, reference = (root / folder / "eight" / STUDENT for folder in ("eight-two", "eight-one"))
    weights = load_file(run / "student.safetensors")
    states = load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "optimiser.safetensors")
    whole = load_file(reference / "checkpoints" / f"step-{STEPS:08d}" / "optimiser.safetensors")
    small = set()
    for name, value in weights.items():
        for rank, part in enumerate(value.chunk(2)):
            for key in ("state1", "state2"):
                state = states[f"{name}/{key}/rank{rank}of2"]
                assert state.shape == part.shape
                assert state.dtype == (torch.uint8 if part.numel() >= 4096 else torch.float32), name
        assert whole[f"{name}/state1"].dtype == (torch.uint8 if value.numel() >= 4096 else torch.float32), name
        small |= {name} if value.numel() >= 4096 > value.numel() / 2 else set()
    assert small


@pytest.mark.slow
@pytest.mark.skipif(not HAS_8BIT, reason="needs bitsandbytes")
@pytest.mark.parametrize("folder", ["eight-two", "eight-ddp"])
def test_8bit_states_go_on_on_one_process(root: Path, eight: None, folder: str) -> None:
    run, reference = root / f"{folder}-one" / "eight" / STUDENT, root / "eight-one" / "eight" / STUDENT
    assert_same_course(run, reference, first=CUT + 1)
    # Weights may part by more: where sums differ in their last bits, a moment may fall into the next of 256 steps.
    assert_same_course(root / folder / "eight" / STUDENT, reference)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_policy_with_every_setting(root: Path, processes: int) -> None:
    """Recomputed activations and a compiled network change nothing; bfloat16 changes little."""
    objective = {"step_size": 0.125}
    free = {**objective, "data_free": True}
    students = {
        "gm": {"components": 4, "nfe": [2], "objective": objective},
        "dx": {"policy": "dx", "grid_points": 4, "nfe": [1], "objective": objective},
        "polynomial": {"policy": "polynomial", "grid_points": 3, "nfe": [2], "objective": free},
        "shortcut": {"policy": "shortcut", "nfe": [2], "objective": objective},
    }
    write(root / "all.toml", tiny(**{"students": students, "training.steps": 3, "teacher.training.steps": 2}))
    settings = {
        "plain": (),
        "recomputed": ("engine.gradient_checkpointing=true",),
        "compiled": ("engine.compile=true",),
        "bf16": ("engine.precision=bf16",),
    }
    if processes > 1:
        shard = "engine.parallel=fsdp2"
        settings |= {f"sharded {key}": (*value, shard) for key, value in settings.items() if key != "compiled"}
    folder = f"all-{processes}"
    runs = [("all.toml", f"run.out={folder}/{name}/all", *options) for name, options in settings.items()]
    result = several(root, processes, *runs)
    assert result.codes() == [0] * len(runs), result.err
    for name in settings:
        for run in (root / folder / "plain" / "all").glob("*-*nfe"):
            lines, expected = log(root / folder / name / "all" / run.name), log(run)
            tolerance = {"rel": 1e-3, "abs": 1e-3} if "bf16" in name else {"rel": 1e-5, "abs": 1e-6}
            assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], **tolerance)


def test_what_an_engine_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="gradient_checkpointing is not supported by a Linear"):
        Engine(EngineSection(device="cpu", gradient_checkpointing=True)).check(torch.nn.Linear(1, 1))
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match='device is "cuda"'):
            Engine(EngineSection(device="cuda"))


def test_the_precision_is_of_an_engine_and_not_of_the_process() -> None:
    class Network(torch.nn.Linear):
        def forward(self, x: torch.Tensor, t: object, conditions: object) -> torch.Tensor:
            return super().forward(x)

    for precision, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
        engine = Engine(EngineSection(device="cpu", precision=precision))
        network = engine.prepare(Network(2, 2))
        assert engine.call(network, torch.ones(3, 2), torch.ones(3)).dtype is dtype
        assert network.weight.dtype is torch.float32


def test_a_batch_that_does_not_divide_is_told_once(root: Path) -> None:
    result = ended(launch(root, 2, "-m", "pitools", *command("data.toml", "training.batch=7", "run.out=odd/data")))
    assert result.err.count("Error: [training] batch 7 does not divide among 2 processes") == 1
    assert result.err.count("Error: ") == result.err.count("ChildFailedError: ") + 1
    assert_no_traceback(result)
    assert re.search(r"exitcode\s*: 2 ", result.err)
    assert result.code != 0
    assert not (root / "odd").exists()


def test_one_process_that_diverges_stops_all(root: Path) -> None:
    (root / "diverging.py").write_text(DIVERGING)
    result = ended(launch(root, 2, "diverging.py", *command("data.toml", "run.out=diverging/data")))
    assert result.err.count("Error: teacher, step 3, flow matching: loss nan") == 1
    assert_no_traceback(result)
    assert result.code != 0
    assert [line["step"] for line in log(teacher(root / "diverging"))] == [1, 2]


def test_a_full_disk_of_one_process_is_every_ones(root: Path) -> None:
    (root / "full.py").write_text(FULL)
    result = ended(launch(root, 2, "full.py", *command("data.toml", "run.out=full/data", *SHARDS)))
    assert result.err.count("Error: step 20 could not be saved") == 1
    assert re.search(r"No space left on device. The last good checkpoint is .*step-00000010", result.err)
    assert_no_traceback(result)
    assert result.code != 0
    assert [path.name for path in (teacher(root / "full") / "checkpoints").iterdir()] == ["step-00000010"]


def test_sigterm_saves_and_stops_all(root: Path) -> None:
    import psutil

    options = ("teacher.training.steps=100000", "run.out=stopped/data", "engine.parallel=fsdp2")
    process = launch(root, 2, "-m", "pitools", *command("data.toml", *options))
    try:
        deadline = time.monotonic() + TIMEOUT
        while not any(len(path.read_text().splitlines()) >= 3 for path in root.glob("stopped/teachers/*/log.jsonl")):
            assert process.poll() is None, ended(process).err
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
    except BaseException:
        process.kill()
        raise
    result = ended(process)
    assert len(workers) >= 2
    assert not any(worker.is_running() for worker in workers)
    step = log(teacher(root / "stopped"))[-1]["step"]
    assert result.out.count(f"teacher stopped at step {step} of 100000, and saved.") == 1
    assert (teacher(root / "stopped") / "checkpoints" / f"step-{step:08d}" / "manifest.json").exists()
    assert_no_traceback(result)


def assert_no_traceback(result: Ended) -> None:
    """None of ours: torchrun has its own when a process has failed."""
    assert not re.search(r'File ".*/(pitools|toys|scale)/', result.err), result.err
