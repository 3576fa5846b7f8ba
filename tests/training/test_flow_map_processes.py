"""A flow map on two real processes: both of its networks train as on one, by DDP and FSDP2, and go on on one."""

from functools import partial
from pathlib import Path

import processes
import pytest
from processes import Ended, assert_same_course, assert_same_weights, several
from recipes import flow_map, write

for module in ("accelerate", "diffusers", "psutil"):
    pytest.importorskip(module)

pytestmark = pytest.mark.slow

STEPS, CUT = 20, 10
RUN = Path("map", "freeflow-1nfe")
PARALLEL = {"ddp": (), "fsdp2": ("engine.parallel=fsdp2",)}
PARALLEL["shards"] = (*PARALLEL["fsdp2"], "engine.checkpoints=sharded", "training.ema_device=cpu")
ROUNDING = "to_k.bias"
"""Attention does not depend on it: its gradient is rounding, which Adam makes as large as any other where it is above
eps, as with FreeFlow's weights w."""

same_course = partial(assert_same_course, last=STEPS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe: the auxiliary network is updated twice in a step, and of each forward pass of a process
    one sample corrects."""
    folder = tmp_path_factory.mktemp("maps")
    shared = {"teacher.training.steps": STEPS, "training.steps": STEPS}
    shared |= {"teacher.training.checkpoint_every": CUT, "training.checkpoint_every": CUT}
    write(folder / "map.toml", flow_map(**{**shared, "training.accumulation": 2, "training.batch": 16}))
    return folder


@pytest.fixture(scope="module")
def one(root: Path) -> Path:
    """The run on one process."""
    result = several(root, 1, ("map.toml", "run.out=one/map"))
    assert result.codes() == [0], result.err
    return root / "one"


@pytest.fixture(scope="module")
def two(root: Path) -> Ended:
    """The runs on two."""
    result = several(root, 2, *(("map.toml", f"run.out={name}/map", *how) for name, how in PARALLEL.items()))
    assert result.codes() == [0] * len(PARALLEL), result.err
    return result


@pytest.fixture(scope="module")
def resumed(root: Path, two: Ended) -> Ended:
    """The runs on one process that go on from two processes'."""
    for name in PARALLEL:
        processes.cut(root / name, root / f"{name}-one", last=STEPS)
    result = several(root, 1, *(("map.toml", f"run.out={name}-one/map") for name in PARALLEL))
    assert result.codes() == [0] * len(PARALLEL), result.err
    return result


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_processes_train_as_one(root: Path, one: Path, two: Ended, parallel: str) -> None:
    same_course(root / parallel / RUN, one / RUN, first=1)
    assert_same_weights(root / parallel / RUN, one / RUN, but=ROUNDING)
    losses = [[line["auxiliary_loss"] for line in processes.log(each / RUN)] for each in (root / parallel, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_one_process_goes_on_from_two(root: Path, one: Path, resumed: Ended, parallel: str) -> None:
    assert "Going on from" in resumed.out
    same_course(root / f"{parallel}-one" / RUN, one / RUN, first=CUT + 1)
    assert_same_weights(root / f"{parallel}-one" / RUN, one / RUN, but=ROUNDING)
