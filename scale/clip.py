"""The scorer `clip:MODEL`: how well an image shows its prompt, cos(image, prompt) of CLIP's embeddings.

Publications that say CLIP score mean this number, of ViT-L/14 or B/16 as a rule, some of them times 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pitools.guidance import frozen

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLE = "clip:openai/clip-vit-large-patch14"


@dataclass(frozen=True, eq=False)
class CLIPScorer:
    """model: a transformers `CLIPModel`.  processor: its `CLIPProcessor`.  name: what messages call it."""

    model: Any
    processor: Any
    name: str

    @torch.no_grad()
    def __call__(self, images: list[Image], asked: list[Any]) -> Tensor:
        """Cosines `[B]` in [-1, 1]; a prompt's end that CLIP has no place for is left out.

        `ValueError` for what is no text.
        """
        other = next((one for one in asked if not isinstance(one, str)), None)
        if other is not None:
            raise ValueError(f"the scorer {self.name} takes prompts, and these images are of classes: {other!r}")
        most = self.model.config.text_config.max_position_embeddings
        inputs = self.processor(
            text=asked, images=images, return_tensors="pt", padding=True, truncation=True, max_length=most
        )
        found = self.model(**inputs.to(self.model.device))
        return torch.nn.functional.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())


def clip(argument: str, device: torch.device) -> CLIPScorer:
    """`clip:MODEL`, of a folder or a hub id. `ValueError` for one that cannot be loaded."""
    from transformers import CLIPModel, CLIPProcessor

    if not argument:
        raise ValueError(f"clip needs a model, a folder or a hub id, such as {EXAMPLE}")
    name = f"clip:{argument}"
    try:
        model: Any = CLIPModel.from_pretrained(argument)
        processor = CLIPProcessor.from_pretrained(argument)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} is no CLIP model that can be loaded: {error}") from error
    return CLIPScorer(frozen(model).to(device), processor, name)
