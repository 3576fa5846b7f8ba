"""Features that come in batches, and what the metrics need of them all.

Fréchet distances need moments only, of constant size; kernel distances, precision, recall, density, coverage and
diversity need the features themselves, and Inception Scores the logits. 50,000 samples of 2048 features are 0.4 GB, and
their moments take a core some 15 seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pitools.metrics.features import Moments, finite_features

BLOCK = 4  # samples enter the moments once there are so many times F: to merge few costs as much as F of them


class FeatureSet:
    """A set of samples as an extractor gives them, batch by batch; on the CPU, whatever device they come from.

    keep: whether `features` are kept. Moments always are; logits are where they are given.
    """

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.count = 0
        self._width = 0
        self._moments: Moments | None = None
        self._waiting: list[Tensor] = []
        self._features: list[Tensor] = []
        self._logits: list[Tensor] = []

    def add(self, features: Tensor, logits: Tensor | None = None) -> None:
        """A batch of features `[B, F]`, and its logits `[B, classes]`, which all batches have or none.

        Raises `ValueError` for features that are not finite, or a batch unlike those before; the set is then unchanged.
        """
        features = features.detach().to("cpu", copy=True)
        finite_features("features", features, least=1)
        if self.count and features.shape[1] != self._width:
            raise ValueError(f"features must be {self._width} wide, as before, got {features.shape[1]}")
        if self.count and (logits is None) != (not self._logits):
            raise ValueError("logits must come with every batch or with none")
        if logits is not None:
            classes = self._logits[0].shape[1:] if self._logits else logits.shape[1:]
            if logits.ndim != 2 or logits.shape != (len(features), *classes):
                raise ValueError(
                    f"logits must be [B, classes], a row for each of {len(features)} samples and as wide as before, "
                    f"got {tuple(logits.shape)}"
                )
            self._logits.append(logits.detach().to("cpu", copy=True))
        self.count += len(features)
        self._width = features.shape[1]
        self._waiting.append(features)
        if self.keep:
            self._features.append(features)
        if sum(map(len, self._waiting)) >= BLOCK * self._width:
            self._merge()

    @property
    def moments(self) -> Moments:
        """Of all samples so far, for `frechet_distance`; `ValueError` where there are none."""
        self._merge()
        if self._moments is None:
            raise ValueError("no samples were added: there are no moments")
        return self._moments

    @property
    def features(self) -> Tensor:
        """`[S, F]`, in the order and dtype in which they came; `ValueError` where none were kept."""
        if not self._features:
            raise ValueError("no features were kept: make FeatureSet(keep=True), and add samples")
        self._features = [torch.cat(self._features)]
        return self._features[0]

    @property
    def logits(self) -> Tensor:
        """`[S, classes]`, in the order and dtype in which they came; `ValueError` where none were given."""
        if not self._logits:
            raise ValueError("no logits were given: pass them to add")
        self._logits = [torch.cat(self._logits)]
        return self._logits[0]

    def _merge(self) -> None:
        if self._waiting:
            waiting = Moments.of(torch.cat(self._waiting))
            self._moments = waiting if self._moments is None else self._moments.merged(waiting)
            self._waiting = []
