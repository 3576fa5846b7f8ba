"""Recipes: each error's words, overrides, and the round trips between TOML, tables and dataclasses."""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pitools.training.config import (
    RecipeError,
    as_table,
    find_recipe,
    override,
    parse,
    read_recipe,
    section_hash,
    to_toml,
)


@dataclass(frozen=True)
class Optimiser:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    name: Literal["adam", "adamw", 8] = "adam"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive,\n  got {self.learning_rate}")


@dataclass(frozen=True)
class Teacher:
    name: str
    weight: float = 1.0


@dataclass(frozen=True)
class Training:
    steps: int
    seed: int = 0
    optimiser: Optimiser = field(default_factory=Optimiser)
    ema: bool = True
    nfe: tuple[int, ...] = (1, 2)
    out: Path = Path("runs")
    resume: Path | None = None
    temperature: float | Literal["auto"] = 1.0
    teachers: tuple[Teacher, ...] = ()
    conditions: Mapping[str, object] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    clip: float | None = None


@dataclass(frozen=True)
class Recipe:
    training: Training
    note: str | None
    size: int | tuple[int, int] = 1
    teacher: Teacher | None = None
    computed: int = field(default=3, init=False)


def message(table: Mapping[str, object], cls: type = Recipe, where: str = "") -> str:
    with pytest.raises(RecipeError) as caught:
        parse(cls, table, where)
    text = str(caught.value)
    assert "\n" not in text
    return text


def training(**keys: object) -> dict[str, object]:
    return {"training": {"steps": 5, **keys}}


def test_a_recipe_becomes_frozen_dataclasses() -> None:
    text = """
        note = "first"
        size = [8, 9]
        [training]
        steps = 100
        nfe = [4]
        out = "runs/x"
        resume = "runs/y"
        temperature = "auto"
        conditions = { guidance = 3, names = ["a"] }
        weights = { "a b" = 1 }
        [training.optimiser]
        learning_rate = 1
        name = 8
        [[training.teachers]]
        name = "flux"
        [[training.teachers]]
        name = "qwen"
        weight = 0.5
    """
    recipe = parse(Recipe, tomllib.loads(text))
    assert recipe == Recipe(
        training=Training(
            steps=100,
            nfe=(4,),
            out=Path("runs/x"),
            resume=Path("runs/y"),
            temperature="auto",
            conditions={"guidance": 3, "names": ["a"]},
            weights={"a b": 1.0},
            optimiser=Optimiser(1.0, name=8),
            teachers=(Teacher("flux"), Teacher("qwen", 0.5)),
        ),
        note="first",
        size=(8, 9),
    )
    # Equality does not tell 1 from 1.0.
    assert type(recipe.training.optimiser.learning_rate) is float
    assert type(recipe.training.weights["a b"]) is float
    assert type(recipe.training.conditions["guidance"]) is int
    assert parse(Recipe, {**training(), "teacher": {"name": "dit"}}).teacher == Teacher("dit")


def test_what_is_left_out_is_the_default() -> None:
    assert parse(Recipe, training()) == Recipe(Training(5), None)
    # A section given in part is completed by its own class.
    assert parse(Recipe, training(optimiser={"betas": [0, 0.5]})).training.optimiser == Optimiser(betas=(0.0, 0.5))


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"trainin": {}}, "the recipe has no key 'trainin'; did you mean 'training'?"),
        (
            training(optimiser={"learning_rat": 1}),
            "[training.optimiser] has no key 'learning_rat'; did you mean 'learning_rate'?",
        ),
        (
            training(optimiser={"zzz": 1}),
            "[training.optimiser] has no key 'zzz'; its keys are learning_rate, betas, name",
        ),
        ({**training(), "computed": 4}, "the recipe has no key 'computed'; its keys are training, note, size, teacher"),
        (
            training(teachers=[{"name": "a"}, {"nam": "b"}]),
            "[training.teachers[1]] has no key 'nam'; did you mean 'name'?",
        ),
        ({}, "the recipe lacks training (a table); add it"),
        ({"training": {"seed": 1}}, "[training] lacks steps (a whole number); add it"),
        ({"training": 3}, "training must be a table, got 3"),
        (training(steps="many"), 'training.steps must be a whole number, got "many"'),
        (training(steps=True), "training.steps must be a whole number, got true"),
        (training(steps=1.0), "training.steps must be a whole number, got 1.0"),
        (training(ema=1), "training.ema must be true or false, got 1"),
        (training(optimiser={"learning_rate": True}), "training.optimiser.learning_rate must be a number, got true"),
        (training(optimiser={"learning_rate": "x"}), 'training.optimiser.learning_rate must be a number, got "x"'),
        (training(clip=float("nan")), "training.clip must be a finite number, got nan"),
        (training(clip=10**400), f"training.clip must be a finite number, got 1{'0' * 56}..."),
        (training(clip=float("-inf")), "training.clip must be a finite number, got -inf"),
        (training(weights={"a b": "x"}), 'training.weights."a b" must be a number, got "x"'),
        (training(weights=[1]), "training.weights must be a table, got [1]"),
        (training(out=3), "training.out must be a path in quotes, got 3"),
        (training(teachers=[{"name": 3}]), "training.teachers[0].name must be text in quotes, got 3"),
        (training(teachers={"name": "a"}), 'training.teachers must be an array, got {name = "a"}'),
        (training(nfe=4), "training.nfe must be an array, got 4"),
        (training(nfe=[1, "2"]), 'training.nfe[1] must be a whole number, got "2"'),
        (training(optimiser={"betas": [0.9]}), "training.optimiser.betas must be an array of 2 values, got 1: [0.9]"),
        (
            training(optimiser={"name": "adamww"}),
            'training.optimiser.name must be one of "adam", "adamw", 8, got "adamww"; did you mean \'adamw\'?',
        ),
        (training(optimiser={"name": "sgd"}), 'training.optimiser.name must be one of "adam", "adamw", 8, got "sgd"'),
        (training(optimiser={"name": 8.0}), 'training.optimiser.name must be one of "adam", "adamw", 8, got 8.0'),
        (
            training(temperature="auot"),
            'training.temperature must be a number or "auto", got "auot"; did you mean \'auto\'?',
        ),
        ({**training(), "size": "x"}, 'size must be a whole number or an array, got "x"'),
        ({**training(), "size": [1, 2, 3]}, "size must be an array of 2 values, got 3: [1, 2, 3]"),
        ({**training(), "teacher": {"nam": "x"}}, "[teacher] has no key 'nam'; did you mean 'name'?"),
        ({**training(), "note": date(2025, 1, 2)}, "note must be text in quotes, got 2025-01-02"),
        (training(optimiser={"learning_rate": -1}), "[training.optimiser] learning_rate must be positive, got -1.0"),
    ],
)
def test_an_error_is_one_line_that_says_where_and_what(table: dict[str, object], words: str) -> None:
    assert message(table) == words


def test_a_section_parsed_alone_is_named() -> None:
    assert (
        message({"learning_rate": 0}, Optimiser, "optimiser") == "[optimiser] learning_rate must be positive, got 0.0"
    )
    assert message({"learning_rate": 0}, Optimiser) == "learning_rate must be positive, got 0.0"
    assert message({"x": 0}, Training, "a.b").startswith("[a.b] has no key 'x'; its keys are steps, seed")
    assert message({}, Teacher, "x") == "[x] lacks name (text in quotes); add it"


@dataclass(frozen=True)
class Lazy:
    teacher: Mapping[str, object]

    def __post_init__(self) -> None:
        parse(Teacher, self.teacher, "lazy.teacher")


def test_a_section_is_named_once() -> None:
    words = "[lazy.teacher] has no key 'nam'; did you mean 'name'?"
    assert message({"teacher": {"nam": "x"}}, Lazy, "lazy") == words


def test_a_long_value_is_shortened() -> None:
    text = message(training(steps="long\n" * 100))
    assert len(text) < 120
    assert text.endswith("...")


def test_all_missing_keys_are_named_at_once() -> None:
    @dataclass(frozen=True)
    class Two:
        a: int
        b: str

    assert message({}, Two) == "the recipe lacks a (a whole number), b (text in quotes); add them"


@dataclass(frozen=True)
class Odd:
    values: set[int] = field(default_factory=set)


def test_a_class_that_no_table_describes_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cannot hold"):
        parse(Odd, {"values": [1]})
    with pytest.raises(TypeError, match="dataclass"):
        parse(int, {})


def test_a_recipe_that_is_not_there_names_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^there is no recipe '.*a\.toml'$"):
        read_recipe(tmp_path / "a.toml")
    (tmp_path / "c.toml").touch()
    (tmp_path / "b.toml").touch()
    with pytest.raises(RecipeError, match=r"^there is no recipe '.*a\.toml'; in that folder: b\.toml, c\.toml$"):
        read_recipe(tmp_path / "a.toml")
    with pytest.raises(RecipeError, match="no recipe"):
        read_recipe(tmp_path / "b.toml" / "d.toml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        read_recipe(tmp_path)


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for text, line in [("a = 1\nb 2\n", 2), ("a = 1\n\n[b", 3), ("", None)]:
        path.write_text(text)
        if line is None:
            assert read_recipe(path) == {}
        else:
            with pytest.raises(RecipeError, match=rf"^{re.escape(str(path))} is not TOML: .*line {line}\b"):
                read_recipe(path)
    path.write_bytes(b'a = "\xff"')
    with pytest.raises(RecipeError, match="UTF-8"):
        read_recipe(path)


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "installed" / "pitools_test_recipes"
    (package / "more").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "digits.toml").write_text("a = 1")
    (package / "more" / "flux.toml").touch()
    monkeypatch.syspath_prepend(package.parent)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return package


def test_a_recipe_is_found_here_first_and_then_in_a_package(shipped: Path) -> None:
    packages = ["pitools_not_installed", "pitools_test_recipes"]
    assert find_recipe("pitools_test_recipes/digits.toml", packages) == shipped / "digits.toml"
    assert (
        find_recipe(os.path.join("pitools_test_recipes", "more", "flux.toml"), packages) == shipped / "more/flux.toml"
    )
    own = Path("pitools_test_recipes/digits.toml")
    own.parent.mkdir()
    own.touch()
    assert find_recipe(str(own), packages) == own
    with pytest.raises(RecipeError):  # a package that is not among those given
        find_recipe("pitools_test_recipes/more/flux.toml", ["toys"])


def test_a_recipe_that_is_nowhere_lists_the_shipped_ones(shipped: Path) -> None:
    listed = "the shipped ones are pitools_test_recipes/digits.toml, pitools_test_recipes/more/flux.toml"
    packages = ["pitools_test_recipes"]
    for name, words in [
        ("zzz", f"there is no recipe 'zzz'; {listed}"),
        (
            "digits.toml",
            f"there is no recipe 'digits.toml'; did you mean 'pitools_test_recipes/digits.toml'? ({listed})",
        ),
        (
            "flux",
            f"there is no recipe 'flux'; did you mean 'pitools_test_recipes/more/flux.toml'? ({listed})",
        ),
        (
            "pitools_test_recipes/digit.toml",
            f"there is no recipe 'pitools_test_recipes/digit.toml'; "
            f"did you mean 'pitools_test_recipes/digits.toml'? ({listed})",
        ),
    ]:
        with pytest.raises(RecipeError, match=f"^{re.escape(words)}$"):
            find_recipe(name, packages)
    with pytest.raises(RecipeError, match=r"none is shipped with pitools_not_installed$"):
        find_recipe("x.toml", ["pitools_not_installed"])


@pytest.mark.parametrize(
    ("assignment", "table"),
    [
        ("a.b=2", {"a": {"b": 2, "c": [1]}}),
        ("a.b = 2.5", {"a": {"b": 2.5, "c": [1]}}),
        ("a.b=true", {"a": {"b": True, "c": [1]}}),
        ("a.b=True", {"a": {"b": "True", "c": [1]}}),
        ("a.b = dx ", {"a": {"b": "dx", "c": [1]}}),
        ("a.b=dx", {"a": {"b": "dx", "c": [1]}}),
        ("a.b=runs/x", {"a": {"b": "runs/x", "c": [1]}}),
        ('a.b="2"', {"a": {"b": "2", "c": [1]}}),
        ("a.b=", {"a": {"b": "", "c": [1]}}),
        ("a.b=x=y", {"a": {"b": "x=y", "c": [1]}}),
        ("a.b=1\nd = 2", {"a": {"b": "1\nd = 2", "c": [1]}}),
        ("a.c=[2, 3]", {"a": {"b": 1, "c": [2, 3]}}),
        ("a={ b = 5 }", {"a": {"b": 5}}),
        ("n.o.p=1", {"a": {"b": 1, "c": [1]}, "n": {"o": {"p": 1}}}),
        ("top=1", {"a": {"b": 1, "c": [1]}, "top": 1}),
    ],
)
def test_an_assignment_sets_a_key(assignment: str, table: dict[str, object]) -> None:
    before: dict[str, Any] = {"a": {"b": 1, "c": [1]}}
    result = override(before, [assignment])
    assert result == table
    assert type(result.get("a", {}).get("b")) is type(table["a"].get("b"))  # type: ignore[attr-defined]
    assert before == {"a": {"b": 1, "c": [1]}}


def test_assignments_are_made_in_turn_on_a_copy() -> None:
    before = {"a": {"b": [1]}}
    result = override(before, ["a.c=1", "a.c=2", "x.y=1", "x.z=2"])
    assert result == {"a": {"b": [1], "c": 2}, "x": {"y": 1, "z": 2}}
    result["a"]["b"].append(2)
    assert before == {"a": {"b": [1]}}


@pytest.mark.parametrize("assignment", ["a.b", "=1", "a.=1", ".a=1", "a..b=1", ""])
def test_an_assignment_needs_a_key_and_a_value(assignment: str) -> None:
    words = f"--set takes key=value, such as training.steps=1000, got {assignment!r}"
    with pytest.raises(RecipeError, match=f"^{re.escape(words)}$"):
        override({}, [assignment])


@pytest.mark.parametrize(("assignment", "way", "value"), [("a.b.c=1", "a.b", "1"), ("a.c.0.d=1", "a.c", "[{d = 1}]")])
def test_the_way_to_a_key_leads_through_tables(assignment: str, way: str, value: str) -> None:
    words = f'--set "{assignment}": {way} is no table but {value}, so that nothing in it can be set'
    with pytest.raises(RecipeError, match=f"^{re.escape(words)}$"):
        override({"a": {"b": 1, "c": [{"d": 1}]}}, [assignment])


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.floats(allow_nan=False, allow_infinity=False)
teachers = st.builds(Teacher, names, numbers)
# A Path keeps what it was given but for dots and slashes, which its own text has lost already.
paths = st.text("ab./ ", min_size=1, max_size=6).map(Path)
trainings = st.builds(
    Training,
    steps=st.integers(),
    optimiser=st.builds(
        Optimiser,
        numbers.filter(lambda x: x > 0),
        st.tuples(numbers, numbers),
        st.sampled_from(["adam", "adamw", 8]),
    ),
    ema=st.booleans(),
    nfe=st.lists(st.integers(), max_size=3).map(tuple),
    out=paths,
    resume=st.none() | paths,
    temperature=numbers | st.just("auto"),
    teachers=st.lists(teachers, max_size=3).map(tuple),
    conditions=st.dictionaries(names, st.integers() | st.lists(names, max_size=2), max_size=3),
    weights=st.dictionaries(names, numbers, max_size=3),
    clip=st.none() | numbers,
)
recipes = st.builds(
    Recipe,
    trainings,
    st.none() | names,
    st.integers() | st.tuples(st.integers(), st.integers()),
    st.none() | teachers,
)


@given(recipes)
def test_a_dataclass_survives_the_trip_through_toml(recipe: Recipe) -> None:
    table = as_table(recipe)
    assert parse(Recipe, table) == recipe
    assert parse(Recipe, tomllib.loads(to_toml(table))) == recipe


moments = st.datetimes().map(lambda moment: moment.replace(fold=0))
scalars = st.booleans() | st.integers() | numbers | names | moments | st.dates() | st.times()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=12
)


@given(st.dictionaries(names, values, max_size=4))
def test_any_table_survives_the_trip_through_toml(table: dict[str, object]) -> None:
    assert tomllib.loads(to_toml(table)) == table


def test_toml_is_laid_out_as_a_person_would() -> None:
    table = {
        "a": {"inner": {"y": 1.0}, "x": [1, 2]},
        "top": True,
        "only": {"inner": {"z": "é\n"}, "empty": {}},
        "list": [{"k": 1, "sub": {"m": 2}}, {}],
        "odd key": {"x": [{"n": 1}, 2]},
    }
    assert to_toml(table) == (
        'top = true\n\n[a]\nx = [1, 2]\n\n[a.inner]\ny = 1.0\n\n[only.inner]\nz = "é\\n"\n\n[only.empty]\n\n'
        '[[list]]\nk = 1\n\n[list.sub]\nm = 2\n\n[[list]]\n\n["odd key"]\nx = [{n = 1}, 2]\n'
    )
    with pytest.raises(ValueError, match=r"a\.b is None, which TOML cannot say"):
        to_toml({"a": {"b": None}})


@dataclass(frozen=True)
class Clipped:
    clip: float | None = 1.0
    extra: Mapping[str, object] = field(default_factory=dict)


def test_a_table_is_plain() -> None:
    table = as_table(Recipe(Training(1, resume=Path("a/b"), conditions={"when": time(1), "at": (1,)}), None))
    assert table["training"]["resume"] == "a/b"
    assert table["training"]["nfe"] == [1, 2]
    assert table["training"]["conditions"] == {"when": time(1), "at": [1]}
    assert {"note", "computed"}.isdisjoint(table)
    assert "clip" not in table["training"]


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (Clipped(None), r"Clipped\.clip is None"),  # left out, it would come back as 1.0
        (Clipped(extra={"a": [None]}), r"extra\.a\[0\] is None"),
        (Clipped(extra={"a": {1, 2}}), r"extra\.a is \{1, 2\}"),
        ({"a": 1}, "dataclass instance"),
        (Clipped, "dataclass instance"),
    ],
)
def test_what_a_table_cannot_hold_is_refused(section: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        as_table(section)


@given(st.dictionaries(names, values, max_size=4))
def test_a_hash_does_not_see_the_order_of_keys(table: dict[str, object]) -> None:
    def reordered(value: object) -> object:
        if isinstance(value, dict):
            return {key: reordered(value[key]) for key in reversed(value)}
        return [reordered(entry) for entry in value] if isinstance(value, list) else value

    turned = {key: reordered(table[key]) for key in reversed(table)}
    assert section_hash(table) == section_hash(turned)


def test_a_hash_tells_sections_apart() -> None:
    tables: list[tuple[dict[str, object], ...]] = [
        (),
        ({},),
        ({}, {}),
        ({"a": 1},),
        ({"a": True},),
        ({"a": "1"},),
        ({"a": 1.5},),
        ({"a": [1, 2]},),
        ({"a": [2, 1]},),
        ({"a": {"b": 1}},),
        ({"a": {}, "b": 1},),
        ({"a": 1}, {"b": 1}),
        ({"a": 1, "b": 1},),
        ({"a": datetime(2025, 1, 2)},),
    ]
    hashes = [section_hash(*each) for each in tables]
    assert len(set(hashes)) == len(tables)
    assert all(re.fullmatch("[0-9a-f]{16}", each) for each in hashes)
    assert section_hash({"a": 1.0, "b": (1, 2)}) == section_hash({"b": [1, 2], "a": 1})
    assert section_hash({"a": 1}) == "b713f6d2a989e907"  # in every version: checkpoints hold it
    with pytest.raises(ValueError, match="plain"):
        section_hash({"a": None})
