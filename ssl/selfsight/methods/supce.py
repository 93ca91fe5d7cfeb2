"""SupCE: supervised training with cross-entropy, the baseline beside SupCon.

A linear layer on the backbone's output names the class of every view; what self-supervised and contrastive training
have to be measured against is this, on the same network, views and optimiser.

    Khosla et al.: Supervised Contrastive Learning. NeurIPS 2020, arXiv:2004.11362, table 2. Code:
    HobbitLong/SupContrast, main_ce.py, which trains on crops and flips alone (``views=supce``); google-research/supcon
    adds label smoothing.

Deviation: an image labelled -1 has no label and does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.errors import UserError
from selfsight.losses.logit_adjustment import adjusted, log_shares
from selfsight.methods.base import Method
from selfsight.nn.distributed import mean_count
from selfsight.nn.matryoshka import PrefixLinear
from selfsight.nn.multicrop import multi_crop
from selfsight.nn.precision import float32
from selfsight.validation import SHARE, at_least, one_of, takes, whole


@takes(num_classes=whole(0), label_smoothing=SHARE, decay=one_of("all", "kernels"), logit_adjustment=at_least(0))
class SupCE(Method):
    """Supervised cross-entropy: a linear layer on the backbone names the class of every view.

    Defaults are SupContrast's; google-research's for ImageNet are those of recipe=imagenet/supce.

    Args:
        backbone: network to be trained.
        num_classes: C.
        label_smoothing: share of the target that is spread evenly over the classes.
        decay: ``all`` parameters (SupContrast) or ``kernels``, which spares biases and normalisation.
        logit_adjustment: tau of `losses.logit_adjustment`, for classes of unequal size; 1 is the paper's, 0 none.
        labels: of the images, -1 for none: the shares of the classes are counted in them.

    Raises:
        UserError: values that cannot be meant, or fewer than two classes.
    """

    needs = ("num_classes", "labels")

    def __init__(
        self,
        backbone: nn.Module,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        decay: Literal["all", "kernels"] = "all",
        logit_adjustment: float = 0.0,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(backbone)
        if num_classes < 2:
            raise UserError(
                f"SupCE tells classes apart and these images have {num_classes}; choose a labelled data set."
            )
        self.classifier = PrefixLinear(cast(int, backbone.num_features), num_classes)
        self.label_smoothing, self.decay, self.logit_adjustment = label_smoothing, decay, logit_adjustment
        shares = None if labels is None else log_shares(labels, num_classes)
        self.register_buffer("log_shares", shares, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        if batch.labels is None:
            raise UserError("SupCE learns labels and these images have none; choose a labelled data set.")
        y = batch.labels.repeat(len(batch.views))  # [V B]
        logits = float32(self.classifier(multi_crop(self.backbone, batch.views)))  # [V B, C]
        labelled = mean_count(y >= 0)
        if self.logit_adjustment:
            assert isinstance(self.log_shares, Tensor), "the labels are known when it is trained"
            logits = adjusted(logits, self.log_shares, self.logit_adjustment)
        loss = F.cross_entropy(logits, y, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing)
        return {"loss": loss / labelled, "train_accuracy": (logits.detach().argmax(1) == y).sum() / labelled}

    def chance_loss(self) -> float:
        """``ln C``: every class is as likely as the others."""
        return math.log(self.classifier.out_features)
