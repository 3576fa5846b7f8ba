"""Best-of-N over seeds: which image wins, what a scorer may answer, and scorers by name."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from test_classes import pipe as classes_pipe
from test_pipelines import PROMPTS, pipeline
from torch import Tensor

from scale.best import Search, drawn
from scale.classes import PiDiTPipeline, sample_classes
from scale.pipelines import sample_images

pipe = classes_pipe


def draw(generators: list[torch.Generator]) -> list[Any]:
    """What stands for an image: the seed that it was drawn from."""
    return [generator.initial_seed() for generator in generators]


def search(count: int, *answers: Any) -> Search:
    """Answers to one candidate of all images after the other."""
    given: Iterator[Any] = iter(answers)
    return Search(count, lambda *_: next(given), "taste:score")


def test_without_a_search_each_image_has_the_next_seed() -> None:
    found = drawn(draw, ["a", "b", "c"], 7, None)
    assert [(one.image, one.seed, one.score) for one in found] == [(7, 7, None), (8, 8, None), (9, 9, None)]


def test_each_image_is_the_best_of_its_own_seeds() -> None:
    found = drawn(draw, ["a", "b"], 10, search(3, [0.1, 5], [0.3, 4], [0.2, 5]))
    assert [(one.image, one.seed, one.score) for one in found] == [(11, 11, 0.3), (13, 13, 5.0)]


def test_a_scorer_sees_the_images_and_what_was_asked() -> None:
    seen: list[Any] = []

    def score(images: list[Any], asked: list[Any]) -> list[float]:
        assert not torch.is_grad_enabled()
        seen.append((images, asked))
        return [0.0] * len(images)

    drawn(draw, ["a", "b"], 0, Search(2, score, "taste:score"))
    assert seen == [([0, 2], ["a", "b"]), ([1, 3], ["a", "b"])]


@pytest.mark.parametrize(
    "answer", [(2, 1), torch.tensor([2, 1]), [torch.tensor(2.0), torch.tensor(1.0)], [True, False]], ids=str
)
def test_numbers_of_any_kind_are_scores(answer: Any) -> None:
    first, second = drawn(draw, ["a", "b"], 0, search(2, [1.5, 0.5], answer))
    assert (first.seed, second.seed) == ((1, 3) if answer != [True, False] else (0, 2))


def test_nan_is_no_score() -> None:
    first, second = drawn(draw, ["a", "b"], 0, search(3, [math.nan, 1], [-2, math.nan], [-1, 0]))
    assert (first.seed, second.seed) == (2, 3)
    with pytest.raises(ValueError, match="scorer taste:score answers NaN to all 2 images of 'b'"):
        drawn(draw, ["a", "b"], 0, search(2, [1, math.nan], [math.nan, math.nan]))


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        ([1.0], r"numbers of shape \(1,\)"),
        (3.0, r"numbers of shape \(\)"),
        (torch.zeros(2, 1), r"numbers of shape \(2, 1\)"),
        (None, "None"),
        (["good", "bad"], r"\['good', 'bad'\]"),
        ([[1.0], [1.0, 2.0]], r"\[\[1.0\], \[1.0, 2.0\]\]"),
    ],
)
def test_scores_that_are_none_are_refused(answer: Any, got: str) -> None:
    with pytest.raises(
        ValueError, match=f"scorer taste:score must return a number for each of the 2 images, got {got}"
    ):
        drawn(draw, ["a", "b"], 0, search(2, answer))


def brightness(images: list[Image.Image], asked: list[Any]) -> list[float]:
    return [sum(image.convert("L").tobytes()) for image in images]


def chosen(paths: list[Path], key: str) -> list[dict[str, Any]]:
    """What was written, after a look at each image's score."""
    told = json.loads((paths[0].parent / "samples.json").read_text())
    assert (told["best_of"], told["scorer"]) == (3, "tests:brightness")
    for path, row in zip(paths, told["images"], strict=True):
        assert set(row) == {"file", key, "seed", "score"}
        assert brightness([Image.open(path)], []) == [row["score"]]
    rows: list[dict[str, Any]] = told["images"]
    return rows


def test_the_best_image_of_a_class_is_written(pipe: PiDiTPipeline, tmp_path: Path) -> None:
    paths = sample_classes(
        pipe,
        [1, 4],
        nfe=None,
        seed=7,
        per_label=2,
        renoise=0.0,
        force=False,
        out=tmp_path,
        console=Console(quiet=True),
        search=Search(3, brightness, "tests:brightness"),
    )
    for i, row in enumerate(chosen(paths, "label")):
        seeds = range(7 + 3 * i, 10 + 3 * i)
        label = [1, 1, 4, 4][i]
        images = [pipe([label], generator=[torch.Generator().manual_seed(seed)])[0] for seed in seeds]
        scores = brightness(images, [])
        assert len(set(scores)) == 3
        best = max(range(3), key=scores.__getitem__)
        assert (row["label"], row["seed"]) == (label, seeds[best])
        assert Image.open(paths[i]).tobytes() == images[best].tobytes()


def test_the_best_image_of_a_prompt_is_written(tmp_path: Path) -> None:
    made: Any = pipeline("qwen")
    settings: dict[str, Any] = {
        "nfe": None,
        "height": 32,
        "width": 16,
        "renoise": 0.0,
        "guidance": None,
        "force": False,
        "console": Console(quiet=True),
    }
    found = sample_images(
        made,
        PROMPTS,
        seed=7,
        per_prompt=1,
        out=tmp_path / "best",
        search=Search(3, brightness, "tests:brightness"),
        **settings,
    )
    rows = chosen(found, "prompt")
    for i, prompt in enumerate(PROMPTS):
        each = sample_images(made, [prompt], seed=7 + 3 * i, per_prompt=3, out=tmp_path / f"{i}", **settings)
        scores = brightness([Image.open(path) for path in each], [])
        best = max(range(3), key=scores.__getitem__)
        assert (rows[i]["prompt"], rows[i]["seed"]) == (prompt, 7 + 3 * i + best)


def test_a_score_on_the_graph_is_a_score() -> None:
    weight = torch.ones(2, requires_grad=True)

    def score(images: list[Any], asked: list[Any]) -> Tensor:
        with torch.enable_grad():
            return weight * torch.tensor(images)

    first, second = drawn(draw, ["a", "b"], 0, Search(2, score, "taste:score"))
    assert (first.seed, second.seed) == (1, 3)
    assert (first.score, second.score) == (1.0, 3.0)
