"""SimMatch: similarity matching (Zheng et al., CVPR 2022, arXiv 2203.06915).

A strong view has to agree with the weak one twice: in its class distribution and in its similarities to all labelled
images. The two targets calibrate each other: similarities are multiplied by the probability of each labelled image's
class (unfolding), class probabilities are smoothed by the similarities summed over each class (aggregation).

Two published forms. ``teacher=True`` is the authors' ImageNet code (mingkai-zheng/SimMatch): weak views through an
averaged teacher, embeddings overwrite the bank. ``teacher=False`` is the form of the CIFAR numbers
(microsoft/Semi-supervised-learning): weak views through the student without gradient, and a bank with momentum, whose
updated columns are normalised *along the batch* rather than along the embedding, as in that code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import aggregate, cross_entropy, instance_consistency, log_similarity, unfold_log
from selfsight.methods.semi.alignment import ALIGNED, QueueAlignment
from selfsight.methods.semi.base import Heads, SemiMethod, write_rows
from selfsight.validation import SHARE, SWITCH, above, at_least, one_of, takes, whole


@takes(
    num_classes=whole(2), dim=whole(1), tt=above(0), st=above(0), alpha=SHARE, tau=at_least(0), lambda_u=at_least(0),
    lambda_in=at_least(0), da_length=whole(1), da_eps=at_least(0), teacher=SWITCH, bank_m=SHARE,
    decay=one_of("all", "kernels"),
)  # fmt: skip
class SimMatch(SemiMethod):
    """Similarity matching: a strong view agrees with the weak one in its class and in its likeness to labelled images.

    Defaults are the authors' for ImageNet.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        dim: D of the embeddings.
        tt: temperature of the teacher's similarities.
        st: temperature of the student's.
        alpha: share of the own probability in aggregation.
        tau: confidence a pseudo-label needs.
        lambda_u: weight of the class loss.
        lambda_in: weight of the instance loss.
        da_length: steps in alignment's queue; None leaves alignment out.
        da_eps: see `QueueAlignment`.
        teacher: weak views through an averaged teacher (ImageNet), or through the student (CIFAR).
        bank_m: share of the old embedding that stays in the bank (``teacher=False``).
        decay: weight decay on ``all`` parameters, or on ``kernels``, which spares biases and normalisation.

    Attributes:
        bank: ``[N_l, D]`` embedding of each labelled image.
        bank_labels: ``[N_l]`` its class.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, 2)
    bank: Tensor
    bank_labels: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        dim: int = 128,
        tt: float = 0.1,
        st: float = 0.1,
        alpha: float = 0.9,
        tau: float = 0.7,
        lambda_u: float = 10.0,
        lambda_in: float = 5.0,
        da_length: int | None = 256,
        da_eps: float = 0.0,
        teacher: bool = True,
        bank_m: float = 0.7,
        decay: Literal["all", "kernels"] = "all",
    ) -> None:
        heads = Heads(backbone.num_features, num_classes, dim)  # type: ignore[arg-type]
        super().__init__(
            backbone, heads, labels=labels, num_classes=num_classes, teacher_buffers="keep" if teacher else "copy",
            decay=decay,
        )  # fmt: skip
        self.tt, self.st, self.alpha, self.tau, self.bank_m = tt, st, alpha, tau, bank_m
        self.lambda_u, self.lambda_in, self.teaches = lambda_u, lambda_in, teacher
        self.alignment = None if da_length is None else QueueAlignment(num_classes, da_length, da_eps)
        self.across_images = ALIGNED if self.alignment else ""
        self.register_buffer("bank", F.normalize(torch.randn(len(labels), dim)))
        self.register_buffer("bank_labels", labels.clone())

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        x, u_w, u_s = self.views(batch)
        y, index = batch.labelled.labels, batch.labelled.indices
        assert y is not None, "labelled images carry labels"
        if self.teaches:
            (_, z_x), (logits_w, z_w) = self.teacher_forward(x, u_w)
            (logits_x, _), (logits_s, z_s) = self.student_forward(x, u_s)
        else:
            (logits_x, z_x), (logits_w, z_w), (logits_s, z_s) = self.student_forward(x, u_w, u_s)
        p, q = self.targets(logits_w, z_w)  # [M, C], [M, N_l]
        mask = (p.amax(-1) >= self.tau).to(p.dtype)  # [M]
        L_x = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, p, mask)
        L_in = self.instance_loss(z_s, q)
        terms = {"loss_sup": L_x.detach(), "loss_unsup": L_u.detach(), "loss_in": L_in.detach()}
        self.remember(z_x, y, index)
        total = L_x + self.lambda_u * L_u + self.lambda_in * L_in
        return {"loss": total, **terms, **self.monitors(mask, p, batch.unlabelled)}

    @torch.no_grad()
    def targets(self, logits: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Class and instance distributions of weak views, calibrated by each other from the second epoch on."""
        p = logits.softmax(-1)  # [M, C]
        p = p if self.alignment is None else self.alignment(p)
        log_edges = log_similarity(z, self.bank, self.tt)  # [M, N_l]
        q = unfold_log(log_edges, p, self.bank_labels)
        return (p if self.epoch == 0 else aggregate(log_edges.exp(), p, self.bank_labels, self.alpha)), q

    def instance_loss(self, z: Tensor, q: Tensor) -> Tensor:
        """Mean instance consistency of strong views; zero in the first epoch, while the bank holds noise."""
        # multiplied, not left out: DDP waits for a gradient of the head
        return instance_consistency(z, self.bank, q, self.st).mean() * float(self.epoch > 0)

    def remember(self, z: Tensor, y: Tensor, index: Tensor) -> None:
        """Keep embeddings ``[B, D]`` and classes ``[B]`` of labelled images for their rows."""
        self.collect(z=z, y=y, index=index)

    def take_in(self, z: Tensor, y: Tensor, index: Tensor) -> None:
        if not self.teaches:
            z = F.normalize(self.bank_m * self.bank[index] + (1 - self.bank_m) * z, dim=0)
        write_rows(self.bank, index, z)
        write_rows(self.bank_labels, index, y)
