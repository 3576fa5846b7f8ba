"""The settings of FreeFlow and of its two halves, searched for at equal calls of the teacher.

Half of a method's search draws settings at random, half changes two things of the best so far; FreeFlow's first joins
the best of its two halves. The best few are repeated on the other search seed. The lowest sliced Wasserstein distance
to fresh data wins, a mean over the search seeds; seeds, noises and data of the report are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from statistics import mean
from types import MappingProxyType
from typing import Any

import torch

from pitools.training import keyed_generator
from toys.jobs import TRIO, Found, Job, Setting, start

SEARCH_SEEDS = (100, 101)
REPORT_SEEDS = (0, 1, 2)
CRITERION = "sliced_wasserstein"
KEPT = 3

RATE: Mapping[str, Sequence[Any]] = MappingProxyType({"learning_rate": (1e-3, 2e-3, 4e-3)})
PREDICTION: Mapping[str, Sequence[Any]] = MappingProxyType(
    {**RATE, "N": (0, 8, 16, 32), "solver": ("euler", "heun"), "k": (0.0, 0.5, 1.0)}
)
CORRECTION: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        **RATE,
        "r_mean": (-1.6, -0.8, 0.0, 0.8),
        "r_std": (0.8, 1.2, 1.6),
        "updates": (1, 2, 4),
        "auxiliary_rate": (1e-3, 2e-3, 4e-3),
    }
)
BALANCE: Mapping[str, Sequence[Any]] = MappingProxyType(
    {"alpha": (0.1, 0.3, 1.0, 3.0, 10.0), "share": (0.5, 0.75, 0.9), "delay": (0.0, 0.25, 0.5)}
)
SPACES: Mapping[str, Mapping[str, Sequence[Any]]] = MappingProxyType(
    {"prediction": PREDICTION, "dmd": CORRECTION, "freeflow": {**PREDICTION, **CORRECTION, **BALANCE}}
)

Result = Callable[[Job], Found]


def search(result: Result, target: str, runs: int, calls: int) -> dict[str, Setting]:
    """The best setting of FreeFlow and of each half, of `runs` tried for each. result: what comes of a job."""
    best: dict[str, Setting] = {}
    for method in TRIO:
        best[method] = _best(result, target, method, runs, calls, _joined(target, method, best))
    return best


def _best(result: Result, target: str, method: str, runs: int, calls: int, first: Setting) -> Setting:
    def score(setting: Setting, seeds: Sequence[int] = SEARCH_SEEDS[:1]) -> float:
        jobs = [Job("search", target, method, setting, seed, calls) for seed in seeds]
        return mean(result(job).metrics[CRITERION] for job in jobs)

    space, tried = SPACES[method], {first: score(first)}
    for index in range(1, runs):
        generator = keyed_generator(SEARCH_SEEDS[0], f"search {target} {method}", index)
        far = index < runs / 2
        near = min(tried, key=tried.__getitem__)
        setting = changed(first if far else near, space, len(space) if far else 2, generator)
        tried[setting] = score(setting)
    kept = sorted(tried, key=tried.__getitem__)[:KEPT]
    return min(kept, key=lambda setting: score(setting, SEARCH_SEEDS))


def _joined(target: str, method: str, best: Mapping[str, Setting]) -> Setting:
    """Where a search sets out: FreeFlow's from the best of its halves."""
    if method != "freeflow":
        return start(target)
    correction = asdict(best["dmd"])
    return replace(best["prediction"], **{name: correction[name] for name in CORRECTION if name not in RATE})


def changed(setting: Setting, space: Mapping[str, Sequence[Any]], count: int, generator: torch.Generator) -> Setting:
    """`count` values of a setting drawn anew."""
    names = [list(space)[index] for index in torch.randperm(len(space), generator=generator)[:count].tolist()]
    drawn = {name: space[name][int(torch.randint(len(space[name]), (1,), generator=generator))] for name in names}
    return replace(setting, **drawn)
