"""What a ``_target_`` names, and which arguments that takes."""

from __future__ import annotations

import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any

from selfsight.errors import USAGE, UserError, nearest

#: group: the class that all its classes descend from, by the top of its package
KINDS = {
    "method": "selfsight.Method",
    "callbacks": "lightning.Callback",
    "logger": "lightning.Logger",
    "optimizer": "torch.Optimizer",
    "backbone": "torch.Module",
    "datamodule": "lightning.LightningDataModule",
}

#: packages that a misspelt one may be meant for, beside what lies in the working directory
USUAL = ("selfsight", "torch", "torchvision", "timm", "lightning", "torchmetrics", "albumentations", "transformers")

#: what may be put around a thing that descends from this class: a function whose keywords stand beside its arguments
AROUND = {"torch.Optimizer": "selfsight.optim.sam.sharpness_aware"}


def locate(target: object, key: str = "_target_") -> Callable[..., Any]:
    """The class or function with this dotted path; one that has moved, where it stands now.

    Args:
        key: where the path stands in a configuration, for the sentence that refuses it.

    Raises:
        UserError: there is no such thing, or its module does not import; names the nearest one.
    """
    path = str(target)
    first, *rest = path.split(".")
    if not isinstance(target, str) or not rest or not all(part.isidentifier() for part in path.split(".")):
        raise UserError(f"{key} is '{target}'; a dotted path such as package.module.Name was expected.", status=USAGE)
    found, name = _module(first, key, path), first
    for part in rest:
        if not hasattr(found, part) and inspect.ismodule(found) and _is_module(f"{name}.{part}"):
            found = _module(f"{name}.{part}", key, path)
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            raise UserError(
                f"{key} is '{path}', and there is no '{part}' in {name}.{nearest(part, _names(found))}", status=USAGE
            )
        name = f"{name}.{part}"
    if not callable(found):
        raise UserError(f"{key} is '{path}', which is no class and no function.", status=USAGE)
    return found


def parameters(target: object, key: str = "_target_") -> Mapping[str, inspect.Parameter]:
    """The arguments that a target takes by name, in their order. One called like ``**kwargs`` takes any further ones.

    Those of what may be put around it come last, see `AROUND`.

    Raises:
        UserError: see `locate`.
    """
    found = locate(target, key)
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of C, without a signature: it may take anything
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    hidden = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
    own = {name: argument for name, argument in signature.parameters.items() if argument.kind not in hidden}
    return own | {name: argument for name, argument in _beside(found).items() if name not in own}


def takes_any(arguments: Mapping[str, inspect.Parameter]) -> bool:
    """Whether arguments that are not named are taken, too."""
    return any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())


def check_kind_of(group: str, target: object, key: str) -> None:
    """Refuse a class that is no part of this kind, as far as a class tells; what a function makes is seen later.

    Args:
        group: of the configuration: ``method``, ``callbacks`` and so on. key: where the target stands.

    Raises:
        UserError: a method that cannot learn, a callback, logger, optimizer or network that is none.
    """
    found = locate(target, f"{key}._target_")
    if not inspect.isclass(found):
        return
    expected = KINDS.get(group)
    if expected is not None and key.count(".") <= 1 and expected not in _bases(found):
        raise UserError(
            f"{key}._target_ is '{target}', which is no {expected.rpartition('.')[2]} of {expected.partition('.')[0]}.",
            status=USAGE,
        )
    if group == "method" and getattr(getattr(found, "training_step", None), "__qualname__", "").startswith(
        "LightningModule."
    ):
        raise UserError(f"{key}._target_ is '{target}', which has no training_step: it cannot learn.", status=USAGE)


def _bases(found: object) -> set[str]:
    """What a class descends from, as `KINDS` has it; nothing where it is a function."""
    return {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in getattr(found, "__mro__", ())}


def _beside(found: object) -> dict[str, inspect.Parameter]:
    bases = _bases(found)
    around = [inspect.signature(locate(path)).parameters for kind, path in AROUND.items() if kind in bases]
    return {name: p for parameters in around for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _module(name: str, key: str, path: str) -> Any:
    if not _is_module(name):
        tops = [*USUAL, *(found.name for found in pkgutil.iter_modules([os.getcwd()]))]
        raise UserError(f"{key} is '{path}', and there is no module '{name}'.{nearest(name, tops)}", status=USAGE)
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
        raise UserError(f"{key} is '{path}', and '{name}' does not import: {reason}.", status=USAGE) from error


def _names(found: object) -> list[str]:
    """What a module or class holds, for the nearest of it."""
    inner = [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]
    return [*(name for name in dir(found) if not name.startswith("_")), *inner]
