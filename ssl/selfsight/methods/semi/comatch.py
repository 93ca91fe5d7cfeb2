"""CoMatch: contrastive graph regularisation (Li et al., ICCV 2021, arXiv 2011.11183).

Class probabilities and embeddings of an image teach each other: pseudo-labels are smoothed over neighbours in a
memory of embeddings, and images with similar pseudo-labels form a graph that the embeddings of two strong views have
to reproduce.

As in microsoft/Semi-supervised-learning the memory keeps the aligned labels from before smoothing, and smoothing
waits for the second epoch and a filled memory. Deviation: the graph joins the images of all processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy, graph_contrast, pseudo_label_graph, smoothed
from selfsight.methods.semi.alignment import ALIGNED, QueueAlignment
from selfsight.methods.semi.base import Heads, SemiMethod
from selfsight.nn.distributed import gather, gather_without_grad
from selfsight.nn.queue import Queue
from selfsight.validation import SHARE, above, at_least, takes, whole


@takes(
    num_classes=whole(2), dim=whole(1), K=whole(1), T=above(0), alpha=SHARE, tau=at_least(0), tau_c=at_least(0),
    lambda_u=at_least(0), lambda_c=at_least(0), da_length=whole(1), queue_batches=whole(0),
)  # fmt: skip
class CoMatch(SemiMethod):
    """Contrastive graph regularisation: pseudo-labels make a graph of images, which their embeddings reproduce.

    Defaults are USB's for CIFAR-10; STL-10 takes ``lambda_c=5``.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        dim: D of the embeddings.
        K: rows of the memory; published are five global batches, of 64 labelled and 448 unlabelled images.
        T: temperature of similarities.
        alpha: share of the own label in smoothing.
        tau: confidence a pseudo-label needs.
        tau_c: similarity two pseudo-labels need to be joined in the graph.
        lambda_u: weight of the unlabelled loss.
        lambda_c: weight of the contrastive loss.
        da_length: steps in alignment's queue.
        queue_batches: steps before smoothing may start; it waits for the second epoch, too.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (3, 3)
    across_images = f"the graph of pseudo-labels joins the images of a batch, and {ALIGNED}"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        dim: int = 64,
        K: int = 2560,
        T: float = 0.2,
        alpha: float = 0.9,
        tau: float = 0.95,
        tau_c: float = 0.8,
        lambda_u: float = 1.0,
        lambda_c: float = 1.0,
        da_length: int = 32,
        queue_batches: int = 5,
    ) -> None:
        heads = Heads(backbone.num_features, num_classes, dim)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes)
        self.T, self.alpha, self.tau, self.tau_c = T, alpha, tau, tau_c
        self.lambda_u, self.lambda_c, self.queue_batches = lambda_u, lambda_c, queue_batches
        self.alignment = QueueAlignment(num_classes, da_length)
        self.memory, self.memory_labels = Queue(K, dim), Queue(K, num_classes)

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x, z_x), (logits_w, z_w), (logits_s, z_s), (_, z_other) = self.student_forward(*self.views(batch))
        with torch.no_grad():
            aligned = self.alignment(logits_w.softmax(-1))  # [M, C]
            p = self.smooth(aligned, z_w)
            mask = (p.amax(-1) >= self.tau).to(p.dtype)  # [M]
            self.memorise(z_w, aligned, z_x, y)
            graph = pseudo_label_graph(gather_without_grad(p), self.tau_c)  # [N, N], all processes' images
        L_x = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, p, mask)
        L_c = graph_contrast(gather(z_s), gather(z_other), graph, self.T)
        terms = {"loss_sup": L_x.detach(), "loss_unsup": L_u.detach(), "loss_contrast": L_c.detach()}
        total = L_x + self.lambda_u * L_u + self.lambda_c * L_c
        return {"loss": total, **terms, **self.monitors(mask, p, batch.unlabelled)}

    def smooth(self, p: Tensor, z: Tensor) -> Tensor:
        """``alpha p + (1 - alpha)`` the memory's labels weighted by similarity, once the memory means something."""
        if self.epoch == 0 or self.step <= self.queue_batches:
            return p
        return smoothed(p, z, self.memory.data, self.memory_labels.data, self.T, self.alpha)

    def memorise(self, z: Tensor, p: Tensor, z_x: Tensor, y: Tensor) -> None:
        """Keep embeddings and labels for the memory: ``[M, D]``, ``[M, C]``; of labelled images ``[B, D]``, ``[B]``."""
        self.collect(z=z, p=p, z_x=z_x, p_x=F.one_hot(y, self.num_classes).to(p.dtype))

    def take_in(self, z: Tensor, p: Tensor, z_x: Tensor, p_x: Tensor) -> None:
        self.memory.push(torch.cat([z, z_x]))
        self.memory_labels.push(torch.cat([p, p_x]))
