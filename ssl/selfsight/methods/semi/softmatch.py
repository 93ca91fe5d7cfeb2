"""SoftMatch (Chen et al., ICLR 2023, arXiv 2301.10921).

A threshold trades the number of pseudo-labels against how many of them are right. Here every pseudo-label counts, with
a weight that is 1 above the running mean of the confidence and falls like a Gaussian below it.

The formula is the paper's; no numbers of the authors' code are compared. As in microsoft/Semi-supervised-learning the
running mean and variance take in the batch before they are used, and pseudo-labels are hard.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy, gaussian_weights
from selfsight.methods.semi.alignment import Alignment
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.validation import SHARE, SWITCH, above, at_least, takes, whole


@takes(
    num_classes=whole(2),
    lambda_u=at_least(0),
    n_sigma=above(0),
    m=SHARE,
    align=SWITCH,
    debias=at_least(0),
    debias_m=SHARE,
)
class SoftMatch(SemiMethod):
    """Pseudo-labels weighted by a Gaussian of their confidence.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        lambda_u: weight of the unlabelled loss.
        n_sigma: how many times narrower than the confidences the Gaussian is.
        m: momentum of the running mean and variance.
        align: bring predictions to the uniform distribution before they are weighed (the paper's uniform alignment).
        debias: lambda of debiased pseudo-labels, for classes of unequal size (DebiasPL: 0.5); 0 leaves them out.
        debias_m: momentum of their running mean.

    Attributes:
        mu: running mean of the confidence.
        var: its running variance.
    """

    n_views = (2, 2)
    across_images = "weights follow the confidences of the batches of the step so far"
    mu: Tensor
    var: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        lambda_u: float = 1.0,
        n_sigma: float = 2.0,
        m: float = 0.999,
        align: bool = True,
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes, debias=debias, debias_m=debias_m)
        self.lambda_u, self.n_sigma, self.m = lambda_u, n_sigma, m
        self.alignment = Alignment(num_classes, m) if align else None
        self.register_buffer("mu", torch.tensor(1 / num_classes))
        self.register_buffer("var", torch.tensor(1.0))

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_w,), (logits_s,) = self.student_forward(*self.views(batch))  # [B, C], [M, C], [M, C]
        logits_w, logits_s = self.debiased(logits_w, logits_s)
        with torch.no_grad():
            p = logits_w.softmax(-1)  # [M, C]
            label = p.argmax(-1)
            confidence = (p if self.alignment is None else self.alignment(p)).amax(-1)  # [M]
            mu, var = self.moved(**self.collect(confidence=confidence))
            weight = gaussian_weights(confidence, mu, var, self.n_sigma)  # [M]
        L_s = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, label, weight)
        terms = {"loss_sup": L_s.detach(), "loss_unsup": L_u.detach(), "confidence": mu}
        return {"loss": L_s + self.lambda_u * L_u, **terms, **self.monitors(weight, p, batch.unlabelled)}

    def moved(self, confidence: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` and `var` with the confidences ``[M]`` of a step, of all processes, taken in."""
        variance = confidence.var(correction=min(1, len(confidence) - 1))
        return torch.lerp(confidence.mean(), self.mu, self.m), torch.lerp(variance, self.var, self.m)

    def take_in(self, confidence: Tensor) -> None:
        mu, var = self.moved(confidence)
        self.mu.copy_(mu)
        self.var.copy_(var)
