"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.checkpoints.importing import import_weights as import_weights
    from selfsight.checkpoints.load import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "import_weights", "load"]


def __getattr__(name: str) -> Any:  # torch is imported only when something needs it
    if name == "load":
        from selfsight.checkpoints.load import load

        return load
    if name == "import_weights":
        from selfsight.checkpoints.importing import import_weights

        return import_weights
    raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
