"""SwAV: an image is told by the cluster its other view belongs to.

Views are compared with K learnt prototypes. A batch of global views is shared evenly among the prototypes by the
Sinkhorn-Knopp algorithm, which gives every image a code; each other view of that image, small crops included, has to
predict it. For batches small beside K, embeddings of earlier batches take part in the sharing.

    Caron, Misra, Mairal, Goyal, Bojanowski, Joulin: Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments. NeurIPS 2020, arXiv:2006.09882. Code: facebookresearch/swav.

Follows the code where the paper differs: the loss averages over pairs of views (the paper adds), prototypes are
normalised before the forward (the paper: after the update), and all parameters form one group, biases and BatchNorm
included. Deviations: Sinkhorn on logarithms, which is equal and cannot overflow; every process holds the whole queue
and enters its share of it, where the authors' processes hold different queues: the codes are the same, and one
checkpoint serves any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.swav import sinkhorn, swapped_prediction
from selfsight.methods.base import Method
from selfsight.nn.distributed import rank, world_size
from selfsight.nn.heads import mlp
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.precision import float32
from selfsight.nn.prototypes import Prototypes
from selfsight.nn.queue import Queue
from selfsight.nn.queue import queue_length as rounded_length
from selfsight.validation import SWITCH, above, takes, whole

#: what the running share of samples per prototype keeps at each step
USAGE_MOMENTUM = 0.99


@takes(
    hidden_dim=whole(0), dim=whole(1), num_prototypes=whole(2), temperature=above(0), epsilon=above(0),
    sinkhorn_iterations=whole(1), hard_codes=SWITCH, crops_for_assign=whole(0), freeze_prototypes_steps=whole(0),
    queue_length=whole(0), queue_start_epoch=whole(0), batch_size=whole(1),
)  # fmt: skip
class SwAV(Method):
    """Swapping assignments between views: every crop predicts the prototypes that another crop was assigned to.

    Defaults are the authors' for ImageNet in batches of 4096. In batches of 256 they keep a queue of 3840 embeddings,
    and freeze the prototypes for 5005 steps.

    Args:
        backbone: network to be trained.
        hidden_dim: width of the projection head's hidden layer; 0 makes the head a single linear layer.
        dim: D of the embeddings.
        num_prototypes: K; about ten times the classes or more, fewer for small data.
        temperature: tau of the predictions.
        epsilon: entropy of the codes, see `sinkhorn`; 0.03 where the loss stays at ``ln K``.
        sinkhorn_iterations: see `sinkhorn`.
        hard_codes: the nearest one-hot vector in place of each code.
        crops_for_assign: A, positions of the views whose codes are predicted: the global ones.
        freeze_prototypes_steps: first optimiser steps in which prototypes do not move (an epoch of ImageNet, and one).
        queue_length: embeddings kept per entry of A, over all processes, cut to whole batches; 0 leaves the queue out.
        queue_start_epoch: first epoch (from 0) that fills the queue; it is used once it is full.
        batch_size: images per batch over all processes; only the queue asks for it.

    Attributes:
        queues: one `Queue` of unit embeddings for each entry of A.
        usage: ``[K]`` running share of global views each prototype is the nearest of; for the monitors.

    Raises:
        UserError: values that cannot be meant, or a queue shorter than a batch.
    """

    needs = ("batch_size",)
    n_views = (2, None)
    decay = "all"
    across_images = "the codes of a batch are shared out among its images"
    uncompiled = ("prototypes", "queues")  # how many rows they get changes when the queue is full
    usage: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        hidden_dim: int = 2048,
        dim: int = 128,
        num_prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        hard_codes: bool = False,
        crops_for_assign: Sequence[int] = (0, 1),
        freeze_prototypes_steps: int = 313,
        queue_length: int = 0,
        queue_start_epoch: int = 15,
        batch_size: int | None = None,
    ) -> None:
        super().__init__(backbone)
        self.projector = projection_head(backbone, hidden_dim, dim)
        self.prototypes = Prototypes(dim, num_prototypes)
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, sinkhorn_iterations
        self.hard_codes, self.A = hard_codes, list(crops_for_assign)
        self.freeze_prototypes_steps, self.queue_start_epoch = freeze_prototypes_steps, queue_start_epoch
        if queue_length and batch_size is None:
            raise UserError(f"SwAV's queue of {queue_length} keeps whole batches; say how large they are: batch_size=.")
        length, _ = rounded_length(queue_length, batch_size or 1, 1)
        if queue_length and not length:
            raise UserError(
                f"SwAV's queue_length {queue_length} is less than one batch of {batch_size}; give a multiple of the "
                "batch, or 0 for no queue."
            )
        self.queues = cast("list[Queue]", nn.ModuleList(Queue(length, dim) for _ in self.A if length))
        self.register_buffer("usage", torch.full((num_prototypes,), 1 / num_prototypes))
        # Every process keeps the same rows; DDP need not send them from the first one at each step.
        self._ddp_params_and_buffers_to_ignore = [f"queues.{i}.data" for i in range(len(self.queues))]

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        self.check_assignable(batch)
        if not self.on_prefix:
            self.prototypes.normalise()
        z = self.embed(multi_crop(self.backbone, batch.views))  # [M B, D]
        z = z.unflatten(0, (len(batch.views), -1))  # [M, B, D]
        scores = self.prototypes(z)  # [M, B, K]
        codes = self.codes(z.detach(), scores.detach())  # [|A|, B, K]
        loss = swapped_prediction(scores, codes, self.A, temperature=self.temperature)
        return {"loss": loss, **self.monitors(scores.detach(), codes)}

    def embed(self, h: Tensor) -> Tensor:
        """Features ``[M B, F]`` of all crops to unit embeddings ``[M B, D]``; BatchNorm sees all crops together."""
        return F.normalize(float32(self.projector(h)), dim=1)

    @torch.no_grad()
    def codes(self, z: Tensor, scores: Tensor) -> Tensor:
        """Codes ``[|A|, B, K]`` of this batch from its embeddings and scores; the embeddings go into the queue."""
        S = [scores[a] for a in self.A]  # [B, K] each
        if self.queue_in_use:
            earlier = [queue.rows().tensor_split(world_size())[rank()] for queue in self.queues]
            S = [torch.cat([self.prototypes(e), s]) for e, s in zip(earlier, S, strict=True)]
        if self.queues and self.epoch >= self.queue_start_epoch:
            self.collect(z=torch.stack([z[a] for a in self.A], dim=1))  # [B, |A|, D]
        Q = torch.stack([sinkhorn(s, epsilon=self.epsilon, iterations=self.iterations)[-z.shape[1] :] for s in S])
        return F.one_hot(Q.argmax(-1), Q.shape[-1]).to(Q.dtype) if self.hard_codes else Q

    def take_in(self, share: Tensor | None = None, z: Tensor | None = None) -> None:
        if share is not None:
            self.usage.copy_(self.used(share))
        if z is not None:
            for queue, rows in zip(self.queues, z.unbind(1), strict=True):
                # Of a batch that is cut when it leaves, its first rows stay longest, as in the authors' roll.
                queue.push(rows.flip(0))

    @property
    def queue_in_use(self) -> bool:
        return self.epoch >= self.queue_start_epoch and any(queue.full for queue in self.queues)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.step < self.freeze_prototypes_steps:
            self.prototypes.weight.grad = None  # no gradient at all, or weight decay and momentum would move them

    def chance_loss(self) -> float:
        """``ln K``: predictions are uniform; untrained, or collapsed."""
        return math.log(len(self.usage))

    @torch.no_grad()
    def monitors(self, scores: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """How evenly prototypes share the images, and how much a code says.

        ``code_entropy``: entropy of `usage` over ln K, 1 when all prototypes are used alike. ``live_prototypes``: share
        of prototypes that get at least a tenth of their fair share. ``code_softness``: mean entropy of a code over
        ln K; 1 means codes say nothing.
        """
        K = len(self.usage)
        S = torch.cat([scores[a] for a in self.A])  # [|A| B, K]
        nearest = S.eq(S.amax(dim=1, keepdim=True)).to(self.usage.dtype)
        usage = self.used(**self.collect(share=nearest.mean(0, keepdim=True)))
        entropies = {"code_entropy": usage, "code_softness": codes}
        found = {name: torch.special.entr(p).sum(-1).mean() / math.log(K) for name, p in entropies.items()}
        live = (usage > 0.1 / K).to(usage.dtype).mean()
        return {**found, "live_prototypes": live, "queue_used": torch.full_like(live, float(self.queue_in_use))}

    def used(self, share: Tensor) -> Tensor:
        """`usage` once it has taken in what prototypes got in each batch, ``[n, K]``."""
        share = share.mean(0)
        return USAGE_MOMENTUM * self.usage + (1 - USAGE_MOMENTUM) * share / share.sum()

    def check_assignable(self, batch: Batch) -> None:
        if min(self.A, default=-1) < 0 or max(self.A) >= len(batch.views) or len(set(self.A)) < len(self.A):
            raise UserError(
                f"SwAV's crops_for_assign is {self.A} and the views chosen give {len(batch.views)} crops; name "
                f"different positions among 0 to {len(batch.views) - 1}, those of the global crops."
            )


def projection_head(backbone: nn.Module, hidden_dim: int, dim: int) -> nn.Sequential:
    """Linear - BatchNorm - ReLU - Linear, or one linear layer where ``hidden_dim`` is 0."""
    width = cast(int, backbone.num_features)
    return mlp([width, hidden_dim, dim] if hidden_dim else [width, dim], norm=nn.BatchNorm1d, of_features=True)
