"""The figures of a run: their names, their titles, and how a person reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

#: figures of the table that are one number, and their titles
SINGLES = {
    "knn_top1": "kNN",
    "knn_balanced": "kNN, balanced",
    "linear_top1": "linear",
    "linear_balanced": "linear, balanced",
    "view_knn_top1": "kNN of standard views",  # those of the training are the line's
    "knn_map": "kNN, mAP",
    "knn_f1": "kNN, F1",
    "knn_r2": "kNN, R²",
    "linear_map": "linear, mAP",
    "linear_f1": "linear, F1",
    "linear_r2": "linear, R²",
    "rank": "rank",
}
#: figures of our evaluators that the table leaves to summary.json
DETAILS = re.compile(r"(knn|linear|view|rank)_|feature_std|alpha_req|few_shot")


def singles(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Titles of the figures that are one number, by name: `SINGLES`, then those of a person's own evaluators."""
    found = {key: key.replace("_", " ") for row in rows for key, value in row.items() if isinstance(value, float)}
    own = {key: title for key, title in found.items() if key not in SINGLES and not DETAILS.match(key)}
    return {key: title for key, title in SINGLES.items() if key in found} | own


def as_text(key: str, value: float) -> str:
    """A number of the table as a person reads it: shares of 1 in percent."""
    if key.endswith("_r2"):
        return f"{value:.3f}"
    if key in ("alignment", "uniformity"):  # a squared distance, and a logarithm
        return f"{value:.2f}"
    return f"{value:.1%}" if key != "rank" and abs(value) <= 1 else f"{value:.1f}"


#: networks that learned labels, and by what figure each is judged: of classes, several labels, numbers
NETWORKS = {"student": "", "teacher": " of the average"}
JUDGED_BY = {"top1": "test accuracy", "map": "test mAP", "r2": "test R²"}


def column_of(network: str, figure: str) -> str:
    """What a figure of such a network is called: an accuracy by the network's name alone."""
    return network if figure == "top1" else f"{network}_{figure}"


#: their titles
CLASSIFIERS = {
    column_of(network, figure): what + whose
    for network, whose in NETWORKS.items()
    for figure, what in JUDGED_BY.items()
}


class Value(NamedTuple):
    """A figure, with its standard deviation where it is a mean."""

    mean: float
    spread: float | None = None


def of_run(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Value]:
    """The figures of a run: of its frozen backbone, of the networks that learned classes, by labels a class."""
    measured, learned = summary.get("pretrained", {}), summary.get("classifiers", {})
    found = {key: Value(measured[key]) for key in SINGLES if key in measured}
    by_network = {name: learned.get(name, {}) for name in NETWORKS}
    found |= {column_of(name, key): Value(of[key]) for name, of in by_network.items() for key in JUDGED_BY if key in of}
    return found | {k: Value(shot["mean"], shot["std"]) for k, shot in measured.get("few_shot", {}).items()}


def heading(column: str) -> str:
    return {**SINGLES, **CLASSIFIERS}.get(column, f"{column}/class")
