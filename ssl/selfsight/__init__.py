"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.checkpoints.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:  # torch is imported only when something needs it
    if name == "load":
        from selfsight.checkpoints.load import load

        return load
    raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
