"""What is known of the images in an embedding: their places in a plane, clusters, classes, predictions and losses."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from selfsight.datamodules import ImageSet
from selfsight.errors import UserError
from selfsight.evaluation import Features
from selfsight.evaluation.probes import knn
from selfsight.evaluation.probes.clustering import kmeans
from selfsight.evaluation.probes.knn import neighbours
from selfsight.validation import expect, one_of

PROJECTIONS = ("tsne", "umap", "pca")
MAPPED = 100_000  # points at most
FITTED = 1500  # of them t-SNE is computed for; the others are placed between their neighbours among these
VOTERS, TEMPERATURE = 20, 0.07  # of the kNN that predicts


@dataclass(frozen=True)
class EmbeddingMap:
    """What is known of each mapped image.

    Attributes:
        images: the set they are from. indices: ``[n]``, their positions in it.
        rows: ``[n]``, which rows of the features. flat: ``[n, 2]``, their places.
        clusters, labels, predictions: ``[n]``; the last two None where no image has a label, -1 for one that has none.
        loss: ``[n]``, minus the logarithm of the share of its neighbours' votes that the true class has.
    """

    images: ImageSet
    indices: np.ndarray
    rows: np.ndarray
    flat: np.ndarray
    clusters: np.ndarray
    labels: np.ndarray | None = None
    predictions: np.ndarray | None = None
    loss: np.ndarray | None = None

    @property
    def wrong(self) -> np.ndarray:
        """``[n]`` bool, whether the prediction is another class than the label; never where there is no label."""
        if self.labels is None or self.predictions is None:
            return np.zeros(len(self.rows), dtype=bool)
        wrong: np.ndarray = (self.labels >= 0) & (self.labels != self.predictions)
        return wrong


def build_map(
    train: Features, shown: Features, images: ImageSet, projection: str = "tsne", most: int = MAPPED
) -> EmbeddingMap:
    """Places, classes, clusters, predictions and losses of (at most ``most``) images, in a shuffled order.

    Args:
        train: features of the images that predict. shown: of those mapped, which may be the same object.
        images: the set that ``shown.indices`` count in.
    """
    rows = np.random.default_rng(0).permutation(len(shown))[:most]
    mapped = shown.take(torch.from_numpy(rows))
    x = F.normalize(mapped.x, dim=1)
    flat = project_2d(x.numpy(), projection)
    classes = 0 if train.labels is None else train.classes
    k = min(classes or 10, max(1, len(x) // 4))
    clusters = kmeans(x, x, k, 20, 1, 0)[1]
    known = EmbeddingMap(images, mapped.indices.numpy(), rows, flat, clusters)
    if train.labels is None or mapped.labels is None:
        return known
    predictions, loss = votes(train, mapped, torch.from_numpy(rows) if train is shown else None)
    return replace(known, labels=mapped.labels.numpy(), predictions=predictions.numpy(), loss=loss.numpy())


def check_projection(projection: str) -> None:
    """
    Raises:
        UserError: an unknown projection, or one whose package is missing.
    """
    expect("projection", projection, one_of(*PROJECTIONS))
    if projection == "umap" and importlib.util.find_spec("umap") is None:
        raise UserError("projection=umap needs a package: pip install 'selfsight[umap]'.")


def project_2d(x: np.ndarray, projection: str) -> np.ndarray:
    """``[N, D]`` to ``[N, 2]``.

    Raises:
        UserError: see `check_projection`.
    """
    from sklearn.decomposition import PCA

    check_projection(projection)
    if projection == "pca" or len(x) < 5:
        return PCA(2, random_state=0).fit_transform(x) if min(x.shape) >= 2 else np.pad(x, ((0, 0), (0, 1)))[:, :2]
    if projection == "umap":
        from umap import UMAP

        return to_landscape(UMAP(n_neighbors=min(15, len(x) - 1), metric="cosine", random_state=0).fit_transform(x))
    from sklearn.manifold import TSNE

    some = x[:FITTED]
    perplexity = min(30.0, max(2.0, (len(some) - 1) / 4))
    flat = to_landscape(TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(some))
    if len(x) == len(some):
        return flat
    similarity, index = neighbours(torch.from_numpy(x[FITTED:]), torch.from_numpy(some), 5)
    weight = (similarity / 0.05).softmax(1)[:, :, None]
    placed = (weight * torch.from_numpy(flat)[index]).sum(1)
    return np.concatenate([flat, placed.numpy()])


def to_landscape(flat: np.ndarray) -> np.ndarray:
    """Places ``[N, 2]`` turned so that the longer side lies across, as screens do; distances stay."""
    from sklearn.decomposition import PCA

    turned: np.ndarray = PCA(2, random_state=0).fit_transform(flat)
    return turned


def votes(train: Features, test: Features, own: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Class ``[N]`` that the nearest labelled training images vote for, weighted, and the log loss of the true class.

    Args:
        own: ``[N]``, the row of each image among the training images where these are the same: none votes for itself.

    Returns:
        Answers ``[N]``, and losses ``[N]``: 0 where an image has no label.
    """
    voters = (train.known_labels >= 0).nonzero()[:, 0]
    labels = train.known_labels[voters]
    bank, queries = F.normalize(train.x[voters], dim=1), F.normalize(test.x, dim=1)
    if own is None:
        similarity, index = knn.neighbours(queries, bank, min(VOTERS, len(bank)))
    else:
        place = torch.full((len(train),), -1)
        place[voters] = torch.arange(len(voters))
        similarity, index = knn.other_neighbours(queries, bank, min(VOTERS, len(bank) - 1), place[own])
    classes = max(train.classes, test.classes)
    answers, losses = [], []
    for s, i, y in zip(similarity.split(4096), index.split(4096), test.known_labels.split(4096), strict=True):
        p = torch.zeros(len(s), classes).scatter_add_(1, labels[i], (s / TEMPERATURE).softmax(1))
        answers.append(p.argmax(1))
        of_true = p.gather(1, y.clamp(min=0)[:, None])[:, 0]
        losses.append(-of_true.clamp(min=1e-3).log().where(y >= 0, torch.zeros(())))
    return torch.cat(answers), torch.cat(losses)
