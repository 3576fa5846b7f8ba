"""FLUX.1: latents `[B, 16, H/8, W/8]`, two text conditions, guidance embedded (dev) or absent (schnell)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pitools.types import Conditions

GUIDANCE = 3.5
"""What FLUX.1-dev and its adapters were trained for; they answer to no other."""


@dataclass(frozen=True)
class FluxForm:
    """How `FluxTransformer2DModel` is called. The condition "guidance" `[B]` is 3.5 unless given."""

    conditions: Sequence[str] = ("encoder_hidden_states", "pooled_projections")

    def tokens(self, transformer: Any, packed: Tensor, t: Tensor, grid: tuple[int, int], conditions: Conditions) -> Any:
        """t as it is: the transformer multiplies by 1000. A token's ids are (0, row, column), the text's are zero."""
        given = dict(conditions)
        if not transformer.config.guidance_embeds:
            given.pop("guidance", None)
        elif given.get("guidance") is None:
            given["guidance"] = torch.full_like(t, GUIDANCE)
        text = given["encoder_hidden_states"]
        return transformer(
            hidden_states=packed,
            timestep=t,
            img_ids=places(packed, 1, *grid).float(),
            txt_ids=packed.new_zeros(text.shape[1], 3),
            return_dict=False,
            **given,
        )[0]

    def targets(self, transformer: Any) -> list[str]:
        """The feed-forward layers of both kinds of blocks, and the time embedder; not the root's own proj_out."""
        double = r"transformer_blocks\.\d+\.(ff|ff_context)\.net\.(0\.proj|2)"
        single = r"single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
        time = r"time_text_embed\.timestep_embedder\.linear_[12]"
        pattern = re.compile(f"{double}|{single}|{time}")
        return [name for name, _ in transformer.named_modules() if pattern.fullmatch(name)]


def places(like: Tensor, *sizes: int) -> Tensor:
    """The places of a grid of these sizes `[product, len(sizes)]`, the last varying fastest, where `like` lies."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in sizes))
