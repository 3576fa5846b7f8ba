"""A whole evaluation: what was asked for, measured, and written.

    OUT/evaluation.json    every number, and how it was measured
    OUT/samples.png        the first images of each set; those of one run from the same noises
    OUT/report.html        both, to look at and to send: one file

None of them is written before all is measured, and each is there as a whole or not at all.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import torch
from rich.console import Console

from pitools.evaluation.extractors import load_extractor
from pitools.evaluation.images import read_folder
from pitools.evaluation.measure import Measuring, Seen, alone, columns_of, measured, see
from pitools.evaluation.page import page
from pitools.evaluation.report import Report, Row, as_json, tables_of
from pitools.evaluation.scorers import load_scorer
from pitools.evaluation.sheets import png, sheet, thumbnails
from pitools.evaluation.statistics import read_statistics, statistics_file
from pitools.evaluation.targets import Entry, ImageFolder, Progress, Run, Target, open_target
from pitools.training.checkpoint import check_writable, write_bytes, write_json
from pitools.training.comparison import show_comparison
from pitools.training.data import OnChunk
from pitools.training.log import tell

OF_RUNS = ("data", "teacher")

SHARED = (
    "The teacher's images share their noises with the students': distances are less than to other samples of the "
    "teacher, and the kernel distance lies below 0 where a student draws what the teacher draws."
)
"""What a reader must know of a teacher as reference."""


@dataclass(frozen=True)
class Request:
    """What the command was asked; see its options.

    reference: "data", "teacher", a folder of images, or a file of statistics; None for data.  save_reference: a file
    for the statistics of a reference.
    """

    targets: Sequence[str]
    device: torch.device
    reference: str | None = None
    features: str | None = None
    samples: int | None = None
    patch: int | None = None
    k: int | None = None
    batch: int = 64
    subset: int = 10_000
    seed: int = 0
    scorers: Sequence[str] = ()
    out: Path | None = None
    save_reference: Path | None = None


def evaluate(request: Request, console: Console) -> Path:
    """Measure, print a table, and write the folder that is returned.

    Raises `ValueError` for what a user can mend; `CheckpointError`, `DivergenceError`, `ImportError` and `OSError` for
    what goes wrong.
    """
    start = time.perf_counter()
    targets = [open_target(name, request.samples, request.device) for name in request.targets]
    if len({target.name for target in targets}) < len(targets):
        raise ValueError(f"a target is named twice: {', '.join(request.targets)}")
    reference = _reference_of(request, targets)
    features = _features_of(request, targets)
    out = _folder_of(request, targets, reference)
    _check(request, targets, reference, out)
    how = Measuring(
        load_extractor(features, request.device),
        features,
        request.device,
        request.patch,
        request.k,
        request.batch,
        request.subset,
        request.seed,
        scorers={name: load_scorer(name, request.device) for name in request.scorers},
    )
    with _noted() as notes, show_comparison(console, "") as progress:
        rows = _measure(request, targets, reference, how, progress)
    if reference == "teacher":
        notes.append(SHARED)
    settings = {
        "reference": reference,
        "features": features,
        "samples": request.samples,
        "patch": request.patch,
        "neighbours": {"precision and recall": request.k or 3, "density and coverage": request.k or 5},
        "subset": request.subset,
        "seed": request.seed,
        "scorers": list(request.scorers),
        "device": str(request.device),
    }
    report = Report(
        settings,
        columns_of(features.startswith("inception:"), all(isinstance(target, Run) for target in targets), how.scorers),
        rows,
        notes,
        time.perf_counter() - start,
    )
    pictures = [(report.title(row), row.pictures) for _, group in report.groups for row in group]
    write_bytes(out / "samples.png", png(sheet(pictures)))
    write_bytes(out / "report.html", page(report).encode())
    write_json(out / "evaluation.json", as_json(report))  # last, so that a folder with it is complete
    for table in tables_of(report, console.width):
        console.print(table)
    for note in notes:
        tell(console, f"Note: {note}")
    tell(console, f"Wrote {out}/ (evaluation.json, samples.png, report.html)")
    return out


def _measure(request: Request, targets: Sequence[Target], name: str, how: Measuring, progress: Progress) -> list[Row]:
    rows: list[Row] = []

    def drawing(title: str) -> OnChunk:
        return progress(f"Drawing: {title}")

    def measuring(title: str) -> OnChunk:
        return progress(f"Measuring: {title}")

    shared: tuple[Row | None, Seen] | None = None
    if name not in OF_RUNS:
        shared = _shared(name, how, measuring)
        rows += [] if shared[0] is None else [shared[0]]
    for target in targets:
        own = replace(how, classes=isinstance(target, Run) and target.features == how.features)
        run, entry = target.name if isinstance(target, Run) else None, None
        if shared is not None:
            _, seen = shared
        else:
            entry = cast(Run, target).reference(cast(Literal["data", "teacher"], name), drawing)
            row, seen = _seen(entry, own, measuring)
            rows.append(replace(row, run=run))
        if request.save_reference is not None and target is targets[0]:
            write_bytes(request.save_reference, statistics_file(seen.moments))
        for each in target.entries(drawing):
            if entry is not None and each.images is entry.images:
                continue  # the reference itself
            values, pictures = measured(each, seen, own, measuring), thumbnails(each.images)
            rows.append(Row(each.source, each.title, len(each.images), values, pictures, run, known=each.known))
    return rows


def _seen(entry: Entry, how: Measuring, progress: Progress) -> tuple[Row, Seen]:
    seen, scored = see(entry, how, progress(f"{entry.source}, {entry.title}"))
    values = {**alone(entry, seen, how), **scored}
    title = f"{entry.title} (reference)"
    return Row(entry.source, title, len(entry.images), values, thumbnails(entry.images), reference=True), seen


def _shared(name: str, how: Measuring, progress: Progress) -> tuple[Row | None, Seen]:
    """A reference that lies somewhere, and its row if it has images."""
    path = Path(name)
    if path.is_dir():
        folder = read_folder(path)
        return _seen(Entry(name, path.name, folder.images, folder.asked), how, progress)
    found = read_statistics(path)
    if found.images is None:
        if how.patch is not None:
            raise ValueError(f"--patch needs a reference of images, and {name} has only the moments of whole ones")
        assert found.moments is not None
        return None, Seen(found.moments)
    row, seen = _seen(Entry(name, path.name, found.images), how, progress)
    return row, seen if found.moments is None else replace(seen, moments=found.moments)


def _reference_of(request: Request, targets: Sequence[Target]) -> str:
    runs = all(isinstance(target, Run) for target in targets)
    if request.reference is None:
        if not runs:
            raise ValueError("a folder of images needs --reference: a folder, or a file with mu and sigma")
        return "data"
    for target in targets:
        if request.reference in OF_RUNS and isinstance(target, ImageFolder):
            raise ValueError(
                f"--reference {request.reference} is for runs, and {target.name} is a folder of images; name a folder "
                "of other images, or a file with mu and sigma"
            )
    if request.reference not in OF_RUNS and not Path(request.reference).exists():
        raise ValueError(f'--reference must be "data", "teacher", a folder or a file, and {request.reference} is none')
    return request.reference


def _features_of(request: Request, targets: Sequence[Target]) -> str:
    own = {target.features for target in targets}
    if request.features is not None:
        return request.features
    (only,) = own if len(own) == 1 else (None,)
    if only is None:
        raise ValueError(
            "name what looks at the images with --features: inception:FILE, or MODULE:FUNCTION of your own; "
            "only runs on data that have a network of their own can do without"
        )
    return only


def _folder_of(request: Request, targets: Sequence[Target], reference: str) -> Path:
    """By default in the run, and for every reference its own."""
    if request.out is not None:
        return request.out
    name = f"evaluation-{Path(reference).resolve().name}"
    single = targets[0] if len(targets) == 1 else None
    return Path(single.name) / name if isinstance(single, Run) else Path("runs") / name


def _check(request: Request, targets: Sequence[Target], reference: str, out: Path) -> None:
    """`ValueError` for what would otherwise be told late."""
    check_writable(out)
    for target in targets:
        if request.scorers and not target.asks:
            raise ValueError(
                f"--scorer {request.scorers[0]} scores images by what was asked for, and {target.name} does not tell: "
                'list it in samples.json, {"images": [{"file": "0000.png", "prompt": "..."}]}'
            )
    folders = [target.name for target in targets if isinstance(target, ImageFolder)]
    for folder in (*folders, *([] if reference in OF_RUNS else [reference])):
        if out.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(f"--out {out} lies among the images of {folder}; name another folder")
    if request.save_reference is not None and reference in OF_RUNS and len(targets) > 1:
        raise ValueError(f"--save-reference keeps one reference, and each run has {reference} of its own; name one run")


@contextmanager
def _noted() -> Iterator[list[str]]:
    """The warnings of metrics, each once, for whoever reads the numbers."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield notes
    for warning in caught:
        if issubclass(warning.category, UserWarning) and Path(warning.filename).parent == Path(__file__).parent:
            notes += [str(warning.message)] if str(warning.message) not in notes else []
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
