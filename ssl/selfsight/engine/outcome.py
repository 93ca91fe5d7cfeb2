"""What a job that trains comes to: the figures by which its run may be chosen among others."""

from __future__ import annotations

from collections.abc import Mapping

from selfsight.evaluation.probes.targets import MAIN
from selfsight.runs.folder import RunFolder
from selfsight.runs.records import Record

#: figures by which a network is judged: of classes, labels, numbers
MAINS = ("top1", *MAIN.values())


class Outcome(dict[str, float]):
    """What a job that trains gives back: its headline figures by name, and the folder they lie in."""

    def __init__(self, figures: Mapping[str, float], folder: RunFolder | None = None) -> None:
        super().__init__(figures)
        self.folder = folder


def outcome(folder: RunFolder, summary: Record) -> Outcome:
    """The outcome of a run from its summary."""
    return Outcome(headline(summary), folder)


def headline(summary: Record) -> dict[str, float]:
    """The figures by which a run may be chosen among others: ``knn_top1``, ``linear_top1``, ``student_top1``, …"""
    measured = {key: float(value) for key, value in summary.get("pretrained", {}).items() if isinstance(value, float)}
    classifiers = summary.get("classifiers", {}).items()
    learned = {f"{name}_{key}": float(row[key]) for name, row in classifiers for key in MAINS if key in row}
    return measured | learned
