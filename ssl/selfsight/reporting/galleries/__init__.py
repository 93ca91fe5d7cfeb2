"""Pictures of what each method does, one file a method; the methods know nothing of them."""

import importlib
import pkgutil

from selfsight.reporting.galleries.gallery import Gallery, galleries

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")  # each registers its own

__all__ = ["Gallery", "galleries"]
