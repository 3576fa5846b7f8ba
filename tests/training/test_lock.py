"""One writer for a folder at a time, whatever becomes of it."""

import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pitools.training.errors import Stopped
from pitools.training.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from pitools.training.lock import locked
with locked(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(60)
"""


class BusyError(Exception):
    pass


def busy() -> None:
    raise BusyError


def test_a_second_process_is_told_and_a_kill_frees_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError), locked(folder, busy):
            pass
        with locked(tmp_path / "runs" / "two", busy):
            pass
        start = time.monotonic()
        with locked(folder, holder.kill):  # waits for the end of the one that it kills
            assert time.monotonic() - start < 30
        assert list(folder.iterdir()) == []
    finally:
        holder.kill()
        holder.wait()
    with locked(folder, busy):
        pass


def test_a_stop_reaches_other_processes_as_it_is() -> None:
    told = pickle.loads(pickle.dumps(Stopped("stopped at step 3", 15)))
    assert (str(told), told.signal) == ("stopped at step 3", 15)
