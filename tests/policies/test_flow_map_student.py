"""A flow map as a student: one straight jump from noise, its strength of guidance, and what it refuses."""

import pytest
import torch
from mixtures import randn, random
from torch import Tensor

from pitools import sample
from pitools.policies import FlowMapStudent, NetworkFlowMap
from pitools.types import PIXELWISE, Conditions

NOISE = randn(random(0), 3, 2, 4, 4)


def network(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
    """Something of everything that it is told."""
    strength = conditions.get("guidance", torch.zeros(len(x)))
    return x.sin() + (conditions["delta"] + 10 * t + 100 * strength)[:, None, None, None]


def test_the_network_is_asked_at_noise_and_told_how_far() -> None:
    delta = torch.tensor([0.0, 0.3, 1.0]).double()
    mean = NetworkFlowMap(network)(NOISE, delta)
    torch.testing.assert_close(mean, NOISE.sin() + delta[:, None, None, None] + 10)
    halved = NetworkFlowMap(lambda x, t, conditions: x.bfloat16())(NOISE, delta)
    assert halved.dtype == torch.float32


@pytest.mark.parametrize(("own", "given", "used"), [(None, None, 0), (1.5, None, 1.5), (1.5, 2, 2), (1.5, "each", 3)])
def test_sampling_is_one_jump_with_the_strength_that_was_asked_for(
    own: float | None, given: float | str | None, used: float
) -> None:
    student = FlowMapStudent(NetworkFlowMap(network), PIXELWISE, own)
    asked = torch.full((3,), 3.0).double() if given == "each" else given
    conditions = None if asked is None else {"guidance": asked}
    end = sample(student, NOISE, conditions=conditions)
    torch.testing.assert_close(end, NOISE - NOISE.sin() - 1 - 10 - 100 * used)


def test_it_starts_from_noise_alone() -> None:
    student = FlowMapStudent(NetworkFlowMap(network), PIXELWISE)
    with pytest.raises(ValueError, match=r"starts at t = 1 .* asked at 0\.5"):
        sample(student, NOISE, nfe=2)
