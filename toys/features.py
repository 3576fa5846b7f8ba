"""What `pitools evaluate` takes for digits in the place of Inception: the features and logits of their classifier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pitools.evaluation.extractors import Extracted
from toys.classifier import Classifier
from toys.digits import SHAPE, load_classifier


@dataclass(frozen=True, eq=False)
class DigitsFeatures:
    """F = 48, and ten classes. It stays on the CPU: its answers are the same wherever the images were made."""

    classifier: Classifier

    def __call__(self, images: Tensor) -> Extracted:
        """Of images `[B, 1, H, W]`, or of coloured ones `[B, 3, H, W]`, resized to 8 x 8 where they are not."""
        images = images.cpu().float().mean(1, keepdim=True)
        if images.shape[1:] != SHAPE:
            images = torch.nn.functional.interpolate(images, SHAPE[1:], mode="area")
        features = self.classifier.features(images)
        return Extracted(features, self.classifier.outlet(features))


def digits(argument: str, device: torch.device) -> DigitsFeatures:
    """The extractor `digits`; `ValueError` for an argument, which it has none of."""
    if argument:
        raise ValueError(f"the feature extractor digits takes no argument, got {argument!r}")
    return DigitsFeatures(load_classifier())
