"""native.cpp: compiled on first use, kept in the user's cache, called through ctypes.

The compiler is $CXX, or c++, g++, clang++, whichever is there; without one `library()` gives the reason. What is
built is named after source, compiler and processor, so that a new version of either is compiled anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O2", "-std=c++17", "-fno-math-errno", "-shared", "-fPIC", "-pthread")
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""What else a compiler is asked for, until one does not fail."""

DAY = 86400.0

SIZES = ["factors", "components", "channels", "rows", "history", "times", "stops", "factors_per_time", "numbers"]
SIZES += ["own_variance", "threads", "most"]
STRIDES = ["means_n", "means_k", "means_c", "weights_n", "weights_k", "variance_n", "variance_k"]
POINTERS = ["means", "log_weights", "variance", "x_src", "x", "coefficients", "commits", "stop_rows", "out", "out_bar"]
POINTERS += ["means_bar", "log_weights_bar", "variance_bar", "x_src_bar", "x_bar"]
POINTERS += ["travels", "evaluations", "stage", "failed_at"]

FORWARD, BACKWARD, ADAPTIVE = 0, 1, 2


class Job(ctypes.Structure):
    """native.cpp's `Job`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES + STRIDES),
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("tol", ctypes.c_double),
    ]


@cache
def library() -> ctypes.CDLL | str:
    """The compiled kernels, or why there are none."""
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler was found (c++, g++, clang++ or $CXX)"
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
        told = repr((compiler, version, FLAGS, EXTRAS, platform.machine(), _processor()))
        key = hashlib.sha256(SOURCE.read_bytes() + told.encode()).hexdigest()[:16]
        built = cache_folder() / f"kernels-{key}.so"
        if not built.exists():
            _compile(compiler, built)
        try:
            loaded = ctypes.CDLL(str(built))
        except OSError:  # another system's, or none
            _compile(compiler, built)
            loaded = ctypes.CDLL(str(built))
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(compiler)} failed: {(error.stderr or '').strip()[-500:]}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        return f"the kernels could not be built: {error}"
    for name in ("gm_float", "gm_double"):
        getattr(loaded, name).argtypes = [ctypes.POINTER(Job), ctypes.c_int]
        getattr(loaded, name).restype = None
    return loaded


def cache_folder() -> Path:
    """Where built kernels are kept: $XDG_CACHE_HOME/pitools, or ~/.cache/pitools."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pitools"


def _compiler() -> list[str] | None:
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"]) or None
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return None if found is None else [found]


def _processor() -> str:
    """What -march=native means here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


def _compile(compiler: list[str], built: Path) -> None:
    built.parent.mkdir(parents=True, exist_ok=True)
    for left in built.parent.glob("building-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > DAY:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="building-") as folder:
        fresh = Path(folder) / built.name
        for extra in EXTRAS:
            command = [*compiler, *FLAGS, *extra, str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode == 0:
                break
        done.check_returncode()
        fresh.replace(built)  # at once, so that another process finds it whole or not at all


def call(job: Job, dtype: torch.dtype, kind: int) -> None:
    """Run a job whose tensors are of `dtype`: FORWARD, BACKWARD or ADAPTIVE."""
    loaded = library()
    assert not isinstance(loaded, str)
    function = loaded.gm_float if dtype == torch.float32 else loaded.gm_double
    function(ctypes.byref(job), kind)


def fill(job: Job, **values: float | Tensor | None) -> Job:
    """Set the fields of those names: sizes, and tensors by address. The caller keeps the tensors alive."""
    for name, value in values.items():
        setattr(job, name, value.data_ptr() if isinstance(value, Tensor) else value)
    return job
