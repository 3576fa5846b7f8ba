"""Stubs in the place of a text encoder and a VAE, for tiny random transformers, which have neither.

What they make of a prompt and of latents means nothing; it shows that everything runs, shapes and all.

    prompt -> S tokens [S, 12], S in 3..8 and all numbers from the prompt's hash
    latent pixel [C] -> 8 x 8 pixels of one colour [3], by a fixed linear map
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.nn.functional import pad

from scale.adapted import PATCH
from scale.backbone import TINY_TEXT
from scale.pipelines import PiFlux2Pipeline, PiFluxPipeline, PiPipeline, PiQwenImagePipeline

TOKENS = 8
"""The most that a stub prompt has."""

SCALE = 8
"""Pixels for each of a latent's, along each side."""


def stub_text(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings `[B, 8, 12]`, zero where a prompt is shorter, and which tokens are real `[B, 8]`."""
    rows, masks = [], []
    for prompt in prompts:
        digest = hashlib.sha256(prompt.encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        length = 3 + digest[7] % (TOKENS - 2)
        rows.append(pad(torch.randn(length, TINY_TEXT, generator=generator), (0, 0, 0, TOKENS - length)))
        masks.append(torch.arange(TOKENS) < length)
    return torch.stack(rows), torch.stack(masks)


class StubVAE(nn.Module):
    """A decoder of latents with `channels`, which has what pipelines read off the VAEs of all three backbones."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        drawn = torch.randn(channels, 3, generator=torch.Generator().manual_seed(0))
        self.mix = nn.Parameter(drawn / channels**0.5, requires_grad=False)
        self.bn = nn.BatchNorm2d(channels * PATCH**2, affine=False)
        levels = 4  # the first as large as the image, each other half as large as the one before
        self.temperal_downsample = [False] * (levels - 1)
        self.config = SimpleNamespace(
            block_out_channels=[1] * levels,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
            scaling_factor=1.0,
            shift_factor=0.0,
            batch_norm_eps=0.0,
        )

    @property
    def device(self) -> torch.device:
        return self.mix.device

    @property
    def dtype(self) -> torch.dtype:
        return self.mix.dtype

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Images `[B, 3, (T,) 8 H, 8 W]` of latents `[B, C, (T,) H, W]`."""
        colours = torch.einsum("bc...,cr->br...", latents, self.mix)
        return (colours.repeat_interleave(SCALE, -2).repeat_interleave(SCALE, -1),)


class TinyQwenImagePipeline(PiQwenImagePipeline):
    """A tiny Qwen-Image between stubs."""

    def encode_prompt(
        self: Any, prompt: Any, prompt_embeds: Any = None, prompt_embeds_mask: Any = None, **_: Any
    ) -> Any:
        """As many tokens as the longest prompt of the batch has, with their mask where some are padded."""
        if prompt_embeds is not None:
            return prompt_embeds, prompt_embeds_mask
        text, mask = stub_text(_listed(prompt))
        longest = int(mask.sum(1).max())
        text, mask = text[:, :longest].to(self.device, self.dtype), mask[:, :longest].to(self.device)
        return text, None if mask.all() else mask


class TinyFluxPipeline(PiFluxPipeline):
    """A tiny FLUX.1 between stubs."""

    def encode_prompt(
        self: Any, prompt: Any, prompt_embeds: Any = None, pooled_prompt_embeds: Any = None, **_: Any
    ) -> Any:
        """Always eight tokens, as FLUX.1 always has 512, their mean in the place of a pooled embedding, no ids."""
        if prompt_embeds is not None:
            return prompt_embeds, pooled_prompt_embeds, None
        text = stub_text(_listed(prompt))[0].to(self.device, self.dtype)
        return text, text.mean(1), None


class TinyFlux2Pipeline(PiFlux2Pipeline):
    """A tiny FLUX.2 between stubs."""

    def encode_prompt(self: Any, prompt: Any, prompt_embeds: Any = None, **_: Any) -> Any:
        """Always eight tokens, as FLUX.2 always has 512, and no ids."""
        if prompt_embeds is not None:
            return prompt_embeds, None
        return stub_text(_listed(prompt))[0].to(self.device, self.dtype), None


TINY: Mapping[str, Any] = {"qwen": TinyQwenImagePipeline, "flux": TinyFluxPipeline, "flux2": TinyFlux2Pipeline}


def tiny_pipeline(kind: str, transformer: Any) -> PiPipeline:
    """The pipeline of a tiny random transformer of a `kind`, "qwen", "flux" or "flux2", between stubs."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler
    parts: dict[str, Any] = {
        "scheduler": scheduler(),
        "vae": StubVAE(transformer.config.in_channels // PATCH**2),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": transformer,
    }
    if kind == "flux":
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    return cast(PiPipeline, TINY[kind](**parts))


def _listed(prompt: str | list[str]) -> list[str]:
    return [prompt] if isinstance(prompt, str) else prompt
