"""Finding images of the same class: recall@k and mean average precision by cosine similarity, exact search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selfsight.errors import UserError
from selfsight.evaluation.base import Figures
from selfsight.evaluation.features import Features, checked
from selfsight.evaluation.probes.dims import with_dims
from selfsight.evaluation.probes.knn import neighbours, other_neighbours
from selfsight.nn.sphere import directions
from selfsight.validation import one_of, takes, whole

GALLERIES = ("train", "test")


@takes(k=whole(1), gallery=one_of(*GALLERIES), depth=whole(1), dims=whole(1))
@dataclass(frozen=True)
class Retrieval:
    """Each test image is a query; what it should find are the gallery's images of its class.

    Attributes:
        k: depths of recall@k, the share of queries with at least one right image among the first k.
        gallery: ``train``, or ``test`` without the query itself.
        depth: how far down the ranking average precision looks; None is all the way, which costs a full sort.
        dims: numbers of first features to look at as well, ascending, see `probes.dims`; None: all features alone.
    """

    k: Sequence[int] = (1, 5, 10)
    gallery: str = "train"
    depth: int | None = 1000
    dims: Sequence[int] | None = None
    needs_labels = True

    @property
    def protocol(self) -> str:
        where = "training images" if self.gallery == "train" else "other test images"
        depth = "the whole ranking" if self.depth is None else f"the first {self.depth}"
        return f"retrieval: test images search the {where} by cosine similarity, same class is right; mAP over {depth}"

    def __call__(self, train: Features, test: Features) -> Figures:
        """``recall_at_<k>`` and ``map``; queries of a class the gallery lacks count as failures."""
        if self.dims is not None:
            return with_dims(self, train, test)
        train, test = checked(train, test)
        inside = self.gallery == "test"
        gallery = test if inside else train
        available = len(gallery) - inside
        depth = min(self.depth or available, available)
        if max(self.k) > available:
            raise UserError(
                f"recall at {max(self.k)} was asked for, and the gallery holds {available} images: take less."
            )
        bank, queries = directions(gallery.x), directions(test.x)
        _, index = (other_neighbours if inside else neighbours)(queries, bank, max(depth, *self.k))
        labels = test.known_labels
        right = gallery.known_labels[index] == labels[:, None]  # [M, depth]
        classes = max(gallery.classes, test.classes)
        relevant = torch.bincount(gallery.known_labels, minlength=classes)[labels] - int(inside)
        recalls = {f"recall_at_{k}": float(right[:, :k].any(dim=1).double().mean()) for k in self.k}
        return recalls | {"map": float(average_precision(right[:, :depth], relevant).mean())}


def average_precision(right: Tensor, relevant: Tensor) -> Tensor:
    """Mean of the precision at the places of right answers, over the answers that could be right within the depth.

    Args:
        right: ``[M, depth]`` bool, ranked. relevant: ``[M]``, right answers in the whole gallery.

    Returns:
        ``[M]`` float64; 0 where nothing is relevant.
    """
    place = torch.arange(1, right.shape[1] + 1, dtype=torch.float64, device=right.device)
    precision = right.double().cumsum(dim=1) / place
    return (precision * right).sum(dim=1) / relevant.clamp(min=1, max=right.shape[1])
