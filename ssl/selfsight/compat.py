"""What is held together by hand: names of ours that have moved, and private names of libraries that we need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

#: arguments that a thing has got since, and what it did before: a run that does not name them was made so
BEFORE: dict[str, dict[str, Any]] = {"selfsight.datamodules.folder": {"split": "draw"}}


def as_it_was(node: Any) -> None:
    """Name in a run's configuration what was no argument when the run was made."""
    from omegaconf import DictConfig, open_dict

    if not isinstance(node, DictConfig):
        return
    missing = {key: value for key, value in BEFORE.get(str(node.get("_target_")), {}).items() if key not in node}
    if missing:
        with open_dict(node):
            node.update(missing)


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
