"""How good an embedding is: evaluators on frozen features, offline and while training."""

from .callbacks import OnlineEvaluation
from .diagnostics import Diagnostics
from .features import Evaluator, Features, extract
from .knn import KNN
from .linear import FewShot, LinearProbe, SGDProbe

__all__ = [
    "KNN",
    "Diagnostics",
    "Evaluator",
    "Features",
    "FewShot",
    "LinearProbe",
    "OnlineEvaluation",
    "SGDProbe",
    "extract",
]
