"""Adapters that plug the core into diffusers transformers. Only this package imports diffusers or peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scale.published import load_adapter as load_adapter
    from scale.published import save_adapter as save_adapter


def __getattr__(name: str) -> Any:
    """What is public here, loaded when it is first asked for: `import scale` is free."""
    if name not in ("load_adapter", "save_adapter"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from scale import published

    return getattr(published, name)
