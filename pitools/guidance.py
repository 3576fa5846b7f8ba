"""Teachers: a network as a frozen velocity field, with classifier-free guidance (Ho & Salimans 2021).

    u = u_null + s (u_cond - u_null)    for t in [low, high],    u = u_cond elsewhere

The interval is that of Kynkäänniemi et al. (2024). A network that was itself distilled from guidance takes the
scale as one more condition instead (paper, 5.1), and is asked once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pitools.path import align, as_time
from pitools.types import Conditions, Time, VelocityField, rows_of

N = TypeVar("N", bound=nn.Module)


class VelocityNetwork(Protocol):
    """What a backbone makes of a flow transformer: latents to their velocity."""

    def __call__(self, x_t: Tensor, t: Tensor, conditions: Conditions | None = None) -> Tensor:
        """The velocity, of the shape of latents x_t `[B, ...]`, at t `[B]`."""
        ...


@dataclass(frozen=True)
class Guidance:
    """A recipe's [teacher.guidance].

    scale: s; 1 is no guidance.  low, high: the interval of t in which it acts, both ends included.  embedded: the
    scale that a guidance-distilled network takes as conditions["guidance"].
    Raises `ValueError` for a negative scale, an interval outside [0, 1], and both kinds of guidance at once.
    """

    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    embedded: float | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "embedded"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number that is not negative, got {value}")
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low and high must satisfy 0 <= low <= high <= 1, got {self.low} and {self.high}")
        if self.embedded is not None and self.scale != 1:
            raise ValueError(
                f"embedded {self.embedded} and scale {self.scale} exclude each other: a guidance-distilled network "
                "takes its scale as a condition; leave scale at 1"
            )


@dataclass(frozen=True, eq=False)
class Teacher:
    """A `VelocityField` that is asked without a graph, whatever its network's parameters say.

    network: as a rule an `nn.Module`, put out of training by `frozen`.  null_conditions: what replaces the
    conditions of the same names in the unconditional call. A tensor is one sample's value, with or without a
    leading 1, or `[B, ...]`; a number fills the condition's own shape; anything else stands as it is. Conditions
    that it does not name stay.
    Raises `ValueError` for a guidance scale other than 1 without null conditions.
    """

    network: VelocityNetwork
    guidance: Guidance = field(default_factory=Guidance)
    null_conditions: Conditions | None = None

    def __post_init__(self) -> None:
        if self.guidance.scale != 1 and self.null_conditions is None:
            raise ValueError(f"scale {self.guidance.scale} needs null_conditions for the unconditional call, got none")

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """The guided velocity of latents x_t `[B, ...]` at t in (0, 1]: float, 0-d or `[B]`; float32 or better.

        The unconditional call covers the samples whose t lies in the guidance's interval alone, and is left out
        where there are none. For it, a tensor or list among the conditions with B entries is taken to hold one for
        each sample. Raises `ValueError` for times out of range, an answer of another shape, and null conditions
        that do not fit the conditions.
        """
        times = as_time("t", t, x_t).expand(len(x_t))
        if self.guidance.embedded is not None:
            conditions = {**(conditions or {}), "guidance": torch.full_like(times, self.guidance.embedded)}
        return self._guided(x_t, times, torch.full_like(times, self.guidance.scale), conditions)

    def _guided(self, x_t: Tensor, t: Tensor, scale: Tensor, conditions: Conditions | None) -> Tensor:
        """At t and with a scale `[B]` for each sample."""
        u = self._ask(x_t, t, conditions)
        rows = ((t >= self.guidance.low) & (t <= self.guidance.high) & (scale != 1)).nonzero().squeeze(1)
        if len(rows) == 0:
            return u
        null = rows_of(self._null(conditions or {}, x_t), rows.tolist(), len(x_t))
        u_null = self._ask(x_t[rows], t[rows], null)
        guided = u_null + align(scale[rows], u_null) * (u[rows] - u_null)
        return u.index_copy(0, rows, guided.to(u.dtype))

    def _ask(self, x_t: Tensor, t: Tensor, conditions: Conditions | None) -> Tensor:
        u = self.network(x_t, t, conditions)
        if u.shape != x_t.shape:
            raise ValueError(f"the teacher's network answered {tuple(u.shape)} for latents {tuple(x_t.shape)}")
        return u.to(torch.promote_types(u.dtype, torch.float32))

    def _null(self, conditions: Conditions, x_t: Tensor) -> dict[str, Any]:
        """The conditions of the unconditional call, for the whole batch."""
        merged = dict(conditions)
        for name, value in (self.null_conditions or {}).items():
            merged[name] = _null_value(name, value, conditions.get(name), x_t)
        return merged


@dataclass(frozen=True, eq=False)
class AnyStrength:
    """A teacher whose guidance strength γ is a condition, "guidance" `[B]`, in the place of its own scale.

    For students that are to have γ chosen when they sample (FreeFlow, section 4.1). Its interval stays.
    Raises `ValueError` for a teacher without null conditions, and one that was distilled from guidance.
    """

    teacher: Teacher

    def __post_init__(self) -> None:
        if self.teacher.null_conditions is None:
            raise ValueError("a guidance strength needs null_conditions for the unconditional call, got none")
        if self.teacher.guidance.embedded is not None:
            raise ValueError("a teacher that embeds its guidance takes no strength for each sample")

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Time, conditions: Conditions | None = None) -> Tensor:
        """As `Teacher.velocity`. `ValueError` for strengths that are missing or not `[B]`."""
        given = dict(conditions or {})
        scale = given.pop("guidance", None)
        if not isinstance(scale, Tensor) or scale.shape != (len(x_t),):
            got = "nothing" if scale is None else tuple(scale.shape) if isinstance(scale, Tensor) else repr(scale)
            raise ValueError(f'conditions["guidance"] must be one strength for each of {len(x_t)} samples, got {got}')
        times = as_time("t", t, x_t).expand(len(x_t))
        return self.teacher._guided(x_t, times, scale.to(times), given)


@dataclass(frozen=True, eq=False)
class Conditioned:
    """A velocity field with its conditions filled in: one that can be integrated."""

    field: VelocityField
    conditions: Conditions | None = None

    def velocity(self, x_t: Tensor, t: Time, /) -> Tensor:
        """The velocity at latents x_t `[B, ...]`, t."""
        return self.field.velocity(x_t, t, self.conditions)


def frozen(network: N) -> N:
    """`network` itself, in evaluation mode and with no parameter that trains.

    Not for one whose weights a student shares and trains: that one's adapter switches between the two.
    """
    return network.eval().requires_grad_(False)


def _null_value(name: str, value: Any, condition: Any, x_t: Tensor) -> Any:
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.ndim == 0):
        if not isinstance(condition, Tensor):
            raise ValueError(
                f"the null condition {name} = {value} fills the shape of the condition {name}, which is missing or no "
                "tensor; give a tensor instead"
            )
        return torch.full_like(condition, float(value))
    if not isinstance(value, Tensor):
        return value
    if isinstance(condition, Tensor):
        value = value.to(condition.device, condition.dtype)
        if value.ndim == condition.ndim - 1:
            value = value.unsqueeze(0)
    else:
        value = value.to(x_t.device)
    if len(value) not in (1, len(x_t)):
        raise ValueError(
            f"the null condition {name} must be one sample's value, or one for each of the {len(x_t)} samples, "
            f"got shape {tuple(value.shape)}"
        )
    return value.expand(len(x_t), *value.shape[1:])
