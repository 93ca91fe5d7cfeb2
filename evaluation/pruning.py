"""Which images of a data set to keep: how hard they are, and a choice by that.

    Sorscher, Geirhos, Shekhar, Ganguli, Morcos: Beyond neural scaling laws: beating power law scaling via data pruning.
    NeurIPS 2022, arXiv:2206.14486.

The authors have published scores and no program, so the rules here are a reading of the paper: which images are hard is
said by the distance to the centre of their cluster among self-supervised embeddings, and classes are kept alive by a
share that each may not fall below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError

BLOCK = 65536  # rows whose distances are computed at a time
MOST = 1000  # prototypes without classes; the paper has as many for ImageNet


class Prototypes(NamedTuple):
    """``centroids [K, D]``, the cluster of each image ``assignment [N]``, and how hard it is, ``score [N]``."""

    centroids: Tensor
    assignment: Tensor
    score: Tensor


@torch.no_grad()
def prototype_scores(embeddings: Tensor, initial: Tensor, *, iterations: int, normalise: bool = True) -> Prototypes:
    """k-means from given images, and one minus the cosine of each image with the centre of its cluster.

    High is hard: far from the prototype. A cluster that loses all images keeps its centre.

    Args:
        embeddings: ``[N, D]``. initial: ``[K]`` int64, images that are the first centres.
        iterations: of assigning images to the nearest centre (Euclidean) and taking means.
        normalise: of unit embeddings; False takes them as they are.
    """
    x = F.normalize(embeddings, dim=1) if normalise else embeddings
    centroids = x[initial]
    for _ in range(iterations):
        nearest = _nearest(x, centroids)
        counts = torch.bincount(nearest, minlength=len(centroids))[:, None].to(x.dtype)
        sums = torch.zeros_like(centroids).index_add(0, nearest, x)
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    nearest = _nearest(x, centroids)
    return Prototypes(centroids, nearest, 1 - F.cosine_similarity(x, centroids[nearest], dim=1))


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """``[N]``, which of the centroids is nearest to each row, block by block."""
    return torch.cat([torch.cdist(block, centroids).argmin(1) for block in x.split(BLOCK)])


def default_prototypes(images: int, classes: int) -> int:
    """How many prototypes: as many as classes, or without classes one for 50 images, at most `MOST`."""
    return min(images, classes or min(MOST, max(1, images // 50)))


@torch.no_grad()
def class_mean_scores(embeddings: Tensor, labels: Tensor, classes: int) -> Prototypes:
    """`prototype_scores` with the mean of an image's class, of unit embeddings, in place of its cluster's centre."""
    x = F.normalize(embeddings, dim=1)
    sums = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, labels, x)
    centroids = sums / torch.bincount(labels, minlength=classes)[:, None].clamp(min=1)
    return Prototypes(centroids, labels, 1 - F.cosine_similarity(x, centroids[labels], dim=1))


@torch.no_grad()
def el2n_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """``|softmax(z) - onehot(y)|`` of several networks: ``[M, N, C]`` and ``[N]`` to ``[M, N]`` (Paul et al. 2021)."""
    return (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).norm(dim=-1)


def choose(
    score: Tensor,
    keep: float,
    *,
    hard: bool = True,
    labels: Tensor | None = None,
    classes: int = 0,
    balance: float = 0.0,
    names: Sequence[str] = (),
) -> Tensor:
    """The images to keep, ascending: ``round(keep N)`` of the hardest, or of the easiest; of equals the first.

    With ``balance`` every class first keeps ``floor(balance n / C)`` of its own best, or all it has; the best of the
    others fill up to n. At 1 classes are as even as they can be.

    Args:
        score: ``[N]``, high is hard. labels: ``[N]`` int64 and classes: C, where classes are to be balanced.
        names: of the classes, for the sentence about one that would be empty.

    Raises:
        UserError: nothing would be kept, or a class would be left empty.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}; it is the share of images to keep, above 0 and at most 1.")
    n = round(keep * len(score))
    if n < 1:
        raise UserError(f"keep {keep} of {len(score)} images is none; keep a larger share.")
    order = (-score if hard else score).argsort(stable=True)
    chosen = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    if labels is not None and balance > 0:
        share = math.floor(balance * n / classes)
        for c in range(classes):
            chosen[order[labels[order] == c][:share]] = True
    rest = order[~chosen[order]]
    chosen[rest[: n - int(chosen.sum())]] = True
    if labels is not None and classes:
        _refuse_empty_classes(labels, chosen, classes, names)
    return chosen.nonzero()[:, 0]


def _refuse_empty_classes(labels: Tensor, chosen: Tensor, classes: int, names: Sequence[str]) -> None:
    present = torch.bincount(labels[labels >= 0], minlength=classes) > 0
    left = torch.bincount(labels[chosen & (labels >= 0)], minlength=classes) > 0
    empty = (present & ~left).nonzero()[:, 0].tolist()
    if empty:
        n, named = int(chosen.sum()), f"'{names[empty[0]]}'" if names else f"number {empty[0]}"
        balance = next((share for share in (0.5, 1) if math.floor(share * n / classes) > 0), None)
        remedy = "keep more" if balance is None else f"keep more, or set balance={balance:g}"
        raise UserError(
            f"Keeping {n:,} of {len(labels):,} images leaves {len(empty)} of {classes} classes without any, the first "
            f"is {named}: {remedy}."
        )


def evenness(counts: Tensor) -> float:
    """How even classes are: the smaller count over the larger, averaged over all pairs of classes; 1 is even."""
    counts = counts.double()
    smaller, larger = torch.minimum(counts[:, None], counts), torch.maximum(counts[:, None], counts)
    above = torch.triu_indices(len(counts), len(counts), offset=1)
    return float((smaller / larger)[above[0], above[1]].mean())
