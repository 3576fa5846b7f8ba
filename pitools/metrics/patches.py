"""Square crops of images, at full resolution: what patch FIDs extract features of.

A feature extractor shrinks a large image to what it was trained on, 299 pixels for Inception, and loses its details.
The FID of centre crops of that size instead is the patch FID (Lin et al. 2024, SDXL-Lightning).
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def patches(images: Tensor, size: int, count: int | None = None, generator: Generator | None = None) -> Tensor:
    """Crops `[B, C, size, size]` of the middle of images `[B, C, H, W]`, or `count` random ones of each.

    count: of crops `[B * count, C, size, size]`, those of one image together, uniform over all places where one fits,
        each drawn from `generator`. An odd margin's extra pixel lies below and to the right of a middle crop.
    Raises `ValueError` for another shape, a size that does not fit in the images, or a count below 1.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got {tuple(images.shape)}")
    batch, _, height, width = images.shape
    if not 1 <= size <= min(height, width):
        raise ValueError(f"size must lie in 1..{min(height, width)} for images of {height} x {width}, got {size}")
    if count is None:
        return images.narrow(2, (height - size) // 2, size).narrow(3, (width - size) // 2, size)
    if count < 1:
        raise ValueError(f"count must be at least 1, or None for the middle crop, got {count}")
    device = None if generator is None else generator.device
    top, left = (
        torch.randint(side - size + 1, (batch * count,), generator=generator, device=device).to(images.device)
        for side in (height, width)
    )
    index = torch.arange(batch, device=images.device).repeat_interleave(count)
    return images.unfold(2, size, 1).unfold(3, size, 1)[index, :, top, left]
