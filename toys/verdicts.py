"""`pitools claims`: every claim measured, and CLAIMS.md."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from toys.claims import CLAIMS, FULL, QUICK, Bench
from toys.evidence import Check, Finding, shown


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
    findings = [found[name] for name in asked]
    (out / "CLAIMS.md").write_text(markdown(findings, quick), encoding="utf-8")
    whole = [asdict(finding) | {"verdict": finding.verdict} for finding in findings]
    (out / "claims.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return findings


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
        f"Made on {date.today():%d %B %Y} by `pitools claims{' --quick' if quick else ''}`, with seeds "
        f"{size.seeds[0]} to {size.seeds[-1]}, torch {version('torch')} and Python {platform.python_version()}.",
        "",
        "Teachers are exact and students small, and all of this takes hours on a laptop: a claim that does "
        "not hold here may hold at the papers' scale. Numbers are means over the seeds, with Student's t "
        "interval at 95%; a claim holds if every number's interval lies where it should, and does not hold if "
        "one lies wholly outside.",
        "",
        "| claim | source | verdict |",
        "| --- | --- | --- |",
    ]
    if quick:
        lines[4] = "**A quick run**: students are trained for seconds, and what they show is that the command works."
    for finding in findings:
        claim = claims[finding.name]
        lines.append(f"| [{claim.says}](#{claim.name}) | {claim.source} | {finding.verdict} |")
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
