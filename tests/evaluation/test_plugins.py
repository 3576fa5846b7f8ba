"""Extractors and scorers by name: installed ones, and anybody's functions."""

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pitools.evaluation import load_extractor, load_scorer

TASTE = """
from statistics import mean

def score(images, asked):
    return [mean(image.convert("L").tobytes()) for image in images]

limit = 3
"""


@pytest.fixture
def taste(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, which is not among Python's paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    Path("taste_of_test.py").write_text(TASTE)
    Path("broken_of_test.py").write_text("import nowhere_at_all\n")
    Path("wrong_of_test.py").write_text("def score(:\n")
    monkeypatch.delitem(sys.modules, "taste_of_test", raising=False)
    return "taste_of_test"


def test_a_scorer_is_found_in_the_current_folder(taste: str) -> None:
    scorer = load_scorer(f"{taste}:score")
    scores = scorer([Image.new("RGB", (4, 4), colour) for colour in ("black", "white")], ["a", "b"])
    assert list(scores) == [0, 255]
    assert load_scorer("torch.nn.functional:relu") is torch.nn.functional.relu


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taste_of_test", r"a scorer is named as \"MODULE:FUNCTION\", got 'taste_of_test'; installed ones: .*\bclip\b"),
        (":score", "a scorer is named as"),
        ("taste_of_test:", "a scorer is named as"),
        ("nowhere_of_test:score", "module 'nowhere_of_test' cannot be imported: No module named 'nowhere_of_test'"),
        ("broken_of_test:score", "module 'broken_of_test' cannot be imported: No module named 'nowhere_at_all'"),
        ("wrong_of_test:score", "module 'wrong_of_test' cannot be imported: invalid syntax"),
        ("taste_of_test:scores", "module 'taste_of_test' has no function 'scores'"),
        ("taste_of_test:limit", "module 'taste_of_test' has no function 'limit', but a value of type int"),
    ],
)
def test_a_scorer_that_cannot_be_had_is_refused(name: str, message: str, taste: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_scorer(name)


def make_recorder(argument: str, device: torch.device) -> Callable[..., Any]:
    """What an entry point would name."""
    return lambda images, asked: [argument, str(device)]


def lacking(argument: str, device: torch.device) -> Callable[..., Any]:
    """One that only its own package could load."""
    raise AssertionError


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package's scorers."""
    group = "pitools.scorers"
    entries = [
        EntryPoint("recorder", "test_plugins:make_recorder", group),
        EntryPoint("lacking", "nowhere_of_test:make", group),
    ]
    monkeypatch.setattr("pitools.evaluation.plugins.entry_points", lambda group: entries)


def test_an_installed_one_is_made_of_its_argument_and_the_device(installed: None) -> None:
    assert load_scorer("recorder", "cpu")([], []) == ["", "cpu"]
    # What follows the first colon is one argument, whatever is in it.
    assert load_scorer("recorder:org/model:v2", torch.device("meta"))([], []) == ["org/model:v2", "meta"]


def test_an_installed_one_without_what_it_needs_says_what_to_install(installed: None) -> None:
    with pytest.raises(
        ImportError, match=r"scorer lacking needs more \(No module named 'nowhere_of_test'\).*pip install"
    ):
        load_scorer("lacking:model")


def test_the_shipped_ones_are_installed() -> None:
    with pytest.raises(ValueError, match=r"a feature extractor is named as .*installed ones: digits, inception"):
        load_extractor("clip")
    with pytest.raises(ValueError, match="clip needs a model, a folder or a hub id"):
        load_scorer("clip")
