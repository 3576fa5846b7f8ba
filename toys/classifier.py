"""A small classifier of 8 x 8 digits, whose features the digits' metrics compare.

Three convolutions lead to F = 48 features, and a linear layer from there to the classes. It is a function of its
training images, its labels and a seed, and takes about three seconds on one core.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pitools.training import keyed_generator

FEATURES = 48
WIDTH = 16
STEPS = 600
BATCH = 128
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Features `[S, 48]` and classes `[S]` of images `[S, 1, 8, 8]` in [-1, 1]."""

    def __init__(self, classes: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        # Layers draw weights as they are made, from torch's global state: that draw is undone, and not used.
        with torch.random.fork_rng(devices=[]):
            self.body = nn.Sequential(
                nn.Conv2d(1, WIDTH, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
                nn.SiLU(),
                nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1),
                nn.SiLU(),
                nn.Flatten(),
                nn.Linear(2 * WIDTH * 4 * 4, FEATURES),
                nn.SiLU(),
            )
            self.outlet = nn.Linear(FEATURES, classes)
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
            else:
                nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[S, classes]`."""
        logits: Tensor = self.outlet(self.body(images))
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """The last layer's inputs `[S, 48]`. `ValueError` unless images are `[S, 1, 8, 8]`."""
        features: Tensor = self.body(_checked(images))
        return features

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """The likeliest class `[S]` of each image. `ValueError` unless images are `[S, 1, 8, 8]`."""
        logits: Tensor = self(_checked(images))
        return logits.argmax(1)


def train_classifier(images: Tensor, labels: Tensor, classes: int, seed: int) -> Classifier:
    """A classifier trained on images `[N, 1, 8, 8]` in [-1, 1] and their labels `[N]`, frozen; all on the CPU.

    Bitwise a function of the arguments, for one number of threads. It draws from its own generator, and trains
    wherever it is called from, under `torch.no_grad` too.
    """
    generator = keyed_generator(seed, "digits classifier")
    with torch.inference_mode(False), torch.enable_grad():
        network = Classifier(classes, generator)
        optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
        for step in range(STEPS):
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            rows = torch.randint(len(images), (BATCH,), generator=generator)
            logits = network(_moved(images[rows], generator))
            loss = nn.functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
    return network.eval().requires_grad_(False)


def _moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by about 6 degrees, shifted by 0.4 pixels, scaled by 5 %, with noise of 0.1: samples of a student are
    not as clean as the data, and a class should not hang on that."""
    count = len(images)
    angle, size, *shift = torch.randn(4, count, generator=generator)
    angle, size = 0.1 * angle, 1 + 0.05 * size
    right, down = (0.4 * pixels / (images.shape[-1] / 2) for pixels in shift)
    rows = [[size * angle.cos(), -size * angle.sin(), right], [size * angle.sin(), size * angle.cos(), down]]
    maps = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)  # [B, 2, 3]
    grid = nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
    # What comes in from outside is 0: shifted by 1, that is the background.
    moved = nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.randn(images.shape, generator=generator)


def _checked(images: Tensor) -> Tensor:
    if images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images must be [S, 1, 8, 8], got {tuple(images.shape)}")
    return images
