"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.api import Run, embed, finetune, pretrain
    from selfsight.checkpoints.load import load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "embed", "finetune", "load", "pretrain"]

#: public name: where it stands. torch is imported only when something needs it
_PLACES = {
    "Run": "api",
    "embed": "api",
    "finetune": "api",
    "load": "checkpoints.load",
    "pretrain": "api",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
    return getattr(importlib.import_module(f"selfsight.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
