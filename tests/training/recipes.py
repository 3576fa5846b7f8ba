"""A recipe that trains in seconds on a CPU: for tests of whole runs, on one process or several."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pitools.training.config import to_toml

TINY: dict[str, Any] = {
    "data": {"name": "digits", "samples": 20},
    "backbone": {
        "name": "dit",
        "channels": 1,
        "size": 8,
        "patch": 2,
        "layers": 2,
        "heads": 2,
        "head_width": 16,
        "classes": 10,
        "head": {"factor": "patch", "log_std_width": 16},
    },
    "teacher": {
        "reference_steps": 4,
        "guidance": {"scale": 2.0},
        "training": {"steps": 6, "batch": 8, "log_every": 1, "optimiser": {"learning_rate": 1e-3, "warmup_steps": 2}},
    },
    "students": {"gm": {"components": 4, "nfe": [2], "objective": {"step_size": 0.125}}},
    "training": {
        "steps": 6,
        "batch": 8,
        "log_every": 1,
        "sheet_images": 2,
        "optimiser": {"learning_rate": 1e-3, "warmup_steps": 2},
    },
    "engine": {"device": "cpu", "tensorboard": False},
}
"""A DiT of 2 layers and width 32 on 8 x 8 digits, one GM student of 2 NFE, 6 steps of 8 samples each."""


def tiny(**overrides: object) -> dict[str, Any]:
    """A copy of `TINY` with dotted keys changed, as `tiny(**{"training.steps": 20})`; a mapping replaces a section."""
    return changed(copy.deepcopy(TINY), overrides)


def changed(table: dict[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    """The table with dotted keys changed."""
    for name, value in overrides.items():
        *sections, key = name.split(".")
        inner = table
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[key] = copy.deepcopy(value)
    return table


def flow_map(**overrides: object) -> dict[str, Any]:
    """As `tiny`, of a flow map in the place of the student: it predicts and corrects, with guidance to choose."""
    table = tiny()
    del table["students"]
    table["data"]["best_of"] = 2
    table["flow_maps"] = {
        "freeflow": {
            "strengths": [1.0],
            "objective": {
                "guidance": [1.0, 2.0],
                "guided_until": 0.7,
                "delay": 1,
                "correction_warmup": 2,
                "prediction": {"steps": 4, "warmup": 3},
            },
            "auxiliary": {"updates": 2, "optimiser": {"learning_rate": 2e-3, "warmup_steps": 2}},
        }
    }
    return changed(table, overrides)


def write(path: Path, table: Mapping[str, Any]) -> Path:
    """The recipe as a TOML file at `path`, which is returned."""
    path.write_text(to_toml(table), encoding="utf-8")
    return path
