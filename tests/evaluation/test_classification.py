"""Figures of classifiers against cases whose answer is known."""

from __future__ import annotations

import pytest
import torch

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.evaluation.probes.classification import classification_figures, expected_calibration_error, predict


def test_confusion_and_accuracy_of_every_class() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    answers = torch.tensor([0, 1, 1, 1, 0, 2])
    figures = classification_figures(5 * torch.nn.functional.one_hot(answers, 4).float(), labels)
    assert figures["confusion"] == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert figures["per_class"] == [0.5, pytest.approx(2 / 3), 1.0, None]
    assert figures["top1"] == pytest.approx(4 / 6)
    assert "top5" not in figures


def test_calibration_error_of_known_gaps() -> None:
    confidence = torch.tensor([0.9] * 10 + [0.6] * 10)
    right = torch.tensor([True] * 9 + [False] + [True] * 3 + [False] * 7)
    assert expected_calibration_error(confidence, right) == pytest.approx(0.5 * 0.0 + 0.5 * 0.3, abs=1e-6)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert expected_calibration_error(confidence[order], right[order]) == pytest.approx(0.15, abs=1e-6)


def test_a_network_that_is_sure_and_right_has_no_calibration_error_and_one_that_is_wrong_all_of_it() -> None:
    labels = torch.arange(6)
    sure = 1e4 * torch.eye(6)
    assert classification_figures(sure, labels)["ece"] == pytest.approx(0, abs=1e-9)
    assert classification_figures(sure.roll(1, 0), labels)["ece"] == pytest.approx(1, abs=1e-9)
    assert classification_figures(sure.roll(1, 0), labels)["nll"] > 100


def test_images_without_a_label_are_left_out_and_the_network_is_as_before() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3)).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    batches = [Batch([torch.randn(4, 3, 1, 1)], torch.arange(4), torch.tensor([0, -1, 2, -1]))]
    scores, labels = predict(network, batches)
    assert labels.tolist() == [0, 2]
    assert scores.shape == (2, 3)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert network[1].training
    with pytest.raises(UserError, match="No held-out image has a label"):
        predict(network, [Batch([torch.randn(2, 3, 1, 1)], torch.arange(2), torch.tensor([-1, -1]))])
