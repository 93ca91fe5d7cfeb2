"""FlexMatch: FixMatch with a threshold for each class (Zhang et al., NeurIPS 2021, arXiv 2110.08263).

A class that is still hard to learn gets a lower threshold. How well a class is learned is counted from the last
confident label of every unlabelled image, relative to the best learned class; while most images have no such label,
relative to their number (warm-up). The map from that to a threshold is convex: ``tau a / (2 - a)``.

The mask uses the counts as they were before the batch (microsoft/Semi-supervised-learning).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.methods.semi.base import write_rows
from selfsight.methods.semi.fixmatch import FixMatch
from selfsight.validation import SHARE, SWITCH, at_least, takes, whole


@takes(
    num_classes=whole(2),
    num_unlabelled=whole(1),
    tau=at_least(0),
    lambda_u=at_least(0),
    da_m=SHARE,
    warmup=SWITCH,
    debias=at_least(0),
    debias_m=SHARE,
)
class FlexMatch(FixMatch):
    """FixMatch with curriculum pseudo-labelling: a class that is hard to learn gets a lower threshold.

    Defaults are the paper's for CIFAR-10.

    Args:
        backbone: network to be trained.
        labels: ``[N_l]`` int64, class of each labelled image.
        num_classes: C.
        num_unlabelled: length of the unlabelled set, which the indices of its images refer to.
        tau: confidence a pseudo-label of the best learned class needs.
        lambda_u: weight of the unlabelled loss.
        da_m: momentum of distribution alignment to uniform; None leaves alignment out.
        warmup: images without a confident label count as a class of their own when the best class is looked for.
        debias: lambda of debiased pseudo-labels, for classes of unequal size (DebiasPL: 0.5); 0 leaves them out.
        debias_m: momentum of their running mean.

    Attributes:
        selected: ``[N_u]`` last confident label of each image, -1 for none yet.
        learned: ``[C]`` a, between 0 and 1.

    Raises:
        UserError: values that cannot be meant.
    """

    needs = (*FixMatch.needs, "num_unlabelled")
    selected: Tensor
    learned: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        labels: Tensor,
        num_classes: int,
        num_unlabelled: int,
        tau: float = 0.95,
        lambda_u: float = 1.0,
        da_m: float | None = None,
        warmup: bool = True,
        debias: float = 0.0,
        debias_m: float = 0.999,
    ) -> None:
        super().__init__(
            backbone,
            labels=labels,
            num_classes=num_classes,
            tau=tau,
            lambda_u=lambda_u,
            da_m=da_m,
            debias=debias,
            debias_m=debias_m,
        )
        self.warmup = warmup
        self.register_buffer("selected", torch.full((num_unlabelled,), -1, dtype=torch.int64))
        self.register_buffer("learned", torch.zeros(num_classes))

    def confident(self, p: Tensor, unlabelled: Batch) -> Tensor:
        confidence, label = p.max(-1)  # [M]
        a = self.learned[label]
        mask = confidence >= self.tau * a / (2 - a)
        self.remember(label, confidence >= self.tau, unlabelled.indices)
        return mask.to(p.dtype)

    def remember(self, label: Tensor, chosen: Tensor, index: Tensor) -> None:
        """Keep the chosen labels of the images ``index``, ``[M]`` each."""
        self.collect(label=label, chosen=chosen, index=index)

    def take_in(self, label: Tensor, chosen: Tensor, index: Tensor) -> None:
        """Write the labels down and count again."""
        write_rows(self.selected, index, label, chosen)
        bins = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=label.device)  # first: none yet
        counts = bins.index_add(0, self.selected + 1, torch.ones_like(self.selected)).to(self.learned.dtype)
        largest = counts.max() if self.warmup else counts[1:].max()
        # as long as one bin holds every image, nothing is known about the classes
        self.learned.copy_(torch.where(counts.max() < len(self.selected), counts[1:] / largest, self.learned))
