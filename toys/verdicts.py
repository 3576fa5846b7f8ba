"""`pitools claims`: every claim measured, and CLAIMS.md."""

from __future__ import annotations

import json
import math
import platform
import signal
import time
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toys.claims import CLAIMS, FULL, QUICK, Bench
from toys.evidence import Check, Finding, Ratio, shown


def run(names: Sequence[str], quick: bool, out: Path, processes: int, console: Console) -> list[Finding]:
    """Measure the claims of these names, or all; write OUT/CLAIMS.md and OUT/claims.json.

    Students are kept in OUT/students, so that what was stopped goes on. Raises `ValueError` for an unknown name.
    """
    known = [claim.name for claim in CLAIMS]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown claim {name!r}; the claims are {', '.join(known)}")
    asked = [name for name in known if not names or name in names]
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Finding] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with (
        Progress(*columns, console=console) as progress,
        get_context("spawn").Pool(processes, _begin) as pool,  # which is terminated at the end of this
    ):
        bar = progress.add_task("claims", total=len(asked))
        for finding in pool.imap_unordered(partial(measure, quick=quick, folder=out / "students"), asked):
            found[finding.name] = finding
            progress.advance(bar)
            progress.console.print(f"{finding.name}: {finding.verdict} ({finding.seconds:.0f} s)", highlight=False)
    # What was measured before, and not now, stays.
    path = out / "claims.json"
    told = {one["name"]: one for one in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    told |= {name: _told(finding) for name, finding in found.items()}
    path.write_text(json.dumps([told[name] for name in known if name in told], indent=1) + "\n", encoding="utf-8")
    findings = [_read(told[name]) for name in known if name in told]
    (out / "CLAIMS.md").write_text(markdown(findings, quick), encoding="utf-8")
    return [found[name] for name in asked]


def _told(finding: Finding) -> dict[str, Any]:
    """As JSON has it: infinity and NaN are words."""

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    def told(check: Check) -> dict[str, Any]:
        return {
            "says": check.says,
            "ratio": isinstance(check, Ratio),
            "values": list(map(number, check.values)),
            "at_least": check.at_least,
            "at_most": check.at_most,
            "mean": number(check.mean),
            "interval": list(map(number, check.interval)),
            "verdict": check.verdict,
        }

    return {
        "name": finding.name,
        "verdict": finding.verdict,
        "seconds": round(finding.seconds, 1),
        "checks": list(map(told, finding.checks)),
    }


def _read(told: Mapping[str, Any]) -> Finding:
    checks = [
        (Ratio if one["ratio"] else Check)(
            one["says"], list(map(float, one["values"])), one["at_least"], one["at_most"]
        )
        for one in told["checks"]
    ]
    return Finding(told["name"], checks, told["seconds"])


def _begin() -> None:
    """One thread a process; Ctrl-C is the first one's to hear."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def measure(name: str, quick: bool, folder: Path) -> Finding:
    """One claim's checks."""
    begun = time.perf_counter()
    (claim,) = (claim for claim in CLAIMS if claim.name == name)
    checks = claim.measure(Bench(folder, QUICK if quick else FULL))
    return Finding(name, checks, time.perf_counter() - begun)


def markdown(findings: Sequence[Finding], quick: bool) -> str:
    """The table of all, then what was measured of each."""
    size, claims = QUICK if quick else FULL, {claim.name: claim for claim in CLAIMS}
    lines = [
        "# The papers' claims, measured here",
        "",
        *(["**A quick run**: students are trained for seconds, and show that the command works.", ""] if quick else []),
        f"Made on {date.today():%d %B %Y} by `pitools claims{' --quick' if quick else ''}`, with seeds "
        f"{size.seeds[0]} to {size.seeds[-1]}, torch {version('torch')} and Python {platform.python_version()}.",
        "",
        "Teachers are exact and students small, and all of this takes hours on a laptop: a claim that does "
        "not hold here may hold at the papers' scale. Numbers are means over the seeds, with Student's t "
        "interval at 95%; a claim holds if every number's interval lies where it should, and does not hold if "
        "one lies wholly outside.",
        "",
        "| claim | source | verdict | checks that hold |",
        "| --- | --- | --- | ---: |",
    ]
    for finding in findings:
        claim = claims[finding.name]
        lines.append(f"| [{claim.says}](#{claim.name}) | {claim.source} | {finding.verdict} | {finding.held} |")
    for finding in findings:
        claim = claims[finding.name]
        lines += ["", f"## {claim.name}", "", f"{claim.says} ({claim.source})", ""]
        lines += ["| measured | mean (interval) | should be | |", "| --- | ---: | ---: | --- |"]
        lines += [_row(check) for check in finding.checks]
        if claim.because and not quick:
            lines += ["", claim.because]
    return "\n".join(lines) + "\n"


def _row(check: Check) -> str:
    low, high = map(shown, check.interval)
    return f"| {check.says} | {shown(check.mean)} ({low} to {high}) | {check.bounds} | {check.verdict or ''} |"
