"""Text-to-image transformers as a recipe's section `[backbone]`: `name = "qwen"`, `"flux"` or `"flux2"`.

The weights are a hub id or a folder as diffusers saves them; or "random", of full size, for measuring; or "tiny",
random and of a size that shows nothing but that everything runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn

from pitools.policies import Head
from pitools.types import PIXELWISE, Factorisation
from scale.adapted import AdaptedPolicy, Base, Form, Heads, LoRA
from scale.flux import FluxForm
from scale.flux2 import Flux2Form
from scale.qwen import QwenForm

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}

TINY_TEXT = 12
"""Width of a tiny model's text conditions; of FLUX.1's pooled ones, too."""


@dataclass(frozen=True)
class TextToImage:
    """What the sections of all three have.

    weights: hub id, local folder, "random" or "tiny".  revision: of a hub id.  dtype: of the frozen base.
    quantise: of the frozen base's linear layers, its last norm and projection apart.  lora, head: of students.
    """

    weights: str
    revision: str | None = None
    dtype: Literal["bf16", "float32"] = "bf16"
    quantise: Literal["none", "nf4", "int8", "fp8"] = "none"
    lora: LoRA = field(default_factory=LoRA)
    head: Heads = field(default_factory=Heads)

    kind: ClassVar[str]
    """What recipes call it."""
    form: ClassVar[Form]
    class_name: ClassVar[str]
    """Of the diffusers transformer."""
    channels: ClassVar[int] = 16
    """Of a latent."""
    embeds_guidance: ClassVar[bool] = False
    sizes: ClassVar[Mapping[str, Any]]
    """Of a tiny transformer."""
    full: ClassVar[Mapping[str, Any]] = {}
    """Of a random one of full size, where they are not the class's defaults."""

    @property
    def shape(self) -> tuple[int | None, ...]:
        """Of one latent: any even height and width."""
        return self.channels, None, None

    @property
    def factorisation(self) -> Factorisation:
        """One mixture for each latent pixel, shared by its channels."""
        return PIXELWISE

    @property
    def pretrained(self) -> bool:
        """Whether the teacher comes with weights; random ones stand for them."""
        return True

    @property
    def stub(self) -> Mapping[str, object]:
        """A [data] section for a tiny transformer."""
        return {"name": "stub-prompts", "backbone": self.kind}

    def tiny(self) -> Self:
        """The same with random weights of a size for tests."""
        return replace(
            self,
            weights="tiny",
            dtype="float32",
            quantise="none",
            lora=replace(self.lora, rank=min(self.lora.rank, 4)),
            head=replace(self.head, log_std_width=min(self.head.log_std_width, 16)),
        )

    def teacher(self, generator: torch.Generator) -> Base:
        """The frozen transformer; random weights are drawn from `generator`, which lives on the CPU."""
        return Base(self.transformer(generator).requires_grad_(False).eval(), self.form)

    def student(
        self, teacher: nn.Module, head: Head, generator: torch.Generator, guidance: float | None = None
    ) -> AdaptedPolicy:
        """A student on the teacher's own transformer. An earlier one on it is taken off."""
        if not isinstance(teacher, Base):
            raise ValueError(
                f"a {self.class_name} student needs its teacher's transformer, not {type(teacher).__name__}"
            )
        return AdaptedPolicy(teacher, head.sizes, self.lora, self.head, generator, guidance=guidance)

    def transformer(self, generator: torch.Generator) -> Any:
        """The diffusers transformer. `ValueError` for weights that cannot be had, saying why."""
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                f'{self.class_name} needs diffusers ({error}): run `pip install "pitools[scale]"`'
            ) from error
        cls: Any = getattr(diffusers, self.class_name)
        dtype = DTYPES[self.dtype]
        if self.weights in ("random", "tiny"):
            sizes = self.sizes if self.weights == "tiny" else self.full
            with torch.random.fork_rng(devices=[]):  # modules draw from the global state as they are made
                torch.set_rng_state(generator.get_state())
                transformer = cls(**sizes).to(dtype)
                generator.set_state(torch.get_rng_state())
            return transformer
        try:
            return cls.from_pretrained(self.weights, subfolder="transformer", revision=self.revision, torch_dtype=dtype)
        except OSError as error:
            raise ValueError(f"weights {self.weights!r} cannot be loaded: {error}") from error


_TINY = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": TINY_TEXT}


@dataclass(frozen=True)
class QwenImage(TextToImage):
    """Recipe section `[backbone]` with `name = "qwen"`."""

    weights: str = "Qwen/Qwen-Image"

    kind: ClassVar[str] = "qwen"
    form: ClassVar[Form] = QwenForm()
    class_name: ClassVar[str] = "QwenImageTransformer2DModel"
    sizes: ClassVar[Mapping[str, Any]] = {**_TINY, "axes_dims_rope": (4, 6, 6)}


@dataclass(frozen=True)
class Flux(TextToImage):
    """Recipe section `[backbone]` with `name = "flux"`: FLUX.1-dev."""

    weights: str = "black-forest-labs/FLUX.1-dev"

    kind: ClassVar[str] = "flux"
    form: ClassVar[Form] = FluxForm()
    class_name: ClassVar[str] = "FluxTransformer2DModel"
    embeds_guidance: ClassVar[bool] = True
    full: ClassVar[Mapping[str, Any]] = {"guidance_embeds": True}
    sizes: ClassVar[Mapping[str, Any]] = {
        **_TINY,
        **full,
        "num_single_layers": 2,
        "pooled_projection_dim": TINY_TEXT,
        "axes_dims_rope": (4, 6, 6),
    }


@dataclass(frozen=True)
class Flux2(TextToImage):
    """Recipe section `[backbone]` with `name = "flux2"`: FLUX.2-dev."""

    weights: str = "black-forest-labs/FLUX.2-dev"

    kind: ClassVar[str] = "flux2"
    form: ClassVar[Form] = Flux2Form()
    class_name: ClassVar[str] = "Flux2Transformer2DModel"
    channels: ClassVar[int] = 32
    embeds_guidance: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, Any]] = {**_TINY, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)}


def backbone_of(transformer: Any) -> TextToImage:
    """The section of a transformer's class, with its defaults. `ValueError` for a class that has no adapter."""
    known: dict[str, type[TextToImage]] = {cls.class_name: cls for cls in (QwenImage, Flux, Flux2)}
    name = type(transformer).__name__
    if name not in known:
        raise ValueError(f"a {name} has no adapter; those known are {', '.join(known)}")
    return known[name]()  # type: ignore[call-arg]  # each has its default weights
