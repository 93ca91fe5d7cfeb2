"""FreeMatch: self-adaptive thresholding (Wang et al., ICLR 2023, arXiv 2205.07246).

The threshold is the running mean of the network's own confidence, so it rises as training goes; each class scales it
by how probable the network finds the class. A fairness term keeps the predictions of strong views spread over the
classes as the running view of the weak ones is.

All running means take in the batch before the mask is made, and pseudo-labels are hard, as in
microsoft/Semi-supervised-learning. Deviation: fairness compares the means over the images of all processes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfsight.contracts import SemiBatch
from selfsight.losses.semi import cross_entropy, fairness
from selfsight.methods.semi.base import Classifier, SemiMethod
from selfsight.nn.distributed import gather, gather_without_grad
from selfsight.validation import SHARE, SWITCH, at_least, takes, whole


@takes(
    num_classes=whole(2),
    lambda_u=at_least(0),
    w_f=at_least(0),
    m=SHARE,
    quantile=SWITCH,
    clip=SHARE,
    debias=at_least(0),
    debias_m=SHARE,
)
class FreeMatch(SemiMethod):
    """Self-adaptive thresholds: a pseudo-label counts where it is surer than the network usually is of that class.

    Defaults are the paper's for CIFAR-10; SVHN takes ``clip=0.95``.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        lambda_u: weight of the unlabelled loss.
        w_f: weight of the fairness term.
        m: momentum of all running means.
        quantile: take the confidence below which 80 % of the batch lies instead of its mean.
        clip: highest threshold; None leaves it free.
        debias: lambda of debiased pseudo-labels, for classes of unequal size (DebiasPL: 0.5); 0 leaves them out.
        debias_m: momentum of their running mean.

    Attributes:
        tau: running confidence.
        p_model: ``[C]`` running mean prediction.
        hist: ``[C]`` running label frequencies.

    Raises:
        UserError: values that cannot be meant.
    """

    n_views = (2, 2)
    across_images = "thresholds follow the batches of the step so far, and fairness compares the means of a batch"
    tau: Tensor
    p_model: Tensor
    hist: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        lambda_u: float = 1.0,
        w_f: float = 0.001,
        m: float = 0.999,
        quantile: bool = False,
        clip: float | None = None,
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        heads = Classifier(backbone.num_features, num_classes)  # type: ignore[arg-type]
        super().__init__(backbone, heads, labels=labels, num_classes=num_classes, debias=debias, debias_m=debias_m)
        self.lambda_u, self.w_f, self.m, self.quantile, self.clip = lambda_u, w_f, m, quantile, clip
        self.register_buffer("tau", torch.tensor(1 / num_classes))
        self.register_buffer("p_model", torch.full((num_classes,), 1 / num_classes))
        self.register_buffer("hist", torch.full((num_classes,), 1 / num_classes))

    def training_step(self, batch: SemiBatch, batch_idx: int) -> Mapping[str, Tensor]:
        y = batch.labelled.labels
        assert y is not None, "labelled images carry labels"
        (logits_x,), (logits_w,), (logits_s,) = self.student_forward(*self.views(batch))  # [B, C], [M, C], [M, C]
        guessing, learning = self.debiased(logits_w, logits_s)
        with torch.no_grad():
            p = guessing.softmax(-1)  # [M, C]
            tau, p_model, hist = self.moved(**self.collect(p=p))
            confidence, label = p.max(-1)  # [M]
            mask = (confidence >= tau * (p_model / p_model.max())[label]).to(p.dtype)
        L_s = cross_entropy(logits_x, y)
        L_u = cross_entropy(learning, label, mask)
        L_f = fairness(gather(logits_s), gather_without_grad(mask), p_model, hist)
        terms = {"loss_sup": L_s, "loss_unsup": L_u, "loss_fair": L_f}
        monitors = {"threshold": tau, **self.monitors(mask, p, batch.unlabelled)}
        total = L_s + self.lambda_u * L_u + self.w_f * L_f
        return {"loss": total, **{name: term.detach() for name, term in terms.items()}, **monitors}

    def moved(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`tau`, `p_model` and `hist` with the weak predictions ``[M, C]`` of all processes taken in."""
        confidence, label = p.max(-1)
        level = confidence.quantile(0.8) if self.quantile else confidence.mean()
        tau = torch.lerp(self.tau, level, 1 - self.m)
        tau = tau if self.clip is None else tau.clamp(0, self.clip)
        p_model = torch.lerp(self.p_model, p.mean(0), 1 - self.m)
        hist = torch.lerp(self.hist, F.one_hot(label, self.num_classes).to(p.dtype).mean(0), 1 - self.m)
        return tau, p_model, hist

    def take_in(self, p: Tensor) -> None:
        for state, value in zip((self.tau, self.p_model, self.hist), self.moved(p), strict=True):
            state.copy_(value)
