"""DeepCluster-v2: at the start of every epoch images are clustered, during it every crop predicts its image's cluster.

The embeddings of the last epoch are grouped by k-means on the sphere, several times with other starts; the centroids
become the prototypes of as many heads, which are not trained. All crops of an image, large and small, are to be
assigned to its cluster in every head.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments. NeurIPS 2020, arXiv:2006.09882, appendix D. Code: facebookresearch/swav, main_deepclusterv2.py.

Deviations: the authors fill the memory in a pass over the data before training; here the first epoch does, with a loss
of 0, so that one epoch more is needed. Every process holds the memory of all, and clusters its share of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.deepclusterv2 import UNASSIGNED, cluster_prediction, spherical_kmeans
from selfsight.methods.base import Method
from selfsight.methods.swav import projection_head
from selfsight.nn.distributed import all_reduce_sum, rank, world_size
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.precision import float32
from selfsight.nn.prototypes import Prototypes
from selfsight.validation import above, takes, whole


@takes(
    num_images=whole(1), hidden_dim=whole(0), dim=whole(1), num_prototypes=whole(2), temperature=above(0),
    crops_for_assign=whole(0), kmeans_iterations=whole(1),
)  # fmt: skip
class DeepClusterV2(Method):
    """Clustering in turn with learning: crops predict the cluster of their image, found at the start of each epoch.

    Defaults are the authors' for ImageNet.

    Args:
        backbone: network to be trained.
        num_images: N, images of the data set.
        hidden_dim: width of the projection head's hidden layer; 0 makes the head a single linear layer.
        dim: D of the embeddings.
        num_prototypes: K of each of H heads.
        temperature: tau of the predictions.
        crops_for_assign: A, positions of the views whose embeddings are remembered; head h clusters the (h mod |A|)-th.
        kmeans_iterations: rounds of k-means at the start of an epoch.

    Attributes:
        memory: ``[|A|, N, D]`` last embedding of each image.
        known: ``[N]`` whether there is one.
        clusters: ``[H, N]`` cluster of each image, `UNASSIGNED` where it has none.

    Raises:
        UserError: values that cannot be meant, or more clusters than images.
    """

    needs = ("num_images",)
    n_views = (2, None)
    decay = "all"
    memory: Tensor
    known: Tensor
    clusters: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_images: int,
        hidden_dim: int = 2048,
        dim: int = 128,
        num_prototypes: Sequence[int] = (3000, 3000, 3000),
        temperature: float = 0.1,
        crops_for_assign: Sequence[int] = (0, 1),
        kmeans_iterations: int = 10,
    ) -> None:
        super().__init__(backbone)
        if max(num_prototypes) > num_images:
            raise UserError(
                f"DeepCluster-v2 was given heads of {list(num_prototypes)} prototypes and {num_images} images; "
                "clusters cannot be more than images, set method.num_prototypes."
            )
        self.projector = projection_head(backbone, hidden_dim, dim)
        heads = nn.ModuleList(Prototypes(dim, K).requires_grad_(False) for K in num_prototypes)
        self.prototypes = cast("list[Prototypes]", heads)
        self.temperature, self.A, self.kmeans_iterations = temperature, list(crops_for_assign), kmeans_iterations
        self.register_buffer("memory", torch.zeros(len(self.A), num_images, dim))
        self.register_buffer("known", torch.zeros(num_images, dtype=torch.bool))
        self.register_buffer("clusters", torch.full((len(heads), num_images), UNASSIGNED))
        self._ddp_params_and_buffers_to_ignore = ["memory", "known", "clusters"]

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        h = multi_crop(self.backbone, batch.views)  # [M B, F]
        z = F.normalize(float32(self.projector(h)), dim=1)  # [M B, D]
        scores = [C(z) for C in self.prototypes]  # [M B, K_h] each
        loss = cluster_prediction(scores, self.clusters[:, batch.indices], temperature=self.temperature)
        z = z.detach().unflatten(0, (len(batch.views), -1))  # [M, B, D]
        self.remember(torch.stack([z[a] for a in self.A]), batch.indices)
        return {"loss": loss}

    def before_step(self) -> None:
        if self.step and self.step % self.clock.steps_per_epoch == 0:
            self.cluster()

    @torch.no_grad()
    def cluster(self) -> None:
        """New centroids and clusters from the memory; where k-means starts follows from the epoch."""
        known = self.known.nonzero().squeeze(1)
        own = known.tensor_split(world_size())[rank()]
        draws = torch.Generator().manual_seed(self.epoch)
        for h, C in enumerate(self.prototypes):
            bank = self.memory[h % len(self.A)]
            start = known[torch.randperm(len(known), generator=draws)[: len(C.weight)].to(known.device)]
            if len(start) < len(C.weight):
                raise UserError(
                    f"DeepCluster-v2 was to find {len(C.weight)} clusters among {len(known)} images seen in the last "
                    "epoch; take fewer prototypes or longer epochs."
                )
            centroids, nearest = spherical_kmeans(bank[own], bank[start], self.kmeans_iterations)
            C.weight.copy_(centroids)
            found = torch.zeros_like(self.clusters[h])
            found[own] = nearest - UNASSIGNED
            self.clusters[h] = all_reduce_sum(found) + UNASSIGNED

    def remember(self, z: Tensor, indices: Tensor) -> None:
        """Keep embeddings ``[|A|, B, D]`` of the images ``indices [B]`` for the memory."""
        self.collect(z=z.transpose(0, 1), index=indices)

    def take_in(self, z: Tensor, index: Tensor) -> None:
        """Write embeddings ``[N, |A|, D]`` of the images ``index [N]`` down."""
        self.memory[:, index] = z.transpose(0, 1).to(self.memory.dtype)
        self.known[index] = True

    def chance_loss(self) -> float:
        return sum(math.log(len(C.weight)) for C in self.prototypes) / len(self.prototypes)
