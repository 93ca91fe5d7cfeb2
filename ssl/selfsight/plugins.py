"""Packages that bring something of their own: methods, networks, data sets, evaluators, recipes.

A package is one by naming the entry point group `GROUP`, each entry point a module or package:

    [project.entry-points."selfsight.plugins"]
    example = "example_plugin"

A folder ``conf`` inside that package is searched for choices, and importing it registers what has to be registered,
such as networks with timm's ``@register_model``. Light on imports: what is there is known before anything is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
from pathlib import Path
from typing import NamedTuple

from selfsight.errors import USAGE, UserError

GROUP = "selfsight.plugins"


class Plugin(NamedTuple):
    """An entry point: its name, the module it names, and the package that was installed with it."""

    name: str
    module: str
    package: str

    def conf_dir(self) -> Path | None:
        """The folder of its choices; None where it brings none.

        Raises:
            UserError: there is no such module.
        """
        try:
            spec = importlib.util.find_spec(self.module)
        except Exception as error:  # of a package above it, which has to be imported for that
            raise self.refused(error) from error
        if spec is None:
            raise self.refused(ModuleNotFoundError(f"No module named '{self.module}'"))
        folders = [Path(place) / "conf" for place in spec.submodule_search_locations or ()]
        return next((folder for folder in folders if folder.is_dir()), None)

    def refused(self, error: BaseException) -> UserError:
        """The sentence on a plug-in that does not import."""
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        return UserError(
            f"the plug-in '{self.name}' (package {self.package}) does not import: {reason}. Mend it, or take it away: "
            f"pip uninstall {self.package}.",
            status=USAGE,
        )


def installed() -> tuple[Plugin, ...]:
    """The plug-ins of this environment, by name.

    Raises:
        UserError: two have one name.
    """
    return _installed(tuple(sys.path))


def load() -> None:
    """Import every plug-in, once.

    Raises:
        UserError: one does not import; names it and the error.
    """
    for plugin in installed():
        try:
            importlib.import_module(plugin.module)
        except Exception as error:
            raise plugin.refused(error) from error


def defines(target: str) -> bool:
    """Whether a plug-in defines the class or function of this dotted path; what it has only imported is not its own.

    Raises:
        UserError: the plug-in does not import.
    """
    for plugin in installed():
        if not target.startswith(f"{plugin.module}."):
            continue
        try:
            found = pkgutil.resolve_name(target)
        except (ImportError, AttributeError, ValueError):
            continue
        except Exception as error:
            raise plugin.refused(error) from error
        home = str(getattr(found, "__module__", None))
        if home == plugin.module or home.startswith(f"{plugin.module}."):
            return True
    return False


@functools.lru_cache(maxsize=4)
def _installed(path: tuple[str, ...]) -> tuple[Plugin, ...]:
    if not any(map(_names_plugins, path)):
        return ()
    from importlib.metadata import entry_points

    found: dict[str, Plugin] = {}
    for point in entry_points(group=GROUP):
        package = point.dist.name if point.dist is not None else point.module
        plugin = Plugin(point.name, point.module, package)
        other = found.setdefault(point.name, plugin)
        if other != plugin:
            raise UserError(
                f"two plug-ins have the name '{point.name}', of the packages {other.package} and {package}; take one "
                f"away: pip uninstall {package}.",
                status=USAGE,
            )
    return tuple(sorted(found.values()))


def _names_plugins(folder: str) -> bool:
    """Whether a package in this folder of ``sys.path`` names the group: `importlib.metadata` is slow to import."""
    try:
        with os.scandir(folder or ".") as entries:
            described = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
    except OSError:
        return False
    for place in described:
        try:
            text = Path(place, "entry_points.txt").read_bytes()
        except OSError:
            continue
        if GROUP.encode() in text:
            return True
    return False
