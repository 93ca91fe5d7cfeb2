"""A node of the configuration, made into what it names; what that refuses is a sentence."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from selfsight.errors import UserError

T = TypeVar("T")
#: how constructors refuse arguments
REFUSALS = (TypeError, ValueError, AssertionError, MisconfigurationException)


def build(node: Any, **extra: Any) -> Any:
    """`hydra.utils.instantiate`; what the thing configured refuses is a user's mistake, as `as_user_error` says it."""
    with as_user_error(place(node)):
        # Objects are added after Hydra is done: it would make configurations of the dataclasses among them.
        if extra:
            return instantiate(node, _convert_="all", _partial_=True)(**extra)
        return instantiate(node, _convert_="all")


def of_kind(made: object, kind: type[T], where: str, wanted: str) -> T:
    """
    Raises:
        UserError: what the node at ``where`` has come to is none of this kind.
    """
    if not isinstance(made, kind):
        found = f"{type(made).__module__}.{type(made).__name__}".removeprefix("builtins.")
        raise UserError(f"{where} makes a {found}; {wanted} was expected.", status=2)
    return made


@contextlib.contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """A constructor's complaint about the values it is given, as a sentence.

    Raises:
        UserError: the constructor's own, or ``what`` with the reason it gives.
    """
    try:
        yield
    except (InstantiationException, OmegaConfBaseException, *REFUSALS) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        reason = " ".join(str(cause).split()).rstrip(".") or type(cause).__name__
        raise UserError(f"{what} cannot be made with these values: {reason}.") from error


def place(node: object) -> str:
    """``evaluator.final.knn (selfsight.evaluation.probes.knn.KNN)``: key and class of a node, as far as it has them."""
    if not isinstance(node, DictConfig):
        return "a part of the run"
    key, target = node._get_full_key(None), node.get("_target_")
    return f"{key} ({target})" if key and target else str(key or target)
