"""AdaMatch (Berthelot et al., ICLR 2022, arXiv 2106.04732), within one domain.

FixMatch whose threshold is a share of how confident the network is of its labelled images, so that it is low at the
start and rises by itself; pseudo-labels are brought to the running mean of the predictions for labelled images.

Form of the loss, of the threshold and of alignment: microsoft/Semi-supervised-learning; no numbers are compared. The
random interpolation of logits, which is for labelled and unlabelled images of two domains, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy
from selfsight.methods.semi.alignment import ALIGNED, Alignment
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.validation import SHARE, at_least, takes, whole


@takes(num_classes=whole(2), tau=at_least(0), lambda_u=at_least(0), m=SHARE, debias=at_least(0), debias_m=SHARE)
class AdaMatch(SemiMethod):
    """Relative confidence: pseudo-labels above a share of the confidence for labelled images.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        tau: that share.
        lambda_u: weight of the unlabelled loss.
        m: momentum of the alignment's running means.
        debias: lambda of debiased pseudo-labels, for classes of unequal size (DebiasPL: 0.5); 0 leaves them out.
        debias_m: momentum of their running mean.
    """

    n_views = (2, 2)
    across_images = f"the threshold follows the labelled images of a batch, and {ALIGNED}"

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        tau: float = 0.9,
        lambda_u: float = 1.0,
        m: float = 0.999,
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes, debias=debias, debias_m=debias_m)
        self.tau, self.lambda_u = tau, lambda_u
        self.alignment = Alignment(num_classes, m, follow=True)

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_w,), (logits_s,) = self.student_forward(*self.views(batch))  # [B, C], [M, C], [M, C]
        logits_w, logits_s = self.debiased(logits_w, logits_s)
        with torch.no_grad():
            p_x = logits_x.softmax(-1)  # [B, C]
            p = self.alignment(logits_w.softmax(-1), p_x)  # [M, C]
            threshold = self.tau * all_reduce_sum(p_x.amax(-1).mean()) / world_size()
            mask = (p.amax(-1) >= threshold).to(p.dtype)  # [M]
        L_s = cross_entropy(logits_x, y)
        L_u = cross_entropy(logits_s, p.argmax(-1), mask)
        terms = {"loss_sup": L_s.detach(), "loss_unsup": L_u.detach(), "threshold": threshold}
        return {"loss": L_s + self.lambda_u * L_u, **terms, **self.monitors(mask, p, batch.unlabelled)}
