"""CoMatch: contrastive graph regularisation (Li et al., ICCV 2021, arXiv 2011.11183).

Class probabilities and embeddings of an image teach each other: pseudo-labels are smoothed over neighbours in a
memory of embeddings, and images with similar pseudo-labels form a graph that the embeddings of two strong views have
to reproduce.

As in microsoft/Semi-supervised-learning the memory keeps the aligned labels from before smoothing, and smoothing
waits for the second epoch and a filled memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy, graph_contrast, pseudo_label_graph, smoothed
from selfsight.methods.semi.alignment import QueueAlignment
from selfsight.methods.semi.base import Heads, SemiMethod
from selfsight.nn.queue import Queue


class CoMatch(SemiMethod):
    """
    Args:
        labels, num_classes: see `SemiMethod`.
        dim: D of the embeddings. K: rows of the memory (published: five global batches, labelled and unlabelled).
        T: temperature of similarities. alpha: share of the own label in smoothing.
        tau: confidence a pseudo-label needs. tau_c: similarity two pseudo-labels need to be joined in the graph.
        lambda_u, lambda_c: weights of the unlabelled and the contrastive loss. da_length: batches in alignment's queue.
        queue_batches: steps before smoothing may start.
    """

    n_views = (3, 3)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        dim: int,
        K: int,
        T: float,
        alpha: float,
        tau: float,
        tau_c: float,
        lambda_u: float,
        lambda_c: float,
        da_length: int,
        queue_batches: int,
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
            self.memorise(torch.cat([z_w, z_x]), torch.cat([aligned, F.one_hot(y, self.num_classes).to(p.dtype)]))
            graph = pseudo_label_graph(p, self.tau_c)  # [M, M]
        L_x = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, p, mask)
        L_c = graph_contrast(z_s, z_other, graph, self.T)
        terms = {"loss_sup": L_x.detach(), "loss_unsup": L_u.detach(), "loss_contrast": L_c.detach()}
        total = L_x + self.lambda_u * L_u + self.lambda_c * L_c
        return {"loss": total, **terms, **self.monitors(mask, p, batch.unlabelled)}

    def smooth(self, p: Tensor, z: Tensor) -> Tensor:
        """``alpha p + (1 - alpha)`` the memory's labels weighted by similarity, once the memory means something."""
        if self.epoch == 0 or self.step <= self.queue_batches:
            return p
        return smoothed(p, z, self.memory.data, self.memory_labels.data, self.T, self.alpha)

    def memorise(self, z: Tensor, labels: Tensor) -> None:
        """Keep embeddings ``[n, D]`` and labels ``[n, C]`` for the memory."""
        self.collect(z=z, labels=labels)

    def take_in(self, z: Tensor, labels: Tensor) -> None:
        self.memory.push(z)
        self.memory_labels.push(labels)
