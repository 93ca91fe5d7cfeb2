"""Data pruning: numbers from a reading of the paper, as its authors published no program."""

from __future__ import annotations

from selfsight.evaluation.pruning import (
    Prototypes,
    choose,
    class_mean_scores,
    el2n_scores,
    evenness,
    prototype_scores,
)  # fmt: skip

from .harness import Case, family

TOLERANCE = 1e-9


def compare(case: Case, found: Prototypes) -> None:
    for name in case.out:
        case.compare(name, getattr(found, name), 0 if name == "assignment" else TOLERANCE)


@family("pruning", "prototype_")
def prototypes(case: Case) -> None:
    options = {"iterations": case.number("iterations"), "normalise": bool(case.number("normalise"))}
    compare(case, prototype_scores(case.tensor("embeddings"), case.tensor("initial"), **options))


@family("pruning", "supervised_")
def class_means(case: Case) -> None:
    compare(case, class_mean_scores(case.tensor("embeddings"), case.tensor("labels"), case.number("classes")))


@family("pruning", "keep_", "balance_")
def kept(case: Case) -> None:
    options = {}
    if "balance" in case.hp:
        options = {
            "labels": case.tensor("labels"),
            "classes": case.number("classes"),
            "balance": case.number("balance"),
        }
    hard = bool(case.number("keep_hard"))
    case.compare("kept", choose(case.tensor("score"), case.number("fraction"), hard=hard, **options), 0)


@family("pruning", "balance_score")
def even(case: Case) -> None:
    case.compare("score", evenness(case.tensor("counts")), TOLERANCE)


@family("pruning", "el2n_")
def errors(case: Case) -> None:
    scores = el2n_scores(case.tensor("logits"), case.tensor("labels"))
    case.compare("score_per_model", scores, TOLERANCE)
    case.compare("score", scores.mean(0), TOLERANCE)
