"""Qwen-Image: latents `[B, 16, H/8, W/8]`, one text stream with a mask, no embedded guidance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pitools.types import Conditions


@dataclass(frozen=True)
class QwenForm:
    """How `QwenImageTransformer2DModel` is called. Its text mask is honoured, so that a batch may mix lengths."""

    conditions: Sequence[str] = ("encoder_hidden_states",)

    def tokens(self, transformer: Any, packed: Tensor, t: Tensor, grid: tuple[int, int], conditions: Conditions) -> Any:
        """t as it is: the transformer multiplies by 1000. Every sample is one frame of `grid`."""
        return transformer(
            hidden_states=packed,
            timestep=t,
            img_shapes=[[(1, *grid)]] * len(packed),
            return_dict=False,
            **conditions,
        )[0]

    def targets(self, transformer: Any) -> list[str]:
        """The blocks' MLPs, but for the last one's of text, whose output goes nowhere; and the time embedder."""
        last = len(transformer.transformer_blocks) - 1
        mlp = re.compile(r"transformer_blocks\.(\d+)\.(img|txt)_mlp\.net\.(0\.proj|2)")
        found = {name: mlp.fullmatch(name) for name, _ in transformer.named_modules()}
        blocks = [name for name, match in found.items() if match and (match[2] == "img" or int(match[1]) < last)]
        return [*blocks, *(f"time_text_embed.timestep_embedder.linear_{i}" for i in (1, 2))]
