"""FreeFlow's two jobs: which teacher each objective asks, what is drawn for whom, and at which rates they learn."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from mixtures import randn, random
from rich.console import Console
from torch import Tensor, nn

from pitools.guidance import Guidance, Teacher
from pitools.objectives import FreeFlow, Prediction
from pitools.training.engine import Engine, EngineSection
from pitools.training.jobs import Auxiliary, AuxiliaryTraining, FlowMapDistillation
from pitools.training.loop import Training, train
from pitools.training.optimiser import Optimiser
from pitools.types import Conditions

CLASSES = 5
X = randn(random(0), 4, 3).float()
T = torch.tensor([0.1, 0.3, 0.5, 0.9])
LABELS = torch.tensor([0, 1, 2, 3])


def by_label(x: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
    """A teacher's network whose answer is its label, 5 for none."""
    return (conditions or {})["class_labels"][:, None].expand(x.shape).float()


TEACHER = Teacher(by_label, Guidance(3.0, 0.2, 0.8), {"class_labels": CLASSES})


@dataclass
class Ask:
    """An affine network that notes what it was asked."""

    network: nn.Module = field(default_factory=lambda: nn.Linear(3, 3))
    seen: list[tuple[Tensor, Tensor, Conditions]] = field(default_factory=list)

    def __call__(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        self.seen.append((x.detach().clone(), t.clone(), dict(conditions)))
        return self.network(x)  # type: ignore[no-any-return]


def job(objective: FreeFlow, section: Auxiliary | None = None) -> FlowMapDistillation:
    student, other = nn.Linear(3, 3), nn.Linear(3, 3)
    auxiliary = AuxiliaryTraining(other, section or Auxiliary(), objective, CLASSES, Ask(student))
    return FlowMapDistillation(student, auxiliary, TEACHER, objective, CLASSES, Ask(other), lambda values: values)


def guided(scale: Tensor | float, inside: list[bool]) -> Tensor:
    """By hand: 5 + s (label - 5) inside, the label elsewhere."""
    scales = torch.as_tensor(scale, dtype=torch.float32).expand(4)
    value = torch.where(torch.tensor(inside), 5 + scales * (LABELS - 5), LABELS.float())
    return value[:, None].expand(4, 3)


def test_guidance_acts_in_the_correction_up_to_its_own_time_and_in_the_prediction_where_the_teacher_says() -> None:
    predictor, corrector = job(FreeFlow(guided_until=0.4)).teachers
    conditions = {"class_labels": LABELS}
    torch.testing.assert_close(predictor.velocity(X, T, conditions), guided(3.0, [False, True, True, False]))
    torch.testing.assert_close(corrector.velocity(X, T, conditions), guided(3.0, [False, True, False, False]))
    one, other = job(FreeFlow()).teachers
    assert one is other


def test_each_sample_has_the_strength_that_was_drawn_for_it() -> None:
    strengths = torch.tensor([1.5, 1.2, 2.0, 1.7])
    predictor, corrector = job(FreeFlow(guidance=(1.0, 2.0), guided_until=0.6)).teachers
    conditions = {"class_labels": LABELS, "guidance": strengths}
    torch.testing.assert_close(predictor.velocity(X, T, conditions), guided(strengths, [False, True, True, False]))
    torch.testing.assert_close(corrector.velocity(X, T, conditions), guided(strengths, [False, True, True, False]))
    shorter = job(FreeFlow(guidance=(1.0, 2.0), guided_until=0.4)).teachers[1]
    torch.testing.assert_close(shorter.velocity(X, T, conditions), guided(strengths, [False, True, False, False]))


@dataclass(frozen=True)
class Shape:
    """Data of which nothing but the shape may be asked."""

    shape: tuple[int, ...] = (3,)


OBJECTIVE = FreeFlow(
    Prediction(steps=4, warmup=0), delay=0, correction_warmup=0, guidance=(1.0, 2.0), guided_until=0.4, share=0.5
)
RATES = 0.01, 0.03


def trained(folder: Path, updates: int = 2) -> tuple[FlowMapDistillation, list[Tensor]]:
    """One step, and by how much each network's bias moved."""
    still = Optimiser(learning_rate=RATES[0], warmup_steps=0, clip=0.0)
    own = job(OBJECTIVE, Auxiliary(updates=updates, optimiser=replace(still, learning_rate=RATES[1])))
    assert own.auxiliary is not None
    networks: list[nn.Linear] = [own.network, own.auxiliary.network]  # type: ignore[list-item]
    before = [network.bias.detach().clone() for network in networks]
    spied = [Spied(network) for network in networks]
    own = replace(own, network=spied[0], auxiliary=replace(own.auxiliary, network=spied[1]))
    engine = Engine(EngineSection(device="cpu", tensorboard=False))
    section = Training(steps=1, batch=8, optimiser=still)
    train(own, section, Shape(), engine, seed=0, folder=folder, name="map", console=Console(quiet=True))  # type: ignore[arg-type]
    return own, [network.bias.detach() - start for network, start in zip(networks, before, strict=True)]


class Spied(nn.Module):
    """A network that takes conditions, and notes what it was asked while it learns."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[Tensor, Tensor, Conditions]] = []

    def forward(self, x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        if torch.is_grad_enabled():
            self.seen.append((x.detach().clone(), t.clone(), dict(conditions)))
        return self.inner(x)  # type: ignore[no-any-return]


def test_each_network_learns_at_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is as long as its rate."""
    _, moved = trained(tmp_path, updates=1)
    for change, rate in zip(moved, RATES, strict=True):
        torch.testing.assert_close(change.abs(), torch.full((3,), rate), rtol=1e-3, atol=0)


def test_what_is_drawn_is_drawn_anew_for_each_update(tmp_path: Path) -> None:
    own, _ = trained(tmp_path)
    assert own.auxiliary is not None
    student, other = own.network, own.auxiliary.network
    assert isinstance(student, Spied)
    assert isinstance(other, Spied)
    asked = own.auxiliary.ask_student
    assert isinstance(asked, Ask)
    predicting, correcting = student.seen
    # Of the auxiliary's two updates, and of the correction.
    noises = [
        asked.seen[0][0],
        asked.seen[1][0],
        correcting[0],
    ]
    assert [len(noise) for noise in noises] == [4, 4, 4]
    strengths = [asked.seen[0][2]["guidance"], asked.seen[1][2]["guidance"], correcting[2]["guidance"]]
    for values in (noises, strengths):
        for i in range(3):
            for j in range(i):
                assert not bool((values[i] == values[j]).any())
    assert not bool((predicting[0][:, None] == correcting[0]).any())
    # The student is asked at t = 1 and told how far; the correction is of its samples.
    for _, t, conditions in student.seen:
        assert bool((t == 1).all())
        assert set(conditions) == {"class_labels", "guidance", "delta"}
        assert 0 <= int(conditions["class_labels"].min()) <= int(conditions["class_labels"].max()) < CLASSES
    assert bool((correcting[2]["delta"] == 1).all())
    assert bool((predicting[2]["delta"] * 4 % 1 == 0).all())
    for _, r, conditions in other.seen:
        assert bool(((r > 0) & (r < 1)).all())
        assert set(conditions) == {"class_labels", "guidance"}


def test_a_strength_that_acts_nowhere_in_the_correction_is_told() -> None:
    from recipes import flow_map

    from pitools.training.config import RecipeError
    from pitools.training.recipe import plan

    with pytest.raises(RecipeError, match=r"guided_until 0.3 and \[teacher.guidance\] low 0.5 leave no t"):
        plan(flow_map(**{"teacher.guidance.low": 0.5, "flow_maps.freeflow.objective.guided_until": 0.3}), "recipe")
