"""Statistics of a reference in a file: the `.npz` that ADM, EDM and others publish FIDs with.

mu [F], sigma [F, F]      mean and covariance of features; count: of how many samples, where pitools wrote it
arr_0 [N, H, W, 3]        in ADM's reference batches also pixels, uint8, for what needs more than moments
"""

from __future__ import annotations

import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pitools.evaluation.images import Pixels
from pitools.metrics import Moments

MANY = 2**31  # samples, where a file does not tell of how many it is


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a file has: moments of features, images, or both."""

    moments: Moments | None
    images: Pixels | None


def read_statistics(path: Path) -> Statistics:
    """A file as the head of this module says; nothing in it is unpickled.

    `ValueError` for one that is damaged, has neither, or has a covariance that is none.
    """
    try:
        with np.load(path) as file:
            found = {name: file[name] for name in ("mu", "sigma", "count", "arr_0") if name in file}
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as .npz ({error}); name one with mu and sigma, or a folder") from error
    moments = images = None
    if "mu" in found and "sigma" in found:
        try:
            count = int(found["count"]) if "count" in found else MANY
            moments = moments_of(torch.as_tensor(found["mu"]), torch.as_tensor(found["sigma"]), count)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no mean and covariance: {error}") from None
    if (pixels := found.get("arr_0")) is not None:
        if pixels.ndim != 4 or pixels.shape[3] != 3 or pixels.dtype != np.uint8 or not len(pixels):
            raise ValueError(f"{path} has arr_0 {pixels.shape} of {pixels.dtype}, and not pixels [N, H, W, 3] of uint8")
        images = Pixels(pixels)
    if moments is None and images is None:
        raise ValueError(f"{path} has neither mu and sigma nor images in arr_0; name another file, or a folder")
    return Statistics(moments, images)


def moments_of(mean: torch.Tensor, covariance: torch.Tensor, count: int) -> Moments:
    """Moments with this mean `[F]` and unbiased covariance `[F, F]`.

    `ValueError` for other shapes, values that are not finite, fewer than 2 samples, or a matrix that is no covariance.
    """
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or count < 2:
        shapes = f"mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)} of {count} samples"
        raise ValueError(f"mu must be [F] and sigma [F, F], of at least 2 samples, got {shapes}")
    mean, covariance = mean.double(), covariance.double()
    if not bool(mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("mu and sigma must be finite")
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    scale = float(values.abs().max())
    if float(values.min()) < -1e-3 * scale or float((covariance - covariance.mT).abs().max()) > 1e-3 * scale:
        raise ValueError("sigma must be symmetric and have no negative eigenvalues, and this one is no covariance")
    return Moments(count, mean, math.sqrt(count - 1) * values.clamp(min=0).sqrt()[:, None] * vectors.mT)


def statistics_file(moments: Moments) -> bytes:
    """The contents of a file for `read_statistics`, and for whoever else reads mu and sigma."""
    covariance = moments.root.mT @ moments.root / (moments.count - 1)
    out = io.BytesIO()
    arrays: dict[str, Any] = {"mu": moments.mean.numpy(), "sigma": covariance.numpy(), "count": np.int64(moments.count)}
    np.savez(out, **arrays)
    return out.getvalue()
