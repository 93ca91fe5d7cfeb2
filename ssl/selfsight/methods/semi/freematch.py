"""FreeMatch: self-adaptive thresholding (Wang et al., ICLR 2023, arXiv 2205.07246).

The threshold is the running mean of the network's own confidence, so it rises as training goes; each class scales it
by how probable the network finds the class. A fairness term keeps the predictions of strong views spread over the
classes as the running view of the weak ones is.

All running means take in the batch before the mask is made, and pseudo-labels are hard, as in
microsoft/Semi-supervised-learning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy, fairness
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.nn.distributed import gather_without_grad


class FreeMatch(SemiMethod):
    """
    Args:
        labels, num_classes: see `SemiMethod`.
        lambda_u: weight of the unlabelled loss. w_f: weight of the fairness term.
        m: momentum of all running means.
        quantile: take the confidence below which 80 % of the batch lies instead of its mean.
        clip: highest threshold; None leaves it free (SVHN: 0.95).

    Attributes:
        tau: running confidence. p_model ``[C]``: running mean prediction. hist ``[C]``: running label frequencies.
    """

    n_views = (2, 2)
    tau: Tensor
    p_model: Tensor
    hist: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        lambda_u: float,
        w_f: float,
        m: float,
        quantile: bool,
        clip: float | None,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes)
        self.lambda_u, self.w_f, self.m, self.quantile, self.clip = lambda_u, w_f, m, quantile, clip
        self.register_buffer("tau", torch.tensor(1 / num_classes))
        self.register_buffer("p_model", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("hist", torch.full((num_classes,), 1 / num_classes))

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_w,), (logits_s,) = self.together(*self.views(batch))  # [B, C], [M, C], [M, C]
        with torch.no_grad():
            p = logits_w.softmax(-1)  # [M, C]
            self.follow(gather_without_grad(p))
            confidence, label = p.max(-1)  # [M]
            mask = (confidence >= self.tau * (self.p_model / self.p_model.max())[label]).to(p.dtype)
        L_s = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, label, mask)
        L_f = fairness(logits_s, mask, self.p_model, self.hist)
        terms = {"loss_sup": L_s, "loss_unsup": L_u, "loss_fair": L_f}
        monitors = {"threshold": self.tau.clone(), **self.monitors(mask, p, batch.unlabelled)}
        total = L_s + self.lambda_u * L_u + self.w_f * L_f
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}, **monitors}

    def follow(self, p: Tensor) -> None:
        """Take the weak predictions ``[M, C]`` of all processes into the running means."""
        confidence, label = p.max(-1)
        level = confidence.quantile(0.8) if self.quantile else confidence.mean()
        self.tau.lerp_(level, 1 - self.m)
        if self.clip is not None:
            self.tau.clamp_(0, self.clip)
        self.p_model.lerp_(p.mean(0), 1 - self.m)
        self.hist.lerp_(F.one_hot(label, self.num_classes).to(p.dtype).mean(0), 1 - self.m)
