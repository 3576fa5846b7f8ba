"""Text-to-image transformers as a recipe's section `[backbone]`: `name = "qwen"`, `"flux"` or `"flux2"`.

The weights are a hub id or a folder as diffusers saves them; or "random", of full size, for measuring; or "tiny",
random and of a size that shows nothing but that everything runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pitools.policies import Head
from pitools.training.random import drawing_from
from pitools.types import PIXELWISE, Factorisation
from scale import flux, flux2
from scale.adapted import AdaptedPolicy, Base, Form, Heads, LoRA
from scale.loading import files_of, folder_of, outlined, pretrained
from scale.quantise import Quantisation, loading_options, quantise
from scale.qwen import QwenForm

DTYPES = {"bf16": torch.bfloat16, "float32": torch.float32}

TEXT_TOKENS = 512
"""How long a prompt is taken to be in estimates."""

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
    quantise: Quantisation = "none"
    lora: LoRA = field(default_factory=LoRA)
    head: Heads = field(default_factory=Heads)

    kind: ClassVar[str]
    """What recipes call it."""
    form: ClassVar[Form]
    class_name: ClassVar[str]
    """Of the diffusers transformer."""
    channels: ClassVar[int] = 16
    """Of a latent."""
    usual_guidance: ClassVar[float | None] = None
    """The embedded scale that adapters are for unless they say otherwise; None where none is embedded."""
    elastic: ClassVar[bool] = True
    """Whether students serve more evaluations than they were trained for."""
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
    def embeds_guidance(self) -> bool:
        """Whether the transformer takes its guidance as a condition."""
        return self.usual_guidance is not None

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
            lora=replace(self.lora, rank=min(self.lora.rank, 4)),
            head=replace(self.head, log_std_width=min(self.head.log_std_width, 16)),
        )

    def teacher(self, generator: torch.Generator) -> Base:
        """The frozen transformer; random weights are drawn from `generator`, which lives on the CPU."""
        return Base(self.transformer(generator).requires_grad_(False).eval(), self.form)

    def sharded_teacher(self, generator: torch.Generator) -> Base:
        """The same for a student that FSDP2 shards: where weights are saved, each process reads its share, and then.

        Random and quantised ones are whole at first. `ValueError` for weights that cannot be had, or not sharded.
        """
        if self.quantise in ("int8", "fp8"):  # diffusers' casts would leave a whole copy of fp8 weights behind
            raise ValueError(
                f'quantise = "{self.quantise}" cannot be sharded; use "nf4", or parallel = "ddp" in [engine]'
            )
        if self.weights in ("random", "tiny") or self.quantise != "none":
            return self.teacher(generator)
        try:
            folder = folder_of(self.weights, self.revision)
            files = files_of(folder)
            transformer = outlined(self._class(), folder, files, DTYPES[self.dtype])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"weights {self.weights!r} cannot be loaded: {error}") from error
        return Base(transformer.requires_grad_(False).eval(), self.form, files)

    def outline(self) -> Base:
        """The teacher without weights in memory. `ValueError` where not even its sizes can be had."""
        from accelerate import init_empty_weights

        cls = self._class()
        sizes: Mapping[str, Any] = self.sizes if self.weights == "tiny" else self.full
        usual = {each.name: each.default for each in fields(self)}["weights"]  # whose sizes are known
        if self.weights not in ("random", "tiny", usual):
            try:
                sizes = cls.load_config(self.weights, subfolder="transformer", revision=self.revision)
            except OSError as error:
                raise ValueError(f"weights {self.weights!r} cannot be loaded: {error}") from error
        with init_empty_weights():
            transformer = cls.from_config(dict(sizes))
        # Not diffusers' own `to`, which warns of modules that a checkpoint might want in float32.
        return Base(nn.Module.to(transformer, DTYPES[self.dtype]), self.form)

    def example(self, teacher: nn.Module) -> dict[str, Tensor]:
        """Conditions of one sample as long as text usually is, for an outline of the teacher."""
        config = cast(Base, teacher).transformer.config
        conditions = {"encoder_hidden_states": torch.zeros(1, TEXT_TOKENS, config.joint_attention_dim)}
        if "pooled_projections" in self.form.conditions:
            conditions["pooled_projections"] = torch.zeros(1, config.pooled_projection_dim)
        return conditions

    def stored_bytes(self, name: str, value: Tensor) -> int:
        """What a parameter of the frozen base takes, quantised as this section says."""
        name = name.removeprefix("transformer.")
        matrix = value.ndim == 2 and not name.startswith(("norm_out.", "proj_out."))
        if self.quantise == "fp8" and "norm" in name:  # diffusers leaves such modules alone
            matrix = False
        size = {"none": value.element_size(), "nf4": 4.13 / 8, "int8": 1.0, "fp8": 1.0}[self.quantise]
        return math.ceil(value.numel() * (size if matrix else value.element_size()))

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
        cls = self._class()
        dtype = DTYPES[self.dtype]
        if self.weights in ("random", "tiny"):
            sizes = self.sizes if self.weights == "tiny" else self.full
            with drawing_from(generator):
                usual = torch.get_default_dtype()
                torch.set_default_dtype(dtype)  # never all of it in float32
                try:
                    transformer = cls(**sizes)
                finally:
                    torch.set_default_dtype(usual)
            return quantise(transformer, self.quantise)
        options = loading_options(self.quantise, dtype)
        try:
            transformer = pretrained(
                cls, self.weights, subfolder="transformer", revision=self.revision, dtype=dtype, **options
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"weights {self.weights!r} cannot be loaded: {error}") from error
        return quantise(transformer, self.quantise)

    def _class(self) -> Any:
        """Of the diffusers transformer."""
        try:
            import diffusers
        except ImportError as error:
            raise ImportError(
                f'{self.class_name} needs diffusers ({error}): run `pip install "pitools[scale]"`'
            ) from error
        return getattr(diffusers, self.class_name)


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
    form: ClassVar[Form] = flux.FluxForm()
    class_name: ClassVar[str] = "FluxTransformer2DModel"
    usual_guidance: ClassVar[float | None] = flux.GUIDANCE
    elastic: ClassVar[bool] = False
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
    form: ClassVar[Form] = flux2.Flux2Form()
    class_name: ClassVar[str] = "Flux2Transformer2DModel"
    channels: ClassVar[int] = 32
    usual_guidance: ClassVar[float | None] = flux2.GUIDANCE
    sizes: ClassVar[Mapping[str, Any]] = {**_TINY, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)}


def backbone_of(transformer: Any) -> TextToImage:
    """The section of a transformer's class, with its defaults. `ValueError` for a class that has no adapter."""
    return section_of(type(transformer).__name__)


def section_of(class_name: str) -> TextToImage:
    """The same by the name of the transformer's class."""
    known: dict[str, type[TextToImage]] = {cls.class_name: cls for cls in (QwenImage, Flux, Flux2)}
    if class_name not in known:
        raise ValueError(f"a {class_name} has no adapter; those known are {', '.join(known)}")
    return known[class_name]()  # type: ignore[call-arg]  # each has its default weights
