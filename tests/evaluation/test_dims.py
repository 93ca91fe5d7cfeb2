"""Accuracy against the number of features: `dims` of kNN, linear probe and retrieval, and its chart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from selfsight.errors import UserError
from selfsight.evaluation.base import FeatureEvaluator
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.dims import at_dims, check_dims
from selfsight.evaluation.probes.knn import KNN
from selfsight.evaluation.probes.linear import FewShot, LinearProbe
from selfsight.evaluation.probes.retrieval import Retrieval
from selfsight.reporting import dims


def features(n: int, seed: int) -> Features:
    """Of three classes, which the second number tells apart, and later ones better."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    x = torch.randn(n, 6, generator=g)
    x[:, 1] += 1.5 * labels
    x[:, 3] += 3.0 * labels
    return Features(x, labels, torch.arange(n))


@pytest.mark.parametrize(
    ("evaluator", "main"),
    [(KNN(), "knn_top1"), (LinearProbe(), "linear_top1"), (Retrieval(), "map")],
    ids=["knn", "linear", "retrieval"],
)
def test_each_prefix_is_evaluated_like_features_of_that_width(evaluator: FeatureEvaluator, main: str) -> None:
    train, test = features(90, 0), features(60, 1)
    whole = evaluator(train, test)
    found = at_dims(evaluator, [2, 4])(train, test)
    curve = found.pop(f"{main}_by_dim")
    assert found == whole
    assert curve == {
        **{str(m): evaluator(*(replace(f, x=f.x[:, :m].clone()) for f in (train, test)))[main] for m in (2, 4)},
        "6": whole[main],
    }
    assert curve["2"] < curve["4"]


def test_what_a_person_has_said_stays_and_what_cannot_look_at_prefixes_is_left() -> None:
    assert at_dims(KNN(dims=[4]), [2]) == KNN(dims=[4])
    assert at_dims(KNN(dims=[4]), None, instead=True) == KNN()
    assert at_dims(FewShot(), [2]) == FewShot()
    check_dims(KNN(dims=[2, 6]), 6)
    check_dims(FewShot(), 1)


@pytest.mark.parametrize("wrong", [[2, 7], [4, 2], [2, 2]])
def test_dims_that_features_do_not_have_are_refused_before_and_after_training(wrong: list[int]) -> None:
    with pytest.raises(UserError, match=r"^The nested dimensions are \["):
        check_dims(KNN(dims=wrong), 6)
    with pytest.raises(UserError, match=r"^The nested dimensions are \["):
        KNN(dims=wrong)(features(30, 0), features(30, 1))


def test_the_report_draws_a_line_for_each_network_and_each_later_evaluation() -> None:
    summary = {
        "pretrained": {"knn_top1": 0.9, "knn_top1_by_dim": {"8": 0.7, "32": 0.9}},
        "untrained": {"knn_top1": 0.5, "knn_top1_by_dim": {"8": 0.2, "32": 0.5}},
    }
    later = {"knn-dims": {"result": {"knn_top1_by_dim": {"16": 0.8, "32": 0.9}}}, "linear": {"result": {"x": 1.0}}}
    found = dims.curves({"untrained": summary["untrained"], "knn-dims": later["knn-dims"]["result"]})
    assert found == {"knn_top1": {"untrained": {"8": 0.2, "32": 0.5}, "knn-dims": {"16": 0.8, "32": 0.9}}}
    figure = dims.chart("knn_top1", found["knn_top1"])
    assert [line.name for line in figure.data] == ["untrained", "knn-dims"]
    assert list(figure.layout.xaxis.ticktext) == ["8", "16", "32"]
    page = dims.section(summary, later)
    assert all(text in page for text in ("id='dims'", "pretrained", "knn-dims"))
    assert dims.section({"pretrained": {"knn_top1": 0.9}}, {}) == ""
