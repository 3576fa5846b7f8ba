"""FLUX.2: latents `[B, 32, H/8, W/8]` in the space that its transformer sees, embedded guidance, no biases.

The VAE's latents are normalised as 2 x 2 patches before the transformer sees them; a pipeline does that, at the
ends.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pitools.types import Conditions
from scale.flux import places

GUIDANCE = 4.0
"""What the pipelines of FLUX.2-dev and its adapters use unless told otherwise."""


@dataclass(frozen=True)
class Flux2Form:
    """How `Flux2Transformer2DModel` is called. The condition "guidance" `[B]` is 4 unless given."""

    conditions: Sequence[str] = ("encoder_hidden_states",)

    def tokens(self, transformer: Any, packed: Tensor, t: Tensor, grid: tuple[int, int], conditions: Conditions) -> Any:
        """t as it is: the transformer multiplies by 1000. Ids are (0, row, column, 0), for text (0, 0, 0, place)."""
        given = dict(conditions)
        if not transformer.config.guidance_embeds:
            given.pop("guidance", None)
        elif given.get("guidance") is None:
            given["guidance"] = torch.full_like(t, GUIDANCE)
        text = given["encoder_hidden_states"]
        return transformer(
            hidden_states=packed,
            timestep=t,
            img_ids=places(packed, 1, *grid, 1),
            txt_ids=places(packed, 1, 1, 1, text.shape[1]),
            return_dict=False,
            **given,
        )[0]

    def targets(self, transformer: Any) -> list[str]:
        """The feed-forward layers, and the time embedder; in single blocks the one that leads out of both."""
        double = r"transformer_blocks\.\d+\.(ff|ff_context)\.linear_(in|out)"
        single = r"single_transformer_blocks\.\d+\.attn\.to_out"
        time = r"time_guidance_embed\.timestep_embedder\.linear_[12]"
        pattern = re.compile(f"{double}|{single}|{time}")
        return [name for name, _ in transformer.named_modules() if pattern.fullmatch(name)]
