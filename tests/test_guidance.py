"""Teachers: the CFG formula, where it acts and what it costs, embedded guidance, and no graph."""

import math

import pytest
import torch
from mixtures import randn, random
from torch import Tensor, nn

from pitools.guidance import AnyStrength, Guidance, Teacher, frozen
from pitools.types import Conditions


class Network(nn.Module):
    """u = weight x + t + (a label's shift) + (the mean of a prompt); it remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.asked: list[tuple[Tensor, Tensor, Conditions | None]] = []

    def forward(self, x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        self.asked.append((x_t, t, conditions))
        u = self.weight * x_t + t[:, None]
        given = conditions or {}
        if "label" in given:
            u = u + 10.0 * given["label"][:, None]
        if "prompt" in given:
            u = u + given["prompt"].mean((1, 2))[:, None]
        return u


X = randn(random(0), 6, 3)
T = torch.linspace(0.1, 1.0, 6).double()
LABELS = torch.tensor([1, 2, 3, 4, 5, 6])


def plain(x: Tensor, t: Tensor, label: Tensor | float) -> Tensor:
    return 0.7 * x + t[:, None] + 10.0 * torch.as_tensor(label, dtype=torch.float64).reshape(-1, 1)


def test_guidance_is_the_formula_inside_its_interval_and_off_outside() -> None:
    network = Network()
    teacher = Teacher(network, Guidance(2.5, 0.2, 0.7), {"label": 9})
    u = teacher.velocity(X, T, {"label": LABELS})
    conditional, unconditional = plain(X, T, LABELS), plain(X, T, 9.0)
    inside = (T >= 0.2) & (T <= 0.7)
    assert inside.sum() == 3
    expected = torch.where(inside[:, None], unconditional + 2.5 * (conditional - unconditional), conditional)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-12)
    # The unconditional call covers the rows of the interval alone.
    (_, _, first), (x_null, t_null, second) = network.asked
    assert first is not None
    assert second is not None
    assert torch.equal(x_null, X[inside])
    assert torch.equal(t_null, T[inside])
    assert torch.equal(first["label"], LABELS)
    assert second["label"].tolist() == [9, 9, 9]
    assert second["label"].dtype == LABELS.dtype


def test_nothing_more_is_asked_where_guidance_does_not_act() -> None:
    for guidance, t in ((Guidance(2.5, 0.2, 0.7), 0.9), (Guidance(2.5, 0.2, 0.7), 0.1), (Guidance(1.0), 0.5)):
        network = Network()
        u = Teacher(network, guidance, {"label": 9}).velocity(X, t, {"label": LABELS})
        assert len(network.asked) == 1
        torch.testing.assert_close(u, plain(X, torch.full((6,), t).double(), LABELS), rtol=0, atol=1e-7)


def test_both_ends_belong_to_the_interval_in_any_dtype() -> None:
    for dtype in (torch.float32, torch.float64):
        for t in (0.2, 0.6):
            network = Network()
            Teacher(network, Guidance(2.0, 0.2, 0.6), {"label": 9}).velocity(X.to(dtype), t, {"label": LABELS})
            assert len(network.asked) == 2


@pytest.mark.parametrize("t", [0.5, torch.tensor(0.5), torch.full((6,), 0.5)])
def test_a_time_may_be_a_number_or_one_for_each_sample(t: float | Tensor) -> None:
    network = Network()
    u = Teacher(network).velocity(X, t, {"label": LABELS})
    torch.testing.assert_close(u, plain(X, torch.full((6,), 0.5).double(), LABELS), rtol=0, atol=1e-12)
    assert network.asked[0][1].shape == (6,)
    with pytest.raises(ValueError, match="t must lie in"):
        Teacher(network).velocity(X, 0.0)


@pytest.mark.parametrize("null", [torch.ones(2, 4), torch.ones(1, 2, 4), torch.ones(6, 2, 4), torch.ones(1, 7, 4)])
def test_null_tensors_are_spread_over_the_batch(null: Tensor) -> None:
    network = Network()
    prompt = randn(random(1), 6, 2, 4)
    conditions = {
        "prompt": prompt,
        "label": LABELS,
        "sizes": [1, 2, 3, 4, 5, 6],
        "scale": 3.0,
        "pair": (1, 2, 3, 4, 5, 6),
    }
    teacher = Teacher(network, Guidance(3.0, 0.0, 0.5), {"prompt": null})
    u = teacher.velocity(X, T, conditions)
    inside = T <= 0.5
    second = network.asked[1][2]
    assert second is not None
    assert second["prompt"].shape == (3, *null.shape[-2:])
    assert second["prompt"].dtype == prompt.dtype
    assert second["sizes"] == [1, 2, 3]
    assert (second["scale"], second["pair"]) == (3.0, (1, 2, 3, 4, 5, 6))
    assert torch.equal(second["label"], LABELS[inside])  # what is not nulled stays
    conditional = plain(X, T, LABELS) + prompt.mean((1, 2))[:, None]
    unconditional = plain(X, T, LABELS) + 1
    expected = torch.where(inside[:, None], unconditional + 3 * (conditional - unconditional), conditional)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-12)


def test_null_conditions_may_be_new_or_none() -> None:
    network = Network()
    Teacher(network, Guidance(2.0), {"label": torch.tensor([9]), "pooled": None}).velocity(X, T, {"pooled": X})
    second = network.asked[1][2]
    assert second is not None
    assert second["label"].tolist() == [9] * 6
    assert second["pooled"] is None


def test_null_conditions_that_do_not_fit_are_refused() -> None:
    for null, message in (({"label": 9}, "label = 9 fills"), ({"label": torch.zeros(4)}, "label must be one sample")):
        with pytest.raises(ValueError, match=message):
            Teacher(Network(), Guidance(2.0), null).velocity(X, T)


def test_a_strength_for_each_sample_is_the_formula_and_stays_out_of_the_network() -> None:
    network = Network()
    teacher = AnyStrength(Teacher(network, Guidance(7.0, 0.0, 0.7), {"label": 9}))
    strengths = torch.tensor([1.0, 2.0, 0.5, 0.0, 2.0, 3.0]).double()
    u = teacher.velocity(X, T, {"label": LABELS, "guidance": strengths})
    conditional, unconditional = plain(X, T, LABELS), plain(X, T, 9.0)
    guided = unconditional + strengths[:, None] * (conditional - unconditional)
    torch.testing.assert_close(u, torch.where((T <= 0.7)[:, None], guided, conditional), rtol=0, atol=1e-12)
    assert all("guidance" not in (asked[2] or {}) for asked in network.asked)
    # Where a strength is 1 there is nothing to ask: rows 1 to 3 alone.
    assert torch.equal(network.asked[1][0], X[1:4])


def test_strengths_that_cannot_be_are_refused() -> None:
    teacher = AnyStrength(Teacher(Network(), null_conditions={"label": 9}))
    for given in (None, {"guidance": 2.0}, {"guidance": torch.ones(5)}, {"guidance": torch.ones(6, 1)}):
        with pytest.raises(ValueError, match="one strength for each of 6 samples"):
            teacher.velocity(X, T, given)
    with pytest.raises(ValueError, match="needs null_conditions"):
        AnyStrength(Teacher(Network()))
    with pytest.raises(ValueError, match="embeds its guidance"):
        AnyStrength(Teacher(Network(), Guidance(embedded=3.5), {"label": 9}))


def test_embedded_guidance_is_one_more_condition_and_no_second_call() -> None:
    network = Network()
    u = Teacher(network, Guidance(embedded=3.5)).velocity(X, T, {"label": LABELS})
    torch.testing.assert_close(u, plain(X, T, LABELS), rtol=0, atol=1e-12)
    ((_, _, conditions),) = network.asked
    assert conditions is not None
    assert conditions["guidance"].tolist() == [3.5] * 6
    assert set(conditions) == {"label", "guidance"}
    Teacher(network, Guidance(embedded=3.5)).velocity(X, T)
    assert set(network.asked[-1][2] or ()) == {"guidance"}


def test_a_teacher_never_trains_and_never_keeps_a_graph() -> None:
    network = Network()
    for guidance in (Guidance(), Guidance(2.0)):
        u = Teacher(network, guidance, {"label": 9}).velocity(X.clone().requires_grad_(), T, {"label": LABELS})
        assert network.weight.requires_grad  # whatever the parameters say
        assert not u.requires_grad
        assert torch.is_grad_enabled()
    assert frozen(network) is network
    assert not network.training
    assert not network.weight.requires_grad


def test_answers_are_float32_or_better_and_of_the_latents_shape() -> None:
    def half(x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        return x_t.bfloat16() if conditions is None or conditions["label"][0] == 1 else 0 * x_t.bfloat16()

    coarse = X.bfloat16()
    assert Teacher(half).velocity(coarse, T).dtype == torch.float32
    u = Teacher(half, Guidance(1.3), {"label": 0}).velocity(coarse, T, {"label": torch.ones(6)})
    torch.testing.assert_close(u, 1.3 * coarse.float(), rtol=1e-6, atol=0)  # guided in float32, not in bfloat16
    with pytest.raises(ValueError, match=r"network answered \(1, 3\) for latents \(6, 3\)"):
        Teacher(lambda x_t, t, conditions: x_t[:1]).velocity(X, T)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": -1.0}, "scale must be a number that is not negative, got -1.0"),
        ({"scale": math.nan}, "scale"),
        ({"embedded": math.inf}, "embedded"),
        ({"low": 0.6, "high": 0.5}, "low <= high <= 1, got 0.6 and 0.5"),
        ({"high": 1.5}, "high"),
        ({"low": -0.5}, "low"),
        ({"scale": 2.0, "embedded": 3.5}, "embedded 3.5 and scale 2.0 exclude each other"),
    ],
)
def test_bad_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**values)


def test_guidance_without_null_conditions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale 2.0 needs null_conditions"):
        Teacher(Network(), Guidance(2.0))
