"""How good an embedding is: evaluators on frozen features, offline and while training."""

from selfsight.compat import moved
from selfsight.evaluation.base import Evaluator, FeatureEvaluator, ImageEvaluator
from selfsight.evaluation.cache import FeatureCache
from selfsight.evaluation.callbacks import OnlineEvaluation
from selfsight.evaluation.dense.correspondence import DenseCorrespondence
from selfsight.evaluation.dense.probes import DenseKNN, DenseLinear
from selfsight.evaluation.features import Features, extract
from selfsight.evaluation.probes.clustering import Clustering
from selfsight.evaluation.probes.comparison import compare
from selfsight.evaluation.probes.diagnostics import Diagnostics
from selfsight.evaluation.probes.episodes import Episodes
from selfsight.evaluation.probes.knn import KNN
from selfsight.evaluation.probes.linear import FewShot, LinearProbe, SGDProbe
from selfsight.evaluation.probes.retrieval import Retrieval
from selfsight.evaluation.published import PublishedProbe
from selfsight.evaluation.views import Invariance, ViewQuality

__all__ = [
    "KNN",
    "Clustering",
    "DenseCorrespondence",
    "DenseKNN",
    "DenseLinear",
    "Diagnostics",
    "Episodes",
    "Evaluator",
    "FeatureCache",
    "FeatureEvaluator",
    "Features",
    "FewShot",
    "ImageEvaluator",
    "Invariance",
    "LinearProbe",
    "OnlineEvaluation",
    "PublishedProbe",
    "Retrieval",
    "SGDProbe",
    "ViewQuality",
    "compare",
    "extract",
]

_PROBES = "classification clustering comparison diagnostics episodes knn linear logistic retrieval"
__getattr__ = moved(
    __name__,
    dict.fromkeys(_PROBES.split(), "probes")
    | dict.fromkeys(("correspondence", "dilation", "segmentation"), "dense")
    | {"coco": "detection"},
)
