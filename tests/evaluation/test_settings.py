"""Wrong settings are refused in one sentence when an evaluator is made, and a single value stands for a list of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from selfsight.errors import UserError
from selfsight.evaluation.callbacks import OnlineEvaluation
from selfsight.evaluation.dense.correspondence import DenseCorrespondence
from selfsight.evaluation.dense.probes import DenseKNN, DenseLinear
from selfsight.evaluation.dense.segmentation import folder, shapes
from selfsight.evaluation.detection.detector import Detection
from selfsight.evaluation.probes.clustering import Clustering
from selfsight.evaluation.probes.episodes import Episodes
from selfsight.evaluation.probes.knn import KNN
from selfsight.evaluation.probes.linear import FewShot, LinearProbe, SGDProbe
from selfsight.evaluation.probes.retrieval import Retrieval
from selfsight.evaluation.published import PublishedProbe
from selfsight.evaluation.views import Invariance, ViewQuality

from .conftest import clusters


def detection(**changed: Any) -> Detection:
    given: dict[str, Any] = {
        "data": None, "optimizer": dict, "masks": False, "iterations": 1, "batch_size": 1, "warmup": 0, "drops": [],
        "gamma": 0.1, "layer_decay": 1.0, "norm": "batch", "heads": "fc", "short_side": [64], "long_side": 80,
        "boxes": 1, "proposals": 1, "seed": 0,
    }  # fmt: skip
    return Detection(**given | changed)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: KNN(k=0), "k of KNN is 0; null or a whole number of at least 1"),
        (lambda: KNN(k=[]), "k of KNN is []; null or a list in which each is a whole number of at least 1"),
        (lambda: KNN(k=[5, 2.5]), "k of KNN is [5, 2.5]; null or a list in which each is a whole number of at least 1"),
        (lambda: KNN(k="many"), "k of KNN is 'many'; null or a whole number of at least 1"),
        (lambda: KNN(temperature=float("nan")), "temperature of KNN is nan; a number above 0"),
        (lambda: KNN(temperature=[0.1]), "temperature of KNN is [0.1]; a number above 0"),
        (lambda: KNN(bf16="yes"), "bf16 of KNN is 'yes'; true or false"),
        (
            lambda: KNN(backend="fais"),
            "backend of KNN is 'fais'; auto, torch or faiss was expected. Did you mean 'faiss'?",
        ),
        (lambda: OnlineEvaluation({}, every=0), "every of OnlineEvaluation is 0; a whole number of at least 1"),
        (lambda: OnlineEvaluation({}, limit=0), "limit of OnlineEvaluation is 0; null or a whole number of at least 1"),
        (lambda: Retrieval(k=-5), "k of Retrieval is -5; a whole number of at least 1"),
        (lambda: Retrieval(depth=-1), "depth of Retrieval is -1; null or a whole number of at least 1"),
        (
            lambda: Retrieval(gallery="tests"),
            "gallery of Retrieval is 'tests'; train or test was expected. Did you mean",
        ),
        (lambda: FewShot(draws=0), "draws of FewShot is 0; a whole number of at least 1"),
        (lambda: FewShot(shots=[5, 0]), "shots of FewShot is [5, 0]; null or a list in which each is a whole number"),
        (lambda: FewShot(seed=None), "seed of FewShot is null; a whole number of at least 0"),
        (lambda: LinearProbe(penalties=-0.1), "penalties of LinearProbe is -0.1; a number of at least 0"),
        (lambda: LinearProbe(folds=1), "folds of LinearProbe is 1; null or a whole number of at least 2"),
        (lambda: LinearProbe(folds=True), "folds of LinearProbe is true; null or a whole number of at least 2"),
        (
            lambda: SGDProbe(learning_rates=[]),
            "learning_rates of SGDProbe is []; a list in which each is a number above 0",
        ),
        (
            lambda: PublishedProbe("swav", epochs=0),
            "epochs of PublishedProbe is 0; null or a whole number of at least 1",
        ),
        (lambda: PublishedProbe("swav", lr=-1), "lr of PublishedProbe is -1; null or a number above 0"),
        (
            lambda: PublishedProbe("swav", first_per_class=0),
            "first_per_class of PublishedProbe is 0; null or a whole number",
        ),
        (lambda: Clustering(clusters=-2), "clusters of Clustering is -2; null or a whole number of at least 1"),
        (lambda: Clustering(restarts=0), "restarts of Clustering is 0; a whole number of at least 1"),
        (lambda: Episodes(ways=0), "ways of Episodes is 0; a whole number of at least 2"),
        (lambda: Episodes(queries=0), "queries of Episodes is 0; a whole number of at least 1"),
        (lambda: Episodes(episodes=0), "episodes of Episodes is 0; a whole number of at least 1"),
        (lambda: Invariance(images=0), "images of Invariance is 0; a whole number of at least 2"),
        (lambda: Invariance("huee"), "operations of Invariance is 'huee'; null or crop, flip"),
        (lambda: ViewQuality(views=1), "views of ViewQuality is 1; a whole number of at least 2"),
        (lambda: DenseCorrespondence(images=0), "images of DenseCorrespondence is 0; a whole number of at least 1"),
        (lambda: DenseLinear(shapes(1, 1), size=0), "size of DenseLinear is 0; a whole number of at least 1"),
        (lambda: DenseKNN(shapes(1, 1), size=64, dilate=-1), "dilate of DenseKNN is -1; a whole number of at least 0"),
        (lambda: shapes(train=-1), "train of shapes is -1; a whole number of at least 0"),
        (lambda: shapes(number=3), "number of shapes is [3]; a list of the fewest and the most shapes of an image"),
        (lambda: folder(".", test_share=1.5), "test_share of folder is 1.5; a share between 0 and 1"),
        (lambda: detection(iterations=0), "iterations of Detection is 0; a whole number of at least 1"),
        (lambda: detection(short_side=[]), "short_side of Detection is []; a list in which each is a whole number"),
        (
            lambda: detection(norm="bach"),
            "norm of Detection is 'bach'; frozen or batch was expected. Did you mean 'batch'?",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(UserError) as error:
        make()
    assert str(error.value).startswith(told)
    assert " was expected." in str(error.value)
    assert "\n" not in str(error.value)


def test_a_single_value_stands_for_a_list_of_one() -> None:
    assert KNN(k=5).k == [5]  # type: ignore[arg-type]
    assert detection(short_side=64, drops=5).short_side == [64]
    assert detection(drops=5).drops == [5]
    assert detection(drops=[]).drops == []
    assert Invariance("hue").operations == ["hue"]
    train, test = clusters(30, 3, 4), clusters(12, 3, 4, seed=1)
    assert KNN(k=5)(train, test) == KNN(k=[5])(train, test)  # type: ignore[arg-type]
    assert FewShot(shots=2)(train, test) == FewShot(shots=[2])(train, test)  # type: ignore[arg-type]


def test_right_settings_stay_what_they_are() -> None:
    assert KNN(None, 0.1) == KNN(k=None, temperature=0.1)
    assert (KNN().k, Retrieval(depth=None).depth, LinearProbe().folds) == (None, None, None)
    assert "k 1/5" in KNN(k=(1, 5)).protocol
