"""Do classes appear without being asked for: k-means on the features, compared with the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.evaluation.features import Features, checked
from selfsight.nn.sphere import directions
from selfsight.validation import takes, whole


@takes(clusters=whole(1), iterations=whole(1), restarts=whole(1), seed=whole(0))
@dataclass(frozen=True)
class Clustering:
    """Spherical k-means (faiss) fitted on the training features; test images go to the nearest centre.

    Attributes:
        clusters: None: as many as there are classes.
        iterations, restarts: of k-means; the restart with the nearest centres counts.
    """

    clusters: int | None = None
    iterations: int = 50
    restarts: int = 5
    seed: int = 0
    needs_labels = True

    @property
    def protocol(self) -> str:
        k = "one centre per class" if self.clusters is None else f"{self.clusters} centres"
        return (
            f"k-means on L2-normalised training features, {k}, {self.restarts} restarts; test images to the nearest "
            "centre; accuracy after matching centres to classes on the training labels"
        )

    def __call__(self, train: Features, test: Features) -> dict[str, float]:
        """``nmi`` (arithmetic mean), ``ari`` and ``cluster_accuracy`` of the test images."""
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        train, test = checked(train, test)
        clusters = self.clusters or len(train.known_labels.unique())
        if clusters > len(train):
            raise UserError(f"{clusters} clusters were asked for of {len(train)} training images: take fewer.")
        fitted, found = kmeans(train.x, test.x, clusters, self.iterations, self.restarts, self.seed)
        labels = test.known_labels.cpu().numpy()
        classes = max(train.classes, test.classes)
        matched = match(fitted, train.known_labels.cpu().numpy(), clusters, classes)[found]
        return {
            "nmi": float(normalized_mutual_info_score(labels, found)),
            "ari": float(adjusted_rand_score(labels, found)),
            "cluster_accuracy": float((matched == labels).mean()),
        }


def kmeans(
    train: Tensor, test: Tensor, clusters: int, iterations: int, restarts: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of the training and of the test rows ``[N, D]``, centres fitted on the former, all on the sphere."""
    import faiss

    x, other = (directions(rows.cpu()).contiguous() for rows in (train, test))
    best: tuple[float, Any] = (-1.0, None)
    for restart in range(restarts):
        # faiss starts from random images, which often puts two centres in one cloud; it keeps every image for training
        model = faiss.Kmeans(
            x.shape[1], clusters, niter=iterations, spherical=True, seed=seed + 1, min_points_per_centroid=1,
            max_points_per_centroid=len(x),
        )  # fmt: skip
        model.train(x.numpy(), init_centroids=spread_rows(x, clusters, seed + restart).numpy())
        agreement = float(model.index.search(x.numpy(), 1)[0].sum())
        if agreement > best[0]:
            best = agreement, model.index
    found = [best[1].search(rows.numpy(), 1)[1][:, 0] for rows in (x, other)]
    return found[0], found[1]


def spread_rows(x: Tensor, clusters: int, seed: int) -> Tensor:
    """Rows ``[clusters, D]`` to start from: each drawn with probability as its squared distance to those before.

    k-means++ (Arthur & Vassilvitskii 2007) on unit rows ``[N, D]``.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distance = torch.full((len(x),), torch.inf)
    while len(chosen) < clusters:
        distance = torch.minimum(distance, (2 - 2 * (x @ x[chosen[-1]])).clamp(min=0))
        weight = distance if distance.sum() > 0 else torch.ones_like(distance)
        cumulative = weight.double().cumsum(0)
        point = torch.rand(1, generator=generator).double() * cumulative[-1]
        chosen.append(int(torch.searchsorted(cumulative, point)))
    return x[chosen]


def match(found: np.ndarray, labels: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    """Class of each cluster, ``[clusters]``, so that the most images agree; -1 for clusters left over.

    With at least as many clusters as classes no two clusters share a class (Hungarian assignment).
    """
    from scipy.optimize import linear_sum_assignment

    together = np.zeros((clusters, classes), dtype=np.int64)
    np.add.at(together, (found, labels), 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    of = np.full(clusters, -1)
    of[rows] = columns
    return of
