"""Accuracy against the number of features: the same evaluation of the first m of them, for every m of a list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from selfsight.evaluation.base import Evaluator, Figures
from selfsight.evaluation.features import Features
from selfsight.nn.matryoshka import all_widths

#: ending of the name of a curve, ``knn_top1_by_dim``: the figure it is of, by number of features
BY_DIM = "_by_dim"
#: the figure a curve is of: the first of these that an evaluator gives
MAIN = ("knn_top1", "knn_map", "knn_r2", "linear_top1", "linear_map", "linear_r2", "map")


def with_dims(evaluator: Any, train: Features, test: Features) -> Figures:
    """What an evaluator with ``dims`` says of all features, and its main figure of the first m for every m of these.

    The first m are evaluated like features of that width: scaled to unit length, or standardised, by themselves.

    Raises:
        UserError: dims that do not ascend, or that the features do not have.
    """
    widths = all_widths(evaluator.dims, train.x.shape[1])
    alone: Callable[[Features, Features], Figures] = dataclasses.replace(evaluator, dims=None)
    found = alone(train, test)
    main = next(name for name in MAIN if name in found)
    curve = {str(m): alone(first(train, m), first(test, m))[main] for m in widths[:-1]}
    return found | {f"{main}{BY_DIM}": {**curve, str(widths[-1]): found[main]}}


def first(features: Features, m: int) -> Features:
    """The first m numbers of each image's features."""
    return dataclasses.replace(features, x=features.x[:, :m], file=None)


def at_dims(evaluator: Evaluator, dims: Sequence[int] | None, *, instead: bool = False) -> Evaluator:
    """An evaluator that takes ``dims`` with these, unless it has some; with ``instead`` whether it has some or not."""
    takes = dataclasses.is_dataclass(evaluator) and hasattr(evaluator, "dims")
    if not takes or (getattr(evaluator, "dims", None) is not None and not instead):
        return evaluator
    changed: Evaluator = dataclasses.replace(evaluator, dims=dims)  # type: ignore[type-var]
    return changed


def check_dims(evaluator: Evaluator, features: int) -> None:
    """
    Raises:
        UserError: it is to look at the first m of ``features`` numbers, and m is above, or the list does not ascend.
    """
    if (dims := getattr(evaluator, "dims", None)) is not None:
        all_widths(dims, features)
