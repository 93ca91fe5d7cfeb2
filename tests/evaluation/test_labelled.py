"""Retrieval, clustering and episodes against closed forms and definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from selfsight.errors import UserError
from selfsight.evaluation.features import Features
from selfsight.evaluation.probes.clustering import Clustering, match
from selfsight.evaluation.probes.episodes import Episodes
from selfsight.evaluation.probes.knn import other_neighbours
from selfsight.evaluation.probes.retrieval import Retrieval, average_precision

from .conftest import clusters


def test_average_precision_by_hand() -> None:
    right = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    relevant = torch.tensor([2, 3, 9, 1])
    expected = [(1 + 2 / 3) / 2, (1 / 4) / 3, 1.0, 0.0]
    torch.testing.assert_close(average_precision(right, relevant), torch.tensor(expected, dtype=torch.float64))


def test_map_over_the_whole_ranking_equals_sklearns() -> None:
    train, test = clusters(120, 4, 6, spread=1.5), clusters(20, 4, 6, spread=1.5, seed=1)
    found = Retrieval(depth=None)(train, test)["map"]
    unit = [torch.nn.functional.normalize(f.x.double(), dim=1) for f in (train, test)]
    scores = unit[1] @ unit[0].T
    each = [average_precision_score(train.known_labels == y, s) for s, y in zip(scores, test.known_labels, strict=True)]
    assert found == pytest.approx(np.mean(each), abs=1e-6)


def test_recall_counts_the_first_right_place() -> None:
    gallery = Features(torch.eye(4), torch.tensor([0, 1, 2, 3]), torch.arange(4))
    queries = torch.tensor([[4.0, 3, 2, 1], [4.0, 3, 2, 1], [4.0, 3, 2, 1]])
    test = Features(queries, torch.tensor([0, 1, 3]), torch.arange(3))
    found = Retrieval(k=[1, 2, 4])(gallery, test)
    assert [found[f"recall_at_{k}"] for k in (1, 2, 4)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found["map"] == pytest.approx((1 + 1 / 2 + 1 / 4) / 3)


def test_a_query_never_finds_itself_in_its_own_gallery() -> None:
    x = torch.eye(6)
    alone = Features(x, torch.arange(6), torch.arange(6))
    assert Retrieval(k=[1], gallery="test")(alone, alone) == {"recall_at_1": 0.0, "map": 0.0}
    pairs = Features(x.repeat_interleave(2, dim=0), torch.arange(12) // 2, torch.arange(12))
    assert Retrieval(k=[1], gallery="test")(pairs, pairs) == {"recall_at_1": 1.0, "map": 1.0}


def test_itself_may_hide_behind_exact_copies() -> None:
    """Whatever the order in which a search returns equals, a row finds the other copies and never itself."""
    x = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    x = x.repeat(4, 1)
    similarity, index = other_neighbours(x, x, 3)
    assert (index % 6 == torch.arange(24)[:, None] % 6).all()
    assert not (index == torch.arange(24)[:, None]).any()
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all(), "one copy was counted twice"
    torch.testing.assert_close(similarity, torch.ones(24, 3))


def test_queries_may_stand_anywhere_in_the_bank_or_not_in_it() -> None:
    bank = torch.eye(4)
    queries = bank[[2, 0]] + torch.tensor([0.5, 0.4, 0.3, 0.2])
    _, index = other_neighbours(queries, bank, 2, own=torch.tensor([2, -1]))
    assert index.tolist() == [[0, 1], [0, 1]]


def test_clean_clusters_are_found_and_shuffled_labels_are_not() -> None:
    train, test = clusters(300, 5, 16, spread=0.1), clusters(100, 5, 16, spread=0.1, seed=1)
    assert Clustering()(train, test) == pytest.approx({"nmi": 1, "ari": 1, "cluster_accuracy": 1})
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    found = Clustering()(train, Features(test.x, test.known_labels[order], test.indices))
    assert found["nmi"] < 0.2
    assert abs(found["ari"]) < 0.1
    assert found["cluster_accuracy"] < 0.35


def test_clusters_are_matched_one_to_one_and_on_the_training_labels() -> None:
    found = np.array([0, 0, 1, 1, 1, 2, 2])
    labels = np.array([1, 0, 1, 1, 1, 0, 0])
    assert match(found, labels, clusters=3, classes=2).tolist() == [-1, 1, 0]
    train, test = clusters(300, 3, 16, spread=0.1), clusters(90, 3, 16, spread=0.1, seed=1)
    renamed = Features(test.x, (test.known_labels + 1) % 3, test.indices)
    swapped = Clustering()(train, renamed)
    assert swapped["nmi"] == pytest.approx(1)
    assert swapped["cluster_accuracy"] == 0, "matching on the test labels would hide the wrong names"


def test_more_clusters_than_images() -> None:
    train = clusters(10, 2, 4)
    with pytest.raises(UserError, match="11 clusters were asked for of 10"):
        Clustering(clusters=11)(train, train)


def test_episodes_on_clean_and_on_meaningless_features() -> None:
    clean = clusters(200, 8, 16, spread=0.05)
    found = Episodes(episodes=30)(clean, clean)["episodes_5way_1shot"]
    assert found == {"mean": 1.0, "std": 0.0, "interval": 0.0}
    noise = Features(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), clean.labels, clean.indices)
    found = Episodes(episodes=200)(noise, noise)["episodes_5way_1shot"]
    assert found["mean"] == pytest.approx(0.2, abs=0.03)
    assert found["interval"] == pytest.approx(1.96 * found["std"] / 200**0.5)


def test_more_shots_help_and_impossible_episodes_are_refused() -> None:
    hard = clusters(320, 8, 16, spread=1.5)
    one, five = (Episodes(shots=s, episodes=50)(hard, hard)[f"episodes_5way_{s}shot"]["mean"] for s in (1, 5))
    assert one < five
    with pytest.raises(UserError, match="this set has 0 such classes"):
        Episodes(shots=30)(hard, hard)
