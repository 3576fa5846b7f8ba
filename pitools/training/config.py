"""Strict recipes: a TOML table becomes a frozen dataclass, or one line says where it does not and what to change.

    recipe.toml --read_recipe--> table --override--> table --parse--> dataclass --as_table--> table --to_toml--> text

A section is a frozen dataclass that lies in the room it configures; its type hints are the schema and its
`__post_init__` checks the values. `parse(cls, as_table(section)) == section`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import date, datetime, time
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

T = TypeVar("T")


class RecipeError(ValueError):
    """A recipe that cannot be used; the message is one line that says where and what to change."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(filter(None, map(str.strip, message.splitlines()))))


def parse(cls: type[T], table: Mapping[str, object], where: str = "") -> T:
    """The frozen dataclass `cls` with the values of `table`; what the table leaves out keeps its default.

    Understood hints: bool, int, float (also from a whole number), str, Path, Literal, tuple[X, ...],
    tuple[X, Y], a dataclass (sub-table), Mapping[str, X] and unions of these. `object` is left as it is. A field
    that may be None is None where neither the table nor the class says otherwise. A section given in part is
    completed by its own class, not by what the outer class has for a default.

    where: the dotted name of the section, for messages; "" is the whole recipe.
    Raises `RecipeError` for an unknown or missing key, a value of another kind, NaN or infinity, and for what
    the dataclass's own checks refuse; `TypeError` for a class that no table can describe.
    """
    if not is_dataclass(cls):
        raise TypeError(f"a section must be a dataclass, got {cls!r}")
    if not isinstance(table, Mapping):
        raise RecipeError(f"{where or 'the recipe'} must be a table, got {_shown(table)}")
    section = f"[{where}]" if where else "the recipe"
    hints = typing.get_type_hints(cls)
    own = {field.name: field for field in fields(cls) if field.init}
    for key in table:
        if key not in own:
            listed = f"its keys are {', '.join(own)}" if own else "it has none"
            raise RecipeError(f"{section} has no key {key!r}; {_nearest(key, own) or listed}")
    missing = [
        f"{name} ({_kind(hints[name])})"
        for name, field in own.items()
        if name not in table
        and field.default is MISSING
        and field.default_factory is MISSING
        and type(None) not in _members(hints[name])
    ]
    if missing:
        raise RecipeError(f"{section} lacks {', '.join(missing)}; add {'it' if len(missing) == 1 else 'them'}")
    values: dict[str, Any] = {
        name: None for name, field in own.items() if field.default is MISSING and field.default_factory is MISSING
    }
    values |= {key: _read(hints[key], value, _at(where, key)) for key, value in table.items()}
    try:
        return cls(**values)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{section} {error}" if where else str(error)) from error


def _read(hint: Any, value: object, where: str) -> Any:
    """`value` as what `hint` asks for; `RecipeError` where it is something else."""
    members = [member for member in _members(hint) if member is not type(None)]
    if len(members) > 1:
        return _read_union(hint, members, value, where)
    (hint,) = members
    origin = get_origin(hint) or hint
    if origin in (object, Any):
        return value
    if is_dataclass(hint):
        return parse(typing.cast(type[object], hint), typing.cast(Mapping[str, object], value), where)
    wrong = RecipeError(f"{where} must be {_kind(hint)}, got {_shown(value)}")
    if origin is Literal:
        choices = get_args(hint)
        # By kind too: 1 == True, and they are not the same choice.
        if any(type(choice) is type(value) and choice == value for choice in choices):
            return value
        guess = _nearest(value, choices)
        raise RecipeError(f"{wrong}; {guess}") if guess else wrong
    if origin is float:
        return _read_float(value, where, wrong)
    if origin in (bool, int, str):
        if type(value) is not origin:
            raise wrong
        return value
    if origin is Path:
        if not isinstance(value, str):
            raise wrong
        return Path(value)
    if origin is tuple:
        return _read_tuple(hint, value, where, wrong)
    if origin in (Mapping, dict):
        if not isinstance(value, Mapping):
            raise wrong
        inner = get_args(hint)[1] if get_args(hint) else object
        return {key: _read(inner, entry, _at(where, key)) for key, entry in value.items()}
    raise TypeError(f"{where}: a recipe cannot hold a {hint!r}")


def _read_float(value: object, where: str, wrong: RecipeError) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise wrong
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecipeError(f"{where} must be a finite number, got {_shown(value)}")
    return number


def _read_tuple(hint: Any, value: object, where: str, wrong: RecipeError) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise wrong
    inner = get_args(hint)
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise RecipeError(f"{where} must be an array of {len(inner)} values, got {len(value)}: {_shown(value)}")
    return tuple(_read(one, entry, f"{where}[{i}]") for i, (one, entry) in enumerate(zip(inner, value, strict=True)))


def _read_union(hint: Any, members: Sequence[Any], value: object, where: str) -> Any:
    # A table or an array of the right kind with a fault inside: the fault is what there is to tell.
    shape = "a table" if isinstance(value, Mapping) else "an array" if isinstance(value, (list, tuple)) else ""
    closer: RecipeError | None = None
    for member in members:
        try:
            return _read(member, value, where)
        except RecipeError as error:
            if closer is None and _kind(member) == shape:
                closer = error
    if closer is not None:
        raise closer
    guess = _nearest(
        value, [choice for member in members if get_origin(member) is Literal for choice in get_args(member)]
    )
    raise RecipeError(f"{where} must be {_kind(hint)}, got {_shown(value)}" + (f"; {guess}" if guess else ""))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(hint: Any) -> str:
    """What a hint asks for, in words."""
    members = [member for member in _members(hint) if member is not type(None)]
    if len(members) > 1:
        return " or ".join(_kind(member) for member in members)
    (hint,) = members
    origin = get_origin(hint) or hint
    if origin is Literal:
        choices = get_args(hint)
        return ("one of " if len(choices) > 1 else "") + ", ".join(_shown(choice) for choice in choices)
    if is_dataclass(hint):
        return "a table"
    words: dict[Any, str] = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text in quotes",
        Path: "a path in quotes",
        tuple: "an array",
        Mapping: "a table",
        dict: "a table",
    }
    return words.get(origin, "a value")


def _at(where: str, key: str) -> str:
    key = _key(key)
    return f"{where}.{key}" if where else key


def _nearest(value: object, choices: Iterable[object]) -> str:
    """A guess at what was meant, or "" if nothing is near."""
    names = [choice for choice in choices if isinstance(choice, str)]
    guess = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"did you mean {guess[0]!r}?" if guess else ""


def _shown(value: object) -> str:
    """A value as the recipe would have it, short and on one line."""
    try:
        text = _value(value, "")
    except ValueError:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_recipe(path: Path) -> dict[str, Any]:
    """The table in a TOML file. `RecipeError` if there is no such file, or names the line that is not TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        nearby = sorted(other.name for other in path.parent.glob("*.toml"))
        near = f"; in that folder: {', '.join(nearby)}" if nearby else ""
        raise RecipeError(f"there is no recipe {str(path)!r}{near}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not TOML: it is not UTF-8 text ({error.reason})") from None
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = f"at line {max(len(text.splitlines()), 1)}, the end of the file"
        raise RecipeError(f"{path} is not TOML: {str(error).replace('at end of document', place)}") from None


def find_recipe(name: str, packages: Sequence[str]) -> Path:
    """The file `name` if there is one, else the recipe of that name that comes with one of `packages`.

    A shipped recipe is named by its package and its path there: "toys/digits.toml". Raises `RecipeError` that
    lists the shipped ones.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {recipe: path for package in packages for recipe, path in _shipped(package)}
    if Path(name).as_posix() in shipped:
        return shipped[Path(name).as_posix()]
    if not shipped:
        raise RecipeError(f"there is no recipe {name!r}, and none is shipped with {', '.join(packages) or 'pitools'}")
    # A bare name is most likely a shipped recipe without its package.
    endings = (f"/{name}", f"/{name}.toml")
    guess = next((f"did you mean {recipe!r}?" for recipe in shipped if recipe.endswith(endings)), "")
    guess = guess or _nearest(name, shipped)
    listed = f"the shipped ones are {', '.join(shipped)}"
    raise RecipeError(f"there is no recipe {name!r}; " + (f"{guess} ({listed})" if guess else listed))


def _shipped(package: str) -> Iterator[tuple[str, Path]]:
    try:
        folder = Path(str(files(package)))
    except ModuleNotFoundError:  # an optional package that is not installed ships nothing
        return
    for path in sorted(folder.rglob("*.toml")):
        yield f"{package}/{path.relative_to(folder).as_posix()}", path


def override(table: Mapping[str, object], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `table` with each "a.b=value" set, in turn; missing tables on the way are created.

    The value is read as TOML, and taken as it stands, as text, where it is not TOML: `student.policy=dx`,
    `run.out=runs/x`. Raises `RecipeError` without "=", for an empty key, and for a way through what is no table.
    """
    result = copy.deepcopy(dict(table))
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or not all(keys):
            raise RecipeError(f"--set takes key=value, such as training.steps=1000, got {assignment!r}")
        inner: Any = result
        for depth, key in enumerate(keys[:-1], start=1):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise RecipeError(
                    f"--set {_shown(assignment)}: {'.'.join(keys[:depth])} is no table but {_shown(inner)}, "
                    f"so that nothing in it can be set"
                )
        inner[keys[-1]] = _toml_or_text(text.strip())
    return result


def _toml_or_text(text: str) -> object:
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break could end the value and begin another key.
    return table["value"] if len(table) == 1 else text


def as_table(section: object) -> dict[str, Any]:
    """The table of a dataclass, plain enough for JSON and TOML: tuples are lists, paths text, None left out.

    Raises `ValueError` for a None that leaving out would turn into something else, as a TOML table cannot say
    None, and for values that a recipe cannot hold.
    """
    if not is_dataclass(section) or isinstance(section, type):
        raise ValueError(f"section must be a dataclass instance, got {section!r}")
    table = {}
    for field in fields(section):
        value = getattr(section, field.name)
        if not field.init:
            continue
        if value is not None:
            table[field.name] = _plain(value, field.name)
        elif field.default not in (None, MISSING) or field.default_factory is not MISSING:
            raise ValueError(
                f"{type(section).__name__}.{field.name} is None, which TOML cannot say; its default is not"
            )
    return table


def _plain(value: object, where: str) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return as_table(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{where}[{i}]") for i, entry in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (bool, int, float, str, date, time)):  # a datetime is a date
        return value
    raise ValueError(f"{where} is {value!r}, which a recipe cannot hold")


def to_toml(table: Mapping[str, Any]) -> str:
    """`table` as TOML text that `tomllib` reads back: sub-tables as [a.b], arrays of tables as [[a]].

    Raises `ValueError` for what TOML cannot say, such as None.
    """
    return "\n".join(_lines(table, "")).strip("\n") + "\n"


def _lines(table: Mapping[str, Any], name: str) -> Iterator[str]:
    """The lines of a table without its header: first its values, as a header would take them to itself."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping) or _holds_tables(value)}
    for key, value in table.items():
        if key not in inner:
            yield f"{_key(key)} = {_value(value, _at(name, key))}"
    for key, value in inner.items():
        full = _at(name, key)
        if not isinstance(value, Mapping):
            for entry in value:
                yield from ("", f"[[{full}]]", *_lines(entry, full))
        elif value and all(isinstance(entry, Mapping) for entry in value.values()):
            yield from _lines(value, full)  # the headers of its sub-tables name it
        else:
            yield from ("", f"[{full}]", *_lines(value, full))


def _holds_tables(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _value(value: object, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but TOML also wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(entry, f'{where}[{i}]') for i, entry in enumerate(value))}]"
    if isinstance(value, Mapping):
        entries = (f"{_key(key)} = {_value(entry, _at(where, key))}" for key, entry in value.items())
        return f"{{{', '.join(entries)}}}"
    raise ValueError(f"{where} is {value!r}, which TOML cannot say; leave it out")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key, "a key")


def section_hash(*tables: Mapping[str, object]) -> str:
    """16 hexadecimal digits that tell whether tables are the same, whatever the order of their keys; 1 is 1.0.

    Raises `ValueError` for what is not plain.
    """
    text = json.dumps([_canonical(table) for table in tables], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _canonical(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"a table must hold plain values, got {value!r}; pass what as_table gives")
