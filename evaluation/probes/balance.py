"""Classes of unequal size: what answering the largest one gets right, and accuracy in which each counts alike."""

from __future__ import annotations

import torch
from torch import Tensor

#: times its fair share of the images that the largest class has, from where on accuracies flatter
UNEQUAL = 1.5


def unequal(labels: Tensor) -> bool:
    """Whether the classes among ``labels [N]``, at least two, differ much in size."""
    counts = labels.bincount()
    there = int((counts > 0).sum())
    return there > 1 and int(counts.max()) * there >= UNEQUAL * len(labels)


def balanced(right: Tensor, labels: Tensor) -> dict[str, float]:
    """``balanced``, where classes are unequal: the mean over them of the share of their images that is ``right [N]``.

    Args:
        labels: ``[N]`` int64, all of them known.
    """
    if not unequal(labels):
        return {}
    counts = labels.bincount()
    hits = torch.bincount(labels, weights=right.double())
    return {"balanced": float((hits[counts > 0] / counts[counts > 0]).mean())}


def always_largest(train: Tensor, test: Tensor) -> dict[str, float]:
    """``top1`` and ``balanced`` of answering the largest class of ``train``, where those of ``test`` are unequal.

    Args:
        train, test: labels, -1 for none.
    """
    train, test = train[train >= 0], test[test >= 0]
    if not len(train) or not unequal(test):
        return {}
    right = test == train.bincount().argmax()
    return {"top1": float(right.double().mean()), **balanced(right, test)}
