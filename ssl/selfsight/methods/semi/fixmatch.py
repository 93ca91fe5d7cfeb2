"""FixMatch (Sohn et al., NeurIPS 2020, arXiv 2001.07685).

The class predicted for a weakly augmented image, where the prediction is confident, is the label of its strongly
augmented version. One network, one forward over labelled, weak and strong images; no gradient through the weak ones.

Distribution alignment, which the paper takes over from ReMixMatch as an extension, is off unless ``da_m`` is given.
The averaged model is the one to evaluate. Form of the loss and of alignment: microsoft/Semi-supervised-learning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch, SemiBatch
from selfsight.losses.semi import cross_entropy
from selfsight.methods.semi.alignment import ALIGNED, Alignment
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.validation import SHARE, at_least, takes, whole


@takes(num_classes=whole(2), tau=at_least(0), lambda_u=at_least(0), da_m=SHARE, debias=at_least(0), debias_m=SHARE)
class FixMatch(SemiMethod):
    """Consistency and confidence: what the weak view surely is, the strong view has to be, too.

    Defaults are the paper's for CIFAR-10.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        tau: confidence a pseudo-label needs.
        lambda_u: weight of the unlabelled loss.
        da_m: momentum of distribution alignment to uniform (USB: 0.999); None leaves alignment out, as the paper does.
        debias: lambda of debiased pseudo-labels, for classes of unequal size (DebiasPL: 0.5); 0 leaves them out.
        debias_m: momentum of their running mean.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, 2)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        tau: float = 0.95,
        lambda_u: float = 1.0,
        da_m: float | None = None,
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes, debias=debias, debias_m=debias_m)
        self.tau, self.lambda_u = tau, lambda_u
        self.alignment = None if da_m is None else Alignment(num_classes, da_m)
        if self.alignment is not None:
            self.across_images = "; ".join(filter(None, (ALIGNED, self.across_images)))

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_w,), (logits_s,) = self.student_forward(*self.views(batch))  # [B, C], [M, C], [M, C]
        logits_w, logits_s = self.debiased(logits_w, logits_s)
        with torch.no_grad():
            p = logits_w.softmax(-1)  # [M, C]
            p = p if self.alignment is None else self.alignment(p)
            mask = self.confident(p, batch.unlabelled)  # [M]
        L_s = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, p.argmax(-1), mask)
        terms = {"loss_sup": L_s.detach(), "loss_unsup": L_u.detach()}
        return {"loss": L_s + self.lambda_u * L_u, **terms, **self.monitors(mask, p, batch.unlabelled)}

    def confident(self, p: Tensor, unlabelled: Batch) -> Tensor:
        """``[M]`` in {0, 1}: which pseudo-labels count."""
        return (p.amax(-1) >= self.tau).to(p.dtype)
