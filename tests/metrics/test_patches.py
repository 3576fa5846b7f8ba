"""Crops of images whose pixels say where they are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixtures import random

from pitools.metrics import patches


def images(batch: int, height: int, width: int) -> torch.Tensor:
    """`[B, 3, H, W]`: each pixel its image, its row and its column."""
    grid = torch.meshgrid(torch.arange(batch), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(grid, dim=1)


@given(st.integers(1, 9), st.integers(0, 5), st.integers(0, 5), st.integers(1, 3), st.integers(1, 4))
def test_a_crop_is_a_square_of_one_image(size: int, below: int, beside: int, batch: int, count: int) -> None:
    whole = images(batch, size + below, size + beside)
    middle = patches(whole, size)
    assert middle.equal(whole[:, :, below // 2 : below // 2 + size, beside // 2 : beside // 2 + size])
    crops = patches(whole, size, count, random(size))
    assert crops.shape == (batch * count, 3, size, size)
    assert crops.dtype == whole.dtype
    for i, crop in enumerate(crops):
        image, top, left = crop[:, 0, 0].tolist()
        assert image == i // count
        assert crop.equal(whole[image, :, top : top + size, left : left + size])
    assert crops.equal(patches(whole, size, count, random(size)))


def test_random_crops_lie_anywhere_and_apart() -> None:
    crops = patches(images(2, 5, 4), 3, 3000, random(0))[:, :, 0, 0]
    places, counts = crops.unique(dim=0, return_counts=True)
    assert len(places) == 2 * 3 * 2  # every image, row and column
    assert float((counts - 500).abs().max()) < 5 * (500 * 5 / 6) ** 0.5


def test_what_cannot_be_cropped_is_refused() -> None:
    whole = images(2, 5, 4)
    with pytest.raises(ValueError, match=r"images must be \[B, C, H, W\], got \(3, 5, 4\)"):
        patches(whole[0], 2)
    for size in (0, 5):
        with pytest.raises(ValueError, match=rf"size must lie in 1\.\.4 for images of 5 x 4, got {size}"):
            patches(whole, size)
    with pytest.raises(ValueError, match="count must be at least 1"):
        patches(whole, 2, 0)
