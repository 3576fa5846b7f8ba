"""Prompts, classes, and the images that go with them, from what people keep them in:

    .txt       a prompt on each line; blank lines are skipped
    .jsonl     an object on each line (also .ndjson)
    .json      a list of prompts, as each style of the HPSv2 benchmark has one
    .csv       a table with a heading, such as OneIG-Bench's, whose prompts are the column prompt_en
    .parquet   a table; needs pyarrow
    org/name   a data set of the Hugging Face hub, its split "train"; needs datasets
    FOLDER     of class-labelled images: a subfolder for each class, as ImageNet's are

An image of a prompt is named by a path from the folder of the file that names it. Classes are numbered in the order of
their subfolders' names, which for ImageNet's (n01440764, ...) is the numbering that everybody uses.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".parquet")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Record:
    """A prompt, and the file of the image that it describes, if there is one."""

    prompt: str
    image: Path | None = None


@dataclass(frozen=True)
class Labelled:
    """A class, from 0, and the file of an image of it, if there is one."""

    label: int
    image: Path | None = None


def read_records(source: str | Path, column: str = "prompt", image_column: str | None = None) -> list[Record]:
    """The prompts of a file or a data set of the hub, in its order, and with `image_column` their images.

    column, image_column: where they stand in JSON lines, CSV, parquet and data sets.
    Raises `ValueError` for a file that is not there or not of its kind, a column that is not there (naming the
    nearest), a prompt that is not text, an image that is not there, and a list without prompts; `ImportError`,
    naming what to install, for parquet without pyarrow and the hub without datasets.
    """
    path = Path(source)
    columns = [column] if image_column is None else [column, image_column]
    if path.suffix not in SUFFIXES and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        if image_column is not None:
            raise ValueError(
                f"images come with JSON lines, CSV or parquet, not with the data set {source}; export it first"
            )
        rows = _hub(str(source), columns)
    elif not path.is_file():
        what = "is a folder; name a file in it" if path.is_dir() else "is no file, nor a data set such as org/name"
        raise ValueError(f"the prompt list {str(source)!r} {what}")
    elif path.suffix in (".txt", ".json"):
        if image_column is not None:
            raise ValueError(f"images come with JSON lines, CSV or parquet, and {source} has prompts alone")
        listed = _lines(path) if path.suffix == ".txt" else _json_list(path)
        rows = ((f"{path}, {'line' if path.suffix == '.txt' else 'prompt'} {n}", {column: one}) for n, one in listed)
    elif path.suffix == ".csv":
        rows = _csv(path, columns)
    elif path.suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path, columns)
    elif path.suffix == ".parquet":
        rows = _parquet(path, columns)
    else:
        raise ValueError(f"the prompt list {source} must end in one of {', '.join(SUFFIXES)}")
    records = [_record(where, row, column, image_column, path.parent) for where, row in rows]
    if not records:
        raise ValueError(f"the prompt list {source} has no prompts")
    return records


def read_classes(folder: Path, classes: int) -> list[Labelled]:
    """The images of a folder with a subfolder for each of `classes`, class after class and by name.

    Files that are no images by their suffix, and hidden ones, are passed over.
    Raises `ValueError` for a folder that is not there, or has another number of subfolders, and for one without
    images.
    """
    if not folder.is_dir():
        raise ValueError(f"the folder of images {str(folder)!r} is not there; name one with a subfolder for each class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) != classes:
        raise ValueError(f"{folder} must have a subfolder for each of {classes} classes, got {len(names)} subfolders")
    images = [
        Labelled(label, folder / name / file)
        for label, name in enumerate(names)
        for file in sorted(entry.name for entry in (folder / name).iterdir())
        if Path(file).suffix.lower() in IMAGES and not file.startswith(".")
    ]
    if not images:
        raise ValueError(f"{folder} has subfolders without images; those are files that end in {', '.join(IMAGES)}")
    return images


Rows = Iterable[tuple[str, Mapping[str, Any]]]
"""Where each row stands, for errors, and its columns."""


def _record(where: str, row: Mapping[str, Any], column: str, image_column: str | None, folder: Path) -> Record:
    prompt = row[column]
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: {column} must be text, got {prompt!r}")
    if image_column is None:
        return Record(prompt)
    name = row[image_column]
    if not isinstance(name, str):
        raise ValueError(f"{where}: {image_column} must be the path of an image, got {type(name).__name__}")
    image = folder / name
    if not image.is_file():
        raise ValueError(f"{where}: there is no image {str(image)!r}")
    return Record(prompt, image)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, and their numbers from 1."""
    try:
        # A byte order mark is no part of the first prompt; a line ends at a line feed and at nothing more exotic.
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt list {path} is not UTF-8 text ({error.reason})") from None


def _json_lines(path: Path, columns: Sequence[str]) -> Rows:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where} must be an object such as {{"{columns[0]}": "..."}}, got {line[:40]}')
        _check_columns(where, columns, row)
        yield where, row


def _json_list(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a list and their numbers from 1."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the prompt list {path} is not JSON: {error}") from None
    if not isinstance(found, list):
        raise ValueError(f'the prompt list {path} must be a list such as ["...", "..."], got a {type(found).__name__}')
    yield from enumerate(found, start=1)


def _csv(path: Path, columns: Sequence[str]) -> Rows:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            _check_columns(str(path), columns, table.fieldnames or [])
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(table, start=1))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the prompt list {path} is not CSV: {error}") from None


def _parquet(path: Path, columns: Sequence[str]) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"a prompt list in parquet needs pyarrow ({error}): run `pip install pyarrow`") from error
    try:
        file = parquet.ParquetFile(path)
        _check_columns(str(path), columns, file.schema_arrow.names)
        rows = file.read(columns=list(columns)).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"the prompt list {path} is not parquet: {error}") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _hub(name: str, columns: Sequence[str]) -> Rows:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no file, and a data set of the hub needs datasets ({error}): run `pip install datasets`"
        ) from error
    try:
        data = load_dataset(name, split="train")
    except (OSError, ValueError) as error:
        raise ValueError(f"{name!r} is no file, and no data set that can be loaded: {error}") from error
    _check_columns(name, columns, data.column_names)
    # Only these columns: others may hold images, which would be decoded.
    for number, row in enumerate(data.select_columns(list(columns))):
        yield f"{name}, row {number}", row


def _check_columns(where: str, columns: Sequence[str], found: Iterable[str]) -> None:
    names = list(found)
    for column in columns:
        if column not in names:
            near = difflib.get_close_matches(column, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names) or 'none'}"
            raise ValueError(f"{where} has no column {column!r}; {hint}")
