"""Factorisations and schedules."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import randn, random

from pitools import Factorisation, Schedule
from pitools.types import ELEMENTWISE, PIXELWISE, POINTS, patchwise

SHAPES = {
    POINTS: ((3, 2), (3, 1, 2)),
    PIXELWISE: ((3, 4, 6, 2), (3, 12, 4)),
    ELEMENTWISE: ((3, 4, 6, 2), (3, 48, 1)),
    patchwise(2): ((3, 4, 6, 2), (3, 3, 16)),
    Factorisation("b c t h w -> b (t h w) c"): ((2, 3, 4, 5, 6), (2, 120, 3)),
    Factorisation("b c h w -> b 1 (c h w)"): ((2, 1, 4, 4), (2, 1, 16)),
}


@pytest.mark.parametrize("factorisation", SHAPES, ids=lambda f: f.pattern)
def test_packing_round_trips(factorisation: Factorisation) -> None:
    shape, packed_shape = SHAPES[factorisation]
    latents = randn(random(0), *shape)
    packed = factorisation.pack(latents)
    assert packed.shape == packed_shape
    assert torch.equal(factorisation.unpack(packed, latents.shape), latents)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_patches_hold_their_own_pixels(channels: int, height: int, width: int) -> None:
    latents = randn(random(0), 1, channels, 2 * height, 2 * width)
    packed = patchwise(2).pack(latents)
    assert torch.equal(packed[0, 0], latents[0, :, :2, :2].flatten())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        PIXELWISE.pack(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="do not fit"):
        patchwise(2).pack(torch.zeros(1, 1, 5, 4))
    with pytest.raises(ValueError, match=r"\[B, L, C\]"):
        Factorisation("b c h w -> b (c h w)").pack(torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="does not unpack"):
        PIXELWISE.unpack(torch.zeros(2, 12, 3), (2, 3, 4, 4))


def test_schedule() -> None:
    assert Schedule(nfe=4).segment == 0.25
    assert Schedule(nfe=4, final_step_scale=0.5).segment == pytest.approx(1 / 3.5)
    for bad in ({"nfe": 0}, {"shift": 0.0}, {"final_step_scale": -1.0}, {"temperature": 0.0}, {"temperature": "hot"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Schedule(**bad)
