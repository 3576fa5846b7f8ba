"""`pitools rivals`: the search, the report on fresh seeds, and why it came out so.

Each stage is a list of jobs whose results come from one ledger; tables and pictures are made of the ledger alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from toys.compared import Row, auxiliary_table, plot, table
from toys.jobs import METHODS, Found, Job, Ledger, Setting, default_calls, start, teacher_metrics
from toys.search import REPORT_SEEDS, search
from toys.targets import load_target

SHIPPED = Path(__file__).with_name("rivals.json")
Best = Mapping[str, Mapping[str, Setting]]
"""The settings that a search chose, by target and method."""


def run(
    stage: str,
    targets: Sequence[str],
    out: Path,
    runs: int,
    calls: int | None,
    settings: Path | None,
    console: Console,
) -> None:
    """One stage, for each target in turn.

    Raises `ValueError` for a target or settings that there are not, and too few calls; `DivergenceError` where a loss
    is not finite; `OSError` where `out` cannot be written.
    """
    for target in targets:
        load_target(target)
    best = {} if stage == "search" else read_settings(settings or SHIPPED, targets)
    out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(out / "runs.jsonl")
    with _progress(console) as progress:
        result = _shown(ledger, progress)
        for target in targets:
            allowed = calls or default_calls(target)
            if stage == "search":
                _keep(out / "best.json", target, search(result, target, runs, allowed))
            else:
                jobs = JOBS[stage](target, best[target], allowed)
                rows = [Row(title, [result(job) for job in own]) for title, own in jobs.items()]
                _write(out, stage, target, rows)
    if stage == "report":
        plot(out / "errors.png", out / "modes.png", _reported(ledger, targets, best, calls))
    console.print(f"Wrote {out}/.", highlight=False)


def read_settings(path: Path, targets: Sequence[str]) -> Best:
    """What a search wrote. Raises `ValueError` where the file or a target is missing."""
    if not path.exists():
        raise ValueError(f"--settings {path} does not exist; `pitools rivals search` writes best.json")
    known = {
        target: {method: Setting(**setting) for method, setting in chosen.items()}
        for target, chosen in json.loads(path.read_text(encoding="utf-8")).items()
    }
    for target in targets:
        if target not in known:
            raise ValueError(f"{path} has no settings for {target}, only for {', '.join(known)}; search for them first")
    return known


def report_jobs(target: str, best: Mapping[str, Setting], calls: int) -> dict[str, list[Job]]:
    """Every method on every report seed."""
    return {
        method: [
            Job("report", target, method, best.get(method, start(target, method)), seed, calls) for seed in REPORT_SEEDS
        ]
        for method in METHODS
    }


def why_jobs(target: str, best: Mapping[str, Setting], calls: int) -> dict[str, list[Job]]:
    """FreeFlow's best with one thing changed; v_N of the student's own samples, where there are no classes; other sizes
    of the network. What has one seed has the report's first."""
    own = best["freeflow"]

    def plan(method: str, setting: Setting, seeds: Sequence[int] = REPORT_SEEDS[:1]) -> list[Job]:
        return [Job("report", target, method, setting, seed, calls) for seed in seeds]

    jobs = {"freeflow": plan("freeflow", own, REPORT_SEEDS)}
    if not load_target(target).classes:
        low = replace(own, r_mean=-0.8, r_std=1.2)
        jobs["freeflow, low r"] = plan("freeflow", low, REPORT_SEEDS)
        jobs["freeflow, low r, v_N exact"] = plan("freeflow", replace(low, updates=0), REPORT_SEEDS)
        jobs["freeflow, v_N exact"] = plan("freeflow", replace(own, updates=0))
    for method in ("prediction", "freeflow"):
        for width in (64, 256):
            jobs[f"{method}, width {width}"] = plan(method, replace(best[method], width=width))
    changes: dict[str, dict[str, Any]] = {
        "k = 0": {"k": 0.0},
        "k = 1": {"k": 1.0},
        "r as in the paper": {"r_mean": 0.8, "r_std": 1.6},
        "α a tenth": {"alpha": own.alpha / 10},
        "α ten times": {"alpha": own.alpha * 10},
    }
    jobs |= {f"freeflow, {title}": plan("freeflow", replace(own, **change)) for title, change in changes.items()}
    return jobs


JOBS: Mapping[str, Callable[[str, Mapping[str, Setting], int], dict[str, list[Job]]]] = {
    "report": report_jobs,
    "why": why_jobs,
}
STAGES = ("search", *JOBS)


def _reported(ledger: Ledger, targets: Sequence[str], best: Best, calls: int | None) -> dict[str, list[Found]]:
    jobs = {target: report_jobs(target, best[target], calls or default_calls(target)) for target in targets}
    return {target: [ledger.done[job] for own in jobs[target].values() for job in own] for target in targets}


def _write(out: Path, stage: str, target: str, rows: Sequence[Row]) -> None:
    """STAGE-TARGET.md, and all that it is made of in a .json of the same name."""
    teacher = teacher_metrics(target)
    path = out / f"{stage}-{target}.md"
    text = "\n".join(part for part in (table(rows, teacher), auxiliary_table(rows)) if part)
    path.write_text(text, encoding="utf-8")
    whole = {"teacher": teacher, "rows": {row.title: [asdict(run) for run in row.runs] for row in rows}}
    path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _keep(path: Path, target: str, chosen: Mapping[str, Setting]) -> None:
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[target] = {method: asdict(setting) for method, setting in chosen.items()}
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def _shown(ledger: Ledger, progress: Progress) -> Callable[[Job], Found]:
    """The ledger's results, each new job with a bar and a line of its own."""
    bar = progress.add_task("", total=None)

    def result(job: Job) -> Found:
        if job in ledger.done:
            return ledger.done[job]
        progress.reset(bar, description=f"{job.target} {job.method}, seed {job.seed}")
        found = ledger.result(job, lambda step, steps: progress.update(bar, completed=step, total=steps))
        changed = {key: value for key, value in asdict(job.setting).items() if value != getattr(Setting(), key)}
        settings = ", ".join(f"{key} {value}" for key, value in changed.items()) or "as a search begins"
        progress.console.print(
            f"{job.target} {job.method}, seed {job.seed}: SW {found.metrics['sliced_wasserstein']:.4f} ({settings})",
            highlight=False,
        )
        return found

    return result


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console
    )
