"""selfsight: self-supervised and semi-supervised pretraining for images."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfsight.api import Run as Run
    from selfsight.api import embed as embed
    from selfsight.api import finetune as finetune
    from selfsight.api import pretrain as pretrain
    from selfsight.backbones.interface import wrap as wrap
    from selfsight.backbones.registry import create as backbone
    from selfsight.checkpoints.importing import import_weights as import_weights
    from selfsight.checkpoints.load import load as load

# On a CPU threads that wait for one another spin, and where other programs need cores, too, they keep the very thread
# that they wait for from one: beside a busy program a step took twenty times as long. GNU's OpenMP, which torch brings,
# reads this as it is loaded, and takes the same number itself where there are more threads than cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "backbone", "embed", "finetune", "import_weights", "load", "pretrain", "wrap"]

#: public name: the module it stands in, and its name there. torch is imported only when something needs it
_HOMES = {
    "Run": ("api", "Run"),
    "backbone": ("backbones.registry", "create"),
    "embed": ("api", "embed"),
    "finetune": ("api", "finetune"),
    "import_weights": ("checkpoints.importing", "import_weights"),
    "load": ("checkpoints.load", "load"),
    "pretrain": ("api", "pretrain"),
    "wrap": ("backbones.interface", "wrap"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'selfsight' has no attribute '{name}'")
    module, there = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), there)


def __dir__() -> list[str]:
    return sorted(__all__)
