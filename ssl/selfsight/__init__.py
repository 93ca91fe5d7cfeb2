"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.api import Run, embed, finetune, pretrain
    from selfsight.backbones.interface import wrap
    from selfsight.backbones.registry import create as backbone
    from selfsight.checkpoints.load import load

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "backbone", "embed", "finetune", "load", "pretrain", "wrap"]

#: public name: where it stands. torch is imported only when something needs it
_PLACES = {
    "Run": "api.Run",
    "backbone": "backbones.registry.create",
    "embed": "api.embed",
    "finetune": "api.finetune",
    "load": "checkpoints.load.load",
    "pretrain": "api.pretrain",
    "wrap": "backbones.interface.wrap",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
    module, _, inner = _PLACES[name].rpartition(".")
    return getattr(importlib.import_module(f"selfsight.{module}"), inner)


def __dir__() -> list[str]:
    return sorted(__all__)
