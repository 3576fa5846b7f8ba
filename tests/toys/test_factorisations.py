"""`pitools factorisations`: static policies against teachers that are known, and the command on tiny recipes."""

import json
import math
import os
import signal
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from mixtures import randn, random
from torch import Tensor
from training.recipes import tiny, write
from typer.testing import CliRunner

from pitools import GaussianMixture
from pitools.cli import app
from pitools.policies import Outputs, StaticNetwork
from pitools.training import DivergenceError
from pitools.types import ELEMENTWISE, PIXELWISE, Conditions, Time
from toys.factorisations import Static, Study, Task, compared, curve, factorisations, fit, measure, start

SHAPE = (2, 4, 4)


@dataclass(frozen=True)
class Exact:
    """The flow model of a mixture over whole latents."""

    prior: GaussianMixture

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        return self.prior.velocity(x_t.flatten(1), t).reshape(x_t.shape)


def task(samples: int = 2, shift: float = 1.0) -> Task:
    """Three latents, each a component, and noises in float64; more noises begin with the fewer ones."""
    g = random(0)
    means = randn(g, 3, math.prod(SHAPE))
    teacher = Exact(GaussianMixture(means, torch.zeros(3).double(), 0.04))
    return Task(teacher, randn(g, 4, *SHAPE)[:samples], {}, steps=16, shift=shift)


STUDY = Study(steps=40, samples=2, components=6, learning_rate=0.1)


def fitted(of: Task, study: Study = STUDY) -> list[Static]:
    statics = start(of, study.components)
    losses = list(fit(statics, study))
    assert len(losses) == study.steps
    assert all(len(step) == len(statics) for step in losses)
    return statics


def test_the_factorisations_are_those_of_figure_11() -> None:
    x = randn(random(0), 2, 16, 4, 6)
    packed = {name: each.pack(x) for name, each in factorisations(x.shape[1:]).items()}
    assert {name: tuple(each.shape[1:]) for name, each in packed.items()} == {
        "pixel-wise": (24, 16), "patch-wise": (6, 64), "element-wise": (384, 1),
    }  # fmt: skip
    patch = packed["patch-wise"][0, 4]  # the second row of patches, its second column
    assert torch.equal(patch.sort().values, x[0, :, 2:4, 2:4].flatten().sort().values)


def test_with_one_channel_a_pixel_is_an_element_and_larger_parts_stand_beside() -> None:
    x = randn(random(0), 2, 1, 4, 6)
    found = factorisations(x.shape[1:])
    assert list(found) == ["pixel-wise = element-wise", "patch-wise", "row-wise", "whole"]
    assert torch.equal(PIXELWISE.pack(x), ELEMENTWISE.pack(x))
    assert [tuple(each.pack(x).shape[1:]) for each in found.values()] == [(24, 1), (6, 4), (4, 6), (1, 24)]
    assert torch.equal(found["row-wise"].pack(x)[1, 2], x[1, 0, 2])


@pytest.mark.parametrize("shape", [(2,), (4, 3, 8), (4, 8, 3), (16, 5, 8, 8)])
def test_latents_that_cannot_be_compared_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[C, H, W\]|2 x 2"):
        factorisations(shape)


def test_all_start_as_the_same_latents_and_near_the_teacher() -> None:
    of = task()
    u = of.teacher.velocity(of.noise, 1.0)
    starts = []
    for static in start(of, 5):
        means = static.network.velocities.detach()
        starts.append(torch.stack([static.student.factorisation.unpack(m, u.shape) for m in means.unbind(2)]))
        assert (static.network.factor == 0).all()
    assert all(torch.equal(each, starts[0]) for each in starts)
    apart = starts[0] - u
    assert float(apart.std()) == pytest.approx(0.5, rel=0.15)
    assert not torch.equal(apart[0], apart[1])


@pytest.mark.parametrize("shift", [1.0, pytest.param(3.2, marks=pytest.mark.slow)])
def test_every_factorisation_is_fitted(shift: float) -> None:
    of = task(shift=shift)
    end, before = of.end(), start(of, STUDY.components)
    for first, static in zip(before, fitted(of), strict=True):
        untrained, trained = measure(first, first.end(), end), measure(static, static.end(), end)
        assert trained["loss"] < untrained["loss"] / 5, static.name
        assert trained["rmse"] < untrained["rmse"] / 2, static.name
        for key in ("loss", "rmse", "contrast", "texture"):
            assert trained[key] == pytest.approx(sum(trained["each"][key]) / 2, rel=1e-5)


def test_a_policy_that_is_the_teacher_has_no_loss() -> None:
    """Where each pixel is a mixture of its own, the pixel-wise policy at its velocities is the teacher."""
    of, g = task(), random(1)
    means, weights = randn(g, 16, 3, 2), randn(g, 16, 3)
    pixels = GaussianMixture(means.expand(2, -1, -1, -1), weights.expand(2, -1, -1), 0.09)

    class Pixelwise:
        def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
            return PIXELWISE.unpack(pixels.velocity(PIXELWISE.pack(x_t), t), x_t.shape)

    of = replace(of, teacher=Pixelwise())
    static = start(of, 3)[0]
    with torch.no_grad():
        static.network.velocities.copy_(PIXELWISE.pack(of.noise).unsqueeze(2) - pixels.means)
        static.network.factor.copy_(pixels.log_weights)
        static.network.sample.fill_(math.log(0.3))
    row = measure(static, static.end(), of.end())
    assert row["loss"] < 1e-20
    assert row["rmse"] < 1e-6
    assert row["contrast"] == row["texture"] == 1


def test_a_noise_does_not_feel_the_others() -> None:
    study = replace(STUDY, steps=5)
    for two, one in zip(fitted(task(2), study), fitted(task(1), study), strict=True):
        for ours, alone in zip(two.network.parameters(), one.network.parameters(), strict=True):
            torch.testing.assert_close(ours[:1], alone, rtol=1e-6, atol=1e-8)


def test_contrast_and_texture_are_ratios_to_the_teacher() -> None:
    teacher = randn(random(0), 3, 2, 4, 6)
    same = compared(teacher, teacher)
    assert same == {"rmse": [0.0] * 3, "contrast": [1.0] * 3, "texture": [1.0] * 3}
    twice = compared(2 * teacher + 5, teacher)
    assert twice["contrast"] == twice["texture"] == [2.0] * 3
    # A ramp and a chequerboard of as much contrast: neighbours on the ramp are closer.
    ramp = torch.linspace(-1, 1, 4).double().expand(1, 1, 4, 4)
    board = ramp.std(correction=0) * torch.tensor([[1.0, -1, 1, -1], [-1, 1, -1, 1]] * 2).double().reshape(1, 1, 4, 4)
    rough = compared(board, ramp)
    assert rough["contrast"] == [1.0]
    assert rough["texture"][0] == pytest.approx(2 * math.sqrt(2) * float(ramp.std(correction=0)) / (2 / 3), rel=1e-5)
    assert rough["rmse"][0] == pytest.approx(float((board - ramp).square().mean().sqrt()), rel=1e-5)


def test_a_curve_has_the_mean_of_its_losses() -> None:
    losses = randn(random(0), 250).tolist()
    points = curve(losses)
    assert len(points) <= 100
    assert points[-1][0] == 250
    starts = [0, *(step for step, _ in points[:-1])]
    total = sum(loss * (step - first) for first, (step, loss) in zip(starts, points, strict=True))
    assert total / 250 == pytest.approx(sum(losses) / 250, abs=1e-4)
    assert curve([1.0, 2.0]) == [(1, 1.0), (2, 2.0)]


class Broken:
    """A teacher that answers, but with no number."""

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        return x_t * math.nan


@pytest.mark.parametrize("broken", ["teacher", "rate"])
def test_what_diverges_says_where_and_what_to_do(broken: str) -> None:
    of, study = task(), STUDY
    statics = start(of, 2)
    if broken == "teacher":
        statics = [replace(each, task=replace(of, teacher=Broken())) for each in statics]
    else:
        study = replace(study, learning_rate=1e200)
    with pytest.raises(DivergenceError, match=r"step \d+, pixel-wise: .*; use a lower --learning-rate"):
        list(fit(statics, study))


def test_a_static_network_answers_with_its_parameters_whatever_it_is_asked() -> None:
    outputs = Outputs(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4), torch.randn(2, 1))
    network = StaticNetwork(outputs)
    answer = network(torch.zeros(2, 7), torch.ones(2), {"class_labels": torch.zeros(2)})
    assert all(torch.equal(own, given) for own, given in zip(answer, outputs, strict=True))
    assert all(own.requires_grad for own in answer)
    with pytest.raises(ValueError, match="factor must have 3 dimensions"):
        StaticNetwork(outputs._replace(factor=torch.zeros(2, 3)))


FILES = {"factorisations.json", "losses.png", "samples.png", "recipe.toml"}


def pitools(*arguments: object, code: int = 0) -> Result:
    run = CliRunner().invoke(app, ["factorisations", *map(str, arguments)])
    assert run.exit_code == code, run.output
    assert code == 0 or isinstance(run.exception, SystemExit), run.exception
    return run


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    return str(write(tmp_path / "digits.toml", tiny()))


def test_on_a_trained_teacher(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["digits.toml", "--steps", 3, "--samples", 2, "--components", 3]
    first = pitools(*asked)
    folder = Path("runs/digits-factorisations")
    assert {path.name for path in folder.iterdir()} == FILES
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in ("losses.png", "samples.png"))
    told = json.loads((folder / "factorisations.json").read_text())
    assert (told["steps"], told["samples"], told["components"], told["teacher_steps"]) == (3, 2, 3, 4)
    names = ["pixel-wise = element-wise", "patch-wise", "row-wise", "whole"]
    assert [row["name"] for row in told["factorisations"]] == list(told["losses"]) == names
    assert [(row["factors"], row["channels"]) for row in told["factorisations"]] == [(64, 1), (16, 4), (8, 8), (1, 64)]
    for row in told["factorisations"]:
        assert all(math.isfinite(row[key]) and len(row["each"][key]) == 2 for key in ("loss", "rmse", "texture"))
        assert [step for step, _ in told["losses"][row["name"]]] == [1, 2, 3]
    assert "pixel-wise and element-wise are the same" in first.output
    assert "Fitting: step 3/3" in first.output
    # Again, with Ctrl-C within the second step: nothing is overwritten, the teacher is there, the steps are the same.
    calls, loss = [0], Static.loss

    def interrupted(*arguments: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Static, "loss", interrupted)
        stopped = pitools(*asked, code=130)
    assert "The teacher is runs/teachers/" in stopped.output
    assert "Stopped after 2 of 3 steps" in stopped.output
    assert {path.name for path in Path("runs/digits-factorisations-2").iterdir()} == FILES
    early = json.loads(Path("runs/digits-factorisations-2/factorisations.json").read_text())
    assert early["steps"] == 2
    assert early["losses"] == {name: points[:2] for name, points in told["losses"].items()}


@pytest.mark.parametrize(
    "name",
    ["dit-gm-repa-k32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen", "flux-gm-4nfe", "flux2"))],
)
def test_on_a_model_of_scale(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = pitools(f"scale/{name}.toml", "--tiny", "--samples", 2, "--set", "engine.device=cpu")
    assert "nothing here is a result" in run.output
    folder = Path(f"runs/{name}-tiny-factorisations")
    assert {path.name for path in folder.iterdir()} == FILES
    told = json.loads((folder / "factorisations.json").read_text())
    assert told["steps"] == 4
    assert told["shift"] == (1.0 if "dit" in name else 3.2)
    sizes = {row["name"]: (row["factors"], row["channels"]) for row in told["factorisations"]}
    pixels, channels = sizes["pixel-wise"]
    assert sizes["patch-wise"] == (pixels // 4, channels * 4)
    assert sizes["element-wise"] == (pixels * channels, 1)
    assert all(math.isfinite(row["loss"]) for row in told["factorisations"])


def test_labels_alone_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The students of this recipe would start from images, and the study starts from noise."""
    monkeypatch.chdir(tmp_path)
    backbone = {"name": "dit", "size": 4, "layers": 1, "heads": 2, "head_width": 8, "classes": 10, "weights": "tiny"}
    table = tiny(data={"name": "classes", "classes": 10, "height": 32, "width": 32}, backbone=backbone)
    del table["teacher"]["training"]
    write(tmp_path / "labels.toml", table)
    pitools("labels.toml", "--steps", 1, "--samples", 3, "--components", 2)
    told = json.loads(Path("runs/labels-factorisations/factorisations.json").read_text())
    assert [len(row["each"]["loss"]) for row in told["factorisations"]] == [3, 3, 3]
    assert tomllib.loads(Path("runs/labels-factorisations/recipe.toml").read_text())["data"]["name"] == "classes"


MISTAKES = {
    "no recipe": (["nowhere.toml"], "there is no recipe 'nowhere.toml'"),
    "an unknown key": (["digits.toml", "--set", "training.stesp=3"], "did you mean 'steps'"),
    "no steps": (["digits.toml", "--steps", 0], "steps must be at least 1, got 0"),
    "no samples": (["digits.toml", "--samples", 0], "samples must be at least 1, got 0"),
    "no components": (["digits.toml", "--components", 0], "components must be at least 1, got 0"),
    "no rate": (["digits.toml", "--learning-rate", 0], "learning_rate must be a positive number"),
    "more samples than data": (["digits.toml", "--samples", 2000], "--samples 2000 is more than [data] has, 1438"),
    "a folder in use": (["digits.toml", "--out", "used"], "name another one"),
    "no tiny form": (["digits.toml", "--tiny"], "has no tiny form"),
    "no such GPU": (["digits.toml", "--set", "engine.device=cuda"], "torch sees no GPU"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_clear_error(arguments: list[object], message: str, recipe: str) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    Path("used").mkdir()
    Path("used/thesis.txt").write_text("mine")
    run = pitools(*arguments, code=2)
    assert message in run.output
    assert run.output.count("\n") == 1
    assert {path.name for path in Path().iterdir()} == {"digits.toml", "used"}


def test_help_has_examples() -> None:
    assert "pitools factorisations scale/qwen.toml --tiny" in pitools("--help").output
