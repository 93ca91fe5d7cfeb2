"""Batches from one cluster each: the sampler of multistage contrastive learning (MCL; MajorDavidZhang/MCL, data.py).

What separates the clusters is what earlier stages have learned. A batch from within one holds negatives that earlier
stages find alike, so that the next has to learn something else; its loss is any contrastive one, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selfsight.datamodules.loading.order import Order
from selfsight.errors import UserError


def pseudo_labels(clusters: Tensor, number: int) -> Tensor:
    """``((c_0 K + c_1) K + c_2) …``: one label for the clusters of an image in every stage.

    The paper's rule. The released program reads the last stage's clusters for every stage, so that nothing is crossed.

    Args:
        clusters: ``[stages, N]`` int64, the first stage first. number: K, clusters of a stage.

    Returns:
        ``[N]`` int64 below ``K^stages``.
    """
    labels = torch.zeros_like(clusters[0])
    for stage in clusters:
        labels = labels * number + stage
    return labels


def cluster_batches(labels: Tensor, orders: Sequence[Tensor], batch_size: int, rank: int = 0, world: int = 1) -> Tensor:
    """Batches ``[n, batch_size]`` of one process, each from one cluster, the clusters in turn.

    A cluster gives whole batches for all processes and leaves out the rest; one of fewer than ``world batch_size``
    images gives none. Of its images in their order, process r has every ``world``-th from r on, and takes from the end.

    Args:
        labels: ``[N]`` int64, cluster of each image.
        orders: for each cluster, a permutation of its images, which stand in the order of the data set.
        batch_size: images of a batch of one process.
    """
    lists = []
    for cluster, order in enumerate(orders):
        members = (labels == cluster).nonzero()[:, 0][order]
        whole = len(members) // (world * batch_size) * world * batch_size
        lists.append(list(members[:whole][rank::world].flip(0).split(batch_size)) if whole else [])
    turns = max(map(len, lists), default=0)
    batches = [batches[turn] for turn in range(turns) for batches in lists if turn < len(batches)]
    return torch.stack(batches) if batches else torch.zeros(0, batch_size, dtype=torch.int64)


@dataclass(frozen=True)
class ClusterOrder(Order):
    """An `Order` whose batches hold images of one cluster each; the batches of an epoch come shuffled.

    Attributes:
        labels: ``[images]`` int64, cluster of each image.

    Raises:
        UserError: no cluster fills a batch.
    """

    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if len(self.labels) != self.images:
            raise UserError(
                f"{len(self.labels)} clusters were given for {self.images} images; give one for each image."
            )
        if self.steps < 1:
            raise UserError(
                f"batch_size is {self.batch_size} and the largest cluster has {int(torch.bincount(self.labels).max())} "
                f"of the {self.images} images; choose a smaller batch_size or fewer clusters."
            )
        super().__post_init__()

    @property
    def length(self) -> int:
        """Images of an epoch."""
        return self.steps * self.batch_size

    @property
    def steps(self) -> int:
        """Batches per epoch: those that the clusters fill."""
        return int((torch.bincount(self.labels) // self.batch_size).sum())

    @property
    def lost(self) -> float:
        """Share of the images that an epoch leaves out."""
        return 1 - self.length / self.images

    def batches(self, epoch: int, rank: int = 0, world: int = 1) -> list[Tensor]:
        """As in `Order`: of one process, ``[batch_size / world]`` each."""
        if self.batch_size % world:
            return super().batches(epoch, rank, world)
        generator = torch.Generator().manual_seed(self.seed + epoch)
        orders = [torch.randperm(int(n), generator=generator) for n in torch.bincount(self.labels)]
        batches = cluster_batches(self.labels, orders, self.batch_size // world, rank, world)
        return list(batches[torch.randperm(len(batches), generator=generator)])
