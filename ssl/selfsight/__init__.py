"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.backbones.interface import wrap as wrap
    from selfsight.backbones.registry import create as backbone
    from selfsight.checkpoints.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "backbone", "load", "wrap"]


def __getattr__(name: str) -> Any:  # torch is imported only when something needs it
    if name == "load":
        from selfsight.checkpoints.load import load

        return load
    if name == "backbone":
        from selfsight.backbones.registry import create

        return create
    if name == "wrap":
        from selfsight.backbones.interface import wrap

        return wrap
    raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
