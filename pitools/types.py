"""The contracts between the rooms, and the two records that they pass around.

Time runs from t = 1 (noise) to t = 0 (data), and fields live on (0, 1]. Shape letters are the same
everywhere: B batch, L factors, C channels of one factor, K mixture components, N grid points or
coefficients, S substeps, M intermediate states. A *latent* has the backbone's own shape,
`[B, C, H, W]` for an image and `[B, 2]` for a point; a policy's state is `[B, L, C]`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, TypeAlias, runtime_checkable

from einops import EinopsError, rearrange
from torch import Tensor

from pitools.draws import Randomness

Time: TypeAlias = float | Tensor
"""A float, a 0-d tensor, or `[B]` aligned with the leading dimension of the state."""

Conditions: TypeAlias = Mapping[str, Any]
"""What a network is conditioned on, keyed by the backbone's own argument names."""


class VelocityField(Protocol):
    """A teacher: the velocity dx/dt of latents."""

    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """Velocity at latents `x_t` and `t` in (0, 1], of the shape of `x_t`."""
        ...


class Policy(Protocol):
    """A closed-form velocity field on `[B, L, C]`, valid from its t_src down to t = 0 (section 3)."""

    def velocity(self, x_t: Tensor, t: Time) -> Tensor:
        """`[B, L, C]` at (x_t `[B, L, C]`, t); a `ValueError` outside 0 < t <= t_src."""
        ...

    def detach(self) -> Self:
        """The same policy without a graph."""
        ...


@runtime_checkable
class Tempered(Protocol):
    """A policy whose randomness can be sharpened (paper, Eq. 4)."""

    def tempered(self, temperature: float) -> Policy:
        """The policy at `temperature` > 0; 1 changes nothing."""
        ...


@runtime_checkable
class Dropped(Protocol):
    """A policy that can lose components at random during training (paper, section 5.1)."""

    def dropped(self, rate: float, generator: Randomness = None) -> Policy:
        """The policy without each component with probability `rate`."""
        ...


class Student(Protocol):
    """A network that looks once at a noisy latent and answers with a policy."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def factorisation(self) -> Factorisation: ...

    def __call__(self, x_src: Tensor, t_src: Time, conditions: Conditions | None = None) -> Policy:
        """The policy for latents `x_src` at `t_src`."""
        ...


class FlowMap(Protocol):
    """A student that jumps from noise to any later time at once, and has no policy (FreeFlow, section 4)."""

    def __call__(self, noise: Tensor, delta: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The mean velocity F `[B, ...]` from t = 1 to 1 - δ, δ `[B]` in [0, 1]: the end point is noise - δ F."""
        ...


@dataclass(frozen=True)
class Schedule:
    """The few-step schedule that a student was trained for (paper, B.1 and B.4).

    shift: m of the time shift t = m*raw / (1 + (m - 1)*raw).
    final_step_scale: length of the last segment over that of the others, in raw time.
    temperature: of every step but the last; "auto" is the published rule, clamp(0.1*(n - 1), 0, 1).
    nfe: the number of network evaluations that sampling takes unless told otherwise.
    """

    nfe: int = 4
    shift: float = 1.0
    final_step_scale: float = 1.0
    temperature: float | Literal["auto"] = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.nfe, int) or self.nfe < 1:
            raise ValueError(f"nfe must be a whole number of at least 1, got {self.nfe}")
        for name in ("shift", "final_step_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number, got {value}")
        if self.temperature != "auto" and not (isinstance(self.temperature, (int, float)) and self.temperature > 0):
            raise ValueError(f'temperature must be a positive number or "auto", got {self.temperature!r}')

    @property
    def segment(self) -> float:
        """Raw length of one full segment, 1 / (nfe - 1 + final_step_scale): the reach of a DX grid."""
        return 1.0 / (self.nfe - 1 + self.final_step_scale)


@dataclass(frozen=True)
class Factorisation:
    """How a latent becomes a policy's `[B, L, C]`, as an einops pattern (paper, Fig. 11).

    >>> Factorisation("b c h w -> b (h w) c").pack(torch.zeros(2, 3, 4, 5)).shape
    torch.Size([2, 20, 3])

    pattern: "latent axes -> b factors channels"; a group in brackets on the left, as in
        "b c (h p) (w q) -> b (h w) (c p q)", needs all its sizes but one in `sizes`.
    """

    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()

    def pack(self, latents: Tensor) -> Tensor:
        """Latents to `[B, L, C]`. `ValueError` if the pattern does not fit their shape."""
        try:
            packed = rearrange(latents, self.pattern, **dict(self.sizes))
        except EinopsError as error:
            raise ValueError(
                f"latents {tuple(latents.shape)} do not fit '{self.pattern}' {self.sizes or ''}"
            ) from error
        if packed.ndim != 3:
            raise ValueError(f"the pattern '{self.pattern}' must lead to [B, L, C], not {tuple(packed.shape)}")
        return packed

    def unpack(self, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`[B, L, C]` back to latents of `shape`. `ValueError` if they do not fit."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        try:
            return rearrange(packed, f"{right} -> {left}", **self._axes(left, shape))
        except (EinopsError, ValueError, ZeroDivisionError) as error:
            raise ValueError(
                f"a state {tuple(packed.shape)} does not unpack to {tuple(shape)} by '{self.pattern}'"
            ) from error

    def _axes(self, left: str, shape: tuple[int, ...]) -> dict[str, int]:
        """The size of every axis on the left of the pattern, for latents of `shape`."""
        axes = dict(self.sizes)
        for group, size in zip(re.findall(r"\([^)]*\)|\w+", left), shape, strict=True):
            names = group.strip("()").split()
            unknown = [name for name in names if name not in axes and not name.isdigit()]
            known = math.prod(axes[name] for name in names if name in axes)
            for name in unknown:
                axes[name] = size // known
        return axes


def rows_of(conditions: Conditions, rows: Sequence[int], batch: int) -> dict[str, Any]:
    """The conditions of some samples: a tensor or a list with `batch` entries is taken to have one for each."""
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == batch:
            found[name] = value[list(rows)]
        elif isinstance(value, list) and len(value) == batch:
            found[name] = [value[row] for row in rows]
        else:
            found[name] = value
    return found


POINTS = Factorisation("b c -> b 1 c")
PIXELWISE = Factorisation("b c h w -> b (h w) c")
ELEMENTWISE = Factorisation("b c h w -> b (c h w) 1")


def patchwise(size: int) -> Factorisation:
    """One factor per `size` x `size` patch of the latent, with all its channels."""
    return Factorisation("b c (h p) (w q) -> b (h w) (c p q)", (("p", size), ("q", size)))
