"""What is held together by hand: names of ours that have moved, and private names of libraries that we need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def moved(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__`` that finds modules where they stand now: old configurations name them as they were.

    Args:
        places: module: the subpackage it has moved to.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return importlib.import_module(f"{package}.{places[name]}.{name}")

    return find
