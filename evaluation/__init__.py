"""How good an embedding is: evaluators on frozen features, offline and while training."""

from .cache import FeatureCache
from .callbacks import OnlineEvaluation
from .clustering import Clustering
from .comparison import compare
from .correspondence import DenseCorrespondence
from .dense import DenseKNN, DenseLinear
from .diagnostics import Diagnostics
from .episodes import Episodes
from .features import Evaluator, Features, extract
from .knn import KNN
from .linear import FewShot, LinearProbe, SGDProbe
from .published import PublishedProbe
from .retrieval import Retrieval
from .views import Invariance, ViewQuality

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
    "Features",
    "FewShot",
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
