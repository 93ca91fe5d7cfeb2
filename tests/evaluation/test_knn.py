from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from selfsight.errors import UserError
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.clustering import Clustering
from selfsight.evaluation.probes.diagnostics import Diagnostics
from selfsight.evaluation.probes.episodes import Episodes
from selfsight.evaluation.probes.knn import KNN, neighbours, true_class_ranks
from selfsight.evaluation.probes.linear import FewShot, LinearProbe, SGDProbe
from selfsight.evaluation.probes.retrieval import Retrieval

from .conftest import clusters


def naive(train: Features, test: Features, k: int, temperature: float) -> torch.Tensor:
    """Votes of each class ``[M, C]``, by the definition, image by image, in float64."""
    bank, queries = F.normalize(train.x.double(), dim=1), F.normalize(test.x.double(), dim=1)
    votes = torch.zeros(len(test), train.classes, dtype=torch.float64)
    for i, query in enumerate(queries):
        similarity = bank @ query
        for j in similarity.argsort(descending=True)[:k]:
            votes[i, train.known_labels[j]] += math.exp(similarity[j] / temperature)
    return votes


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equals_the_definition(backend: str) -> None:
    train, test = clusters(300, 7, 5, spread=1.0), clusters(60, 7, 5, spread=1.0, seed=1)
    results = KNN(backend=backend)(train, test)
    for k in (1, 5, 20, 200):
        votes = naive(train, test, k, 0.07)
        top = votes.topk(5, dim=1)
        hits = (top.indices == test.known_labels[:, None]) & (top.values > 0)
        assert results[f"knn_k{k}_top1"] == pytest.approx(hits[:, 0].double().mean().item(), abs=1e-12)
        assert results[f"knn_k{k}_top5"] == pytest.approx(hits.any(dim=1).double().mean().item(), abs=1e-12)
    assert results["knn_top1"] == results["knn_k20_top1"]
    assert results["knn_top5"] == results["knn_k20_top5"]
    assert 0.4 < results["knn_top1"] < 1, "the case has to be hard enough to tell"


def test_backends_find_the_same_neighbours_in_any_chunking() -> None:
    bank = F.normalize(torch.randn(500, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    queries = F.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    s1, i1 = neighbours(queries, bank, 30, backend="torch", chunk_bytes=1)
    s2, i2 = neighbours(queries, bank, 30, backend="torch")
    s3, i3 = neighbours(queries, bank, 30, backend="faiss")
    assert torch.equal(i1, i2)
    assert torch.equal(i1, i3)
    torch.testing.assert_close(s1, s2)
    torch.testing.assert_close(s1, s3)
    assert bool((s1.diff(dim=1) <= 0).all())


def test_the_scale_of_the_features_does_not_matter() -> None:
    train, test = clusters(120, 6, 4, spread=1.0), clusters(50, 6, 4, spread=1.0, seed=1)
    scaled = Features(train.x * torch.linspace(0.1, 50, 120)[:, None], train.labels, train.indices)
    assert KNN()(train, test) == KNN()(scaled, test)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("k", [1, 5, 40, 90, 120])
def test_of_equally_near_images_the_first_counts(backend: str, k: int) -> None:
    """Copies in the bank, more of them than are sought, wherever they stand; and all images one and the same."""
    generator = torch.Generator().manual_seed(0)
    distinct = F.normalize(torch.randn(6, 37, generator=generator), dim=1)
    bank = distinct[torch.randint(0, 6, (120,), generator=generator)]
    queries = F.normalize(distinct + 0.1 * torch.randn(6, 37, generator=generator), dim=1)
    exact = torch.stack([(bank.double() * query).sum(dim=1) for query in queries.double()])  # copies are equal
    expected = exact.sort(dim=1, descending=True, stable=True)
    similarity, index = neighbours(queries, bank, k, backend=backend)
    assert torch.equal(index, expected.indices[:, :k])
    torch.testing.assert_close(similarity.double(), expected.values[:, :k], rtol=0, atol=1e-6)
    collapsed = bank[:1].expand(len(bank), -1).contiguous()
    assert torch.equal(neighbours(queries, collapsed, k, backend=backend)[1], torch.arange(k).expand(6, -1))


def test_signs_and_steps_are_compared_exactly() -> None:
    """Many cosines of such features are equal, though sums in float32 are not."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-1, 2, (400, 48), generator=generator).float()
    rows[:, 0] = 1.0
    x = F.normalize(rows, dim=1)
    for k in (1, 20, 200):
        assert torch.equal(neighbours(x[:50], x, k, backend="torch")[1], neighbours(x[:50], x, k, backend="faiss")[1])


def flat(figures: dict[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in figures.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30, 1e37])
@pytest.mark.parametrize(
    "probe",
    [
        KNN(),
        KNN(backend="torch"),
        LinearProbe(),
        SGDProbe(epochs=3),
        FewShot(draws=2),
        Diagnostics(),
        Clustering(),
        Retrieval(),
        Episodes(episodes=5, queries=4),
    ],
)
def test_the_unit_of_the_features_does_not_matter(probe: Any, scale: float) -> None:
    train, test = clusters(120, 6, 4, spread=1.0), clusters(60, 6, 4, spread=1.0, seed=1)
    in_another_unit = [replace(part, x=part.x * scale) for part in (train, test)]
    expected, got = flat(probe(train, test)), flat(probe(*in_another_unit))
    assert got == pytest.approx(expected, rel=1e-3)


def test_one_image_of_another_unit_has_its_direction_all_the_same() -> None:
    train, test = clusters(120, 6, 4, spread=1.0), clusters(50, 6, 4, spread=1.0, seed=1)
    scales = torch.ones(120, 1)
    scales[::3], scales[1::3] = 1e18, 1e-18
    assert KNN()(replace(train, x=train.x * scales), test) == KNN()(train, test)


def test_an_extreme_temperature_neither_overflows_nor_ties() -> None:
    train, test = clusters(90, 3, 4, spread=1.0), clusters(30, 3, 4, spread=1.0, seed=1)
    cold = KNN(k=[20], temperature=1e-4)(train, test)["knn_top1"]
    assert cold == KNN(k=[1])(train, test)["knn_top1"], "at T -> 0 the nearest neighbour decides"
    hot = KNN(k=[20], temperature=1e6)(train, test)["knn_top1"]
    _, index = neighbours(F.normalize(test.x, dim=1), F.normalize(train.x, dim=1), 20)
    majority = F.one_hot(train.known_labels[index]).sum(dim=1).argmax(dim=1)
    assert hot == pytest.approx((majority == test.known_labels).double().mean().item(), abs=0.04)


def test_classes_come_from_the_bank_and_the_test_set_may_be_a_part_or_more() -> None:
    train = clusters(90, 3, 8, spread=0.01)
    part = clusters(30, 3, 8, spread=0.01, seed=1)
    only_two = part.take(part.known_labels == 2)
    assert KNN()(train, only_two)["knn_top1"] == 1
    beyond = Features(part.x, part.known_labels + 7, part.indices)  # labels 7, 8, 9: never seen
    assert KNN()(train, beyond)["knn_top1"] == 0


def test_a_class_nobody_voted_for_is_not_among_the_first_five() -> None:
    similarity, voters = torch.tensor([[0.9, 0.5]]), torch.tensor([[3, 3]])
    ranks = true_class_ranks(similarity, voters, torch.tensor([0]), [2], 0.07, classes=9)
    assert ranks[2].item() == 9
    ranks = true_class_ranks(similarity, voters, torch.tensor([3]), [2], 0.07, classes=9)
    assert ranks[2].item() == 0


def test_standard_k_beyond_the_bank_are_left_out_and_asked_for_ones_refused() -> None:
    train, test = clusters(30, 3, 4), clusters(9, 3, 4, seed=1)
    assert set(KNN()(train, test)) == {"knn_top1", "knn_k1_top1", "knn_k5_top1", "knn_k20_top1"}
    with pytest.raises(UserError, match="k = 31 neighbours were asked for, and the bank holds 30"):
        KNN(k=[1, 31])(train, test)


def test_bfloat16_is_close() -> None:
    train, test = clusters(400, 10, 32, spread=1.5), clusters(200, 10, 32, spread=1.5, seed=1)
    exact, rounded = KNN()(train, test)["knn_top1"], KNN(bf16=True)(train, test)["knn_top1"]
    assert abs(exact - rounded) <= 0.02


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"backend": "fais"}, "Did you mean 'faiss'"),
        ({"k": [0, 5]}, r"k of KNN is \[0, 5\]; null or a list in which each is a whole number of at least 1"),
        ({"temperature": 0.0}, "temperature of KNN is 0.0; a number above 0"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        KNN(**wrong)  # type: ignore[arg-type]
