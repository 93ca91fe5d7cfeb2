"""Classes of unequal size: each counts alike, and what no network was needed for is told."""

from __future__ import annotations

import pytest
import torch

from selfsight.engine import measure
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes import balance
from selfsight.evaluation.probes.knn import KNN
from selfsight.evaluation.probes.linear import accuracies
from selfsight.evaluation.probes.logistic import Linear
from selfsight.runs import figures

LABELS = torch.tensor([0] * 14 + [1])


def test_one_of_two_classes_found_is_half() -> None:
    assert balance.balanced(LABELS == 0, LABELS) == {"balanced": 0.5}
    assert balance.balanced(torch.ones(15, dtype=torch.bool), LABELS) == {"balanced": 1.0}


def test_classes_of_one_size_need_no_balance() -> None:
    labels = torch.arange(10) % 2
    assert balance.balanced(labels == 0, labels) == {}
    assert balance.always_largest(labels, labels) == {}
    assert balance.balanced(labels == 0, torch.zeros_like(labels)) == {}, "one class is not unequal to others"


def test_the_largest_class_is_that_of_the_training_images() -> None:
    train = torch.tensor([1, 1, 1, 0, -1, -1, -1, -1])
    assert balance.always_largest(train, LABELS) == {"top1": pytest.approx(1 / 15), "balanced": 0.5}
    assert balance.always_largest(LABELS, LABELS) == {"top1": pytest.approx(14 / 15), "balanced": 0.5}


def test_probes_tell_it_and_the_table_has_a_row() -> None:
    x = torch.eye(2)[torch.zeros(15, dtype=torch.int64)]  # all images look like the first class
    bank = Features(torch.eye(2)[LABELS], LABELS, torch.arange(15))
    seen = Features(x, LABELS, torch.arange(15))
    found = KNN(k=[1])(bank, seen)
    assert (found["knn_top1"], found["knn_balanced"]) == (pytest.approx(14 / 15), 0.5)
    head = Linear(torch.eye(2)[None], torch.zeros(1, 2))
    assert accuracies(head, x, LABELS)["linear_balanced"] == 0.5
    row = measure.always_largest(bank, seen)
    assert row["knn_top1"] == row["linear_top1"] == pytest.approx(14 / 15)
    assert measure.always_largest(bank, None) == {}
    assert set(row) < set(figures.SINGLES)
