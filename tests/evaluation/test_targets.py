"""Probes of several labels and of numbers, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import nn

from selfsight.contracts import Batch, Targets
from selfsight.errors import UserError
from selfsight.evaluation import KNN, LinearProbe
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.classification import figures
from selfsight.evaluation.probes.targets import linear_outputs, target_figures, votes
from selfsight.methods.finetune import FineTune

from ..small import SmallNet

NAN = float("nan")


def of(n: int, kind: str, *, seed: int = 0, noise: float = 0.5) -> Features:
    """Features of 6 dimensions whose targets are linear in them, up to noise; of labels the signs."""
    weight = torch.randn(6, 3, generator=torch.Generator().manual_seed(9))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    y = x @ weight + noise * torch.randn(n, 3, generator=g)
    values = (y > 0).float() if kind == "multilabel" else 10 + 3 * y
    return Features(x, None, torch.arange(n), targets=Targets(values, ("a", "b", "c"), kind))


def test_figures_of_labels_are_scikit_learns() -> None:
    g = torch.Generator().manual_seed(0)
    said, truth = torch.rand(40, 3, generator=g), (torch.rand(40, 3, generator=g) < 0.4).float()
    found = target_figures(said, Targets(truth, ("a", "b", "c"), "multilabel"))
    each = [average_precision_score(truth[:, i], said[:, i]) for i in range(3)]
    assert found["map"] == pytest.approx(np.mean(each), abs=1e-6)
    assert found["map_of"] == pytest.approx(dict(zip("abc", each, strict=True)), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(truth, said >= 0.5, average="macro"), abs=1e-6)


def test_what_is_not_known_changes_nothing() -> None:
    said = torch.tensor([[0.9], [0.2], [0.8], [0.6]])
    known = target_figures(said[:3], Targets(torch.tensor([[1.0], [0], [1]]), ("a",), "multilabel"))
    assert target_figures(said, Targets(torch.tensor([[1.0], [0], [1], [NAN]]), ("a",), "multilabel")) == known
    assert known == {"map": 1.0, "f1": 1.0}
    numbers = Targets(torch.tensor([[1.0, 5], [2, NAN], [3, NAN], [NAN, NAN]]), ("a", "b"), "regression")
    found = target_figures(torch.tensor([[1.0, 9], [2, 9], [4, 9], [7, 9]]), numbers)
    assert found["r2_of"] == pytest.approx({"a": 0.5})  # of b a single value is known
    assert found["r2"] == pytest.approx(0.5)


def test_labels_that_no_test_image_has_are_left_out() -> None:
    targets = Targets(torch.tensor([[1.0, 0], [0, 0]]), ("a", "b"), "multilabel")
    assert target_figures(torch.tensor([[0.9, 0.9], [0.1, 0.9]]), targets) == {
        "map": 1.0,
        "f1": 1.0,
        "map_of": {"a": 1.0},
    }


def test_votes_by_hand() -> None:
    values = torch.tensor([[[1.0, 4.0], [0.0, NAN], [1.0, NAN]]])
    assert votes(torch.tensor([[1.0, 2.0, 1.0]]), values).tolist() == [[0.5, 4.0]]


def test_knn_is_the_mean_of_equally_near_neighbours() -> None:
    bank = Features(
        torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), None, torch.arange(4),
        targets=Targets(torch.tensor([[1.0], [3], [10], [20]]), ("age",), "regression"),
    )  # fmt: skip
    asked = Features(
        torch.tensor([[2.0, 0], [0, 2]]), None, torch.arange(2),
        targets=Targets(torch.tensor([[2.0], [15]]), ("age",), "regression"),
    )  # fmt: skip
    found = KNN(k=[1, 2])(bank, asked)
    assert found["knn_r2"] == found["knn_k2_r2"] == pytest.approx(1.0)
    assert found["knn_k1_r2"] == pytest.approx(r2_score([2, 15], [1, 10]))


@pytest.mark.parametrize(("kind", "name"), [("multilabel", "map"), ("regression", "r2")])
def test_probes_find_what_is_linear(kind: str, name: str) -> None:
    train, test = of(400, kind), of(200, kind, seed=1)
    linear = LinearProbe()(train, test)
    assert linear[f"linear_{name}"] > 0.9
    assert set(linear[f"linear_{name}_of"]) == {"a", "b", "c"}
    shuffled = Features(train.x[torch.randperm(400)], None, train.indices, targets=train.targets)
    assert LinearProbe()(shuffled, test)[f"linear_{name}"] < 0.7
    nearest = KNN(k=[10])(train, test)[f"knn_{name}"]
    assert KNN(k=[10])(shuffled, test)[f"knn_{name}"] < nearest


def test_linear_outputs_are_scikit_learns() -> None:
    train, test = of(120, "regression"), of(10, "regression", seed=1)
    penalty, targets = 0.1, train.targets
    assert targets is not None
    mean, std = targets.values.mean(0), targets.values.std(0, correction=0)
    ridge = Ridge(alpha=penalty * 120).fit(train.x, (targets.values - mean) / std)
    expected = torch.from_numpy(np.asarray(ridge.predict(test.x))) * std + mean
    torch.testing.assert_close(
        linear_outputs(train.x, targets, [penalty], test.x)[0], expected.float(), rtol=1e-4, atol=1e-4
    )
    labels = of(120, "multilabel").targets
    assert labels is not None
    said = linear_outputs(train.x, labels, [penalty], test.x)[0]
    for i in range(3):  # of two opposite heads of half the weight each the penalty counts half
        model = LogisticRegression(C=2 / (penalty * 120), tol=1e-6).fit(train.x, labels.values[:, i])
        np.testing.assert_allclose(said[:, i], model.predict_proba(test.x)[:, 1], atol=2e-3)


@pytest.mark.parametrize("kind", ["multilabel", "regression"])
def test_fine_tuning_learns_targets_in_their_own_units(kind: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(32, 3, 8, 8)
    bright = images.mean((2, 3))
    values = (bright > 0).float() if kind == "multilabel" else 100 + 40 * bright
    values[0, 0] = NAN
    targets = Targets(values, ("r", "g", "b"), kind)
    method = FineTune(SmallNet(norm=lambda _: nn.Identity()), num_classes=3, targets=targets, plain_classifier=False)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.02)
    batch = Batch([images], torch.arange(32), targets=targets)
    for _ in range(150):
        loss = method.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = figures(method.classifiers()["student"], [batch])
    assert found["map" if kind == "multilabel" else "r2"] > 0.8
    if kind == "regression":
        assert float(method.network(images).detach().mean()) == pytest.approx(100, abs=10)


def test_what_mixes_classes_is_refused() -> None:
    targets = Targets(torch.rand(4, 2), ("age", "height"), "regression")
    with pytest.raises(UserError, match=r"method.mixup is for classes, and the images have the numbers age, height"):
        FineTune(SmallNet(), num_classes=2, targets=targets, mixup=0.8)
