"""Distillation with unlabelled images, the third step of SimCLRv2.

A fine-tuned network answers for every image, and a student learns the answers: of the same size (self-distillation), or
a smaller one. Teacher and student look at the same view. No label is needed, yet the known ones may take part.

    Chen, Kornblith, Swersky, Norouzi, Hinton: Big Self-Supervised Models are Strong Semi-Supervised Learners.
    NeurIPS 2020, arXiv 2006.10029, section 2. Code: google-research/simclr, colabs/distillation_self_training.ipynb.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from selfsight.contracts import Batch
from selfsight.losses.distillation import distillation, distillation_with_labels
from selfsight.methods.base import Method
from selfsight.validation import SHARE, SWITCH, above, takes, whole


@takes(num_classes=whole(1), temperature=above(0), alpha=SHARE, tau2=SWITCH)
class Distillation(Method):
    """Self-training: a student learns what a fine-tuned teacher answers for all images, labelled or not.

    Args:
        backbone: the student's.
        teacher: images ``[B, 3, H, W]`` to class scores ``[B, K]``; it stays as it is, in eval mode.
        num_classes: K.
        temperature: tau of both softmaxes; 0.1 for self-distillation, 1 for a smaller student (paper).
        alpha: share of the teacher in the loss, the rest is for known labels; 1 uses none (the paper's default).
        tau2: multiply by ``temperature^2`` (notebook; only without labels); False: the paper's formula.

    Raises:
        UserError: values that cannot be meant.
    """

    needs = ("num_classes",)
    n_views = (1, 1)

    def __init__(
        self,
        backbone: nn.Module,
        *,
        teacher: nn.Module,
        num_classes: int,
        temperature: float = 0.1,
        alpha: float = 1.0,
        tau2: bool = True,
    ) -> None:
        super().__init__(backbone)
        self.temperature, self.alpha, self.tau2 = temperature, alpha, tau2
        self.teacher = teacher.requires_grad_(False).eval()
        width: int = backbone.num_features  # type: ignore[assignment]
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the student ``[B, K]``."""
        return self.classifier(self.backbone(x))

    def classifiers(self) -> dict[str, nn.Module]:
        return {"student": nn.Sequential(self.backbone, self.classifier)}

    def training_step(self, batch: Batch, batch_idx: int) -> Mapping[str, Tensor]:
        x = batch.views[0]  # [B, 3, H, W]
        with torch.no_grad():
            answers = self.teacher(x)  # [B, K]
        logits = self(x)  # [B, K]
        if self.alpha < 1 and batch.labels is not None:
            loss = distillation_with_labels(
                logits, answers, batch.labels, temperature=self.temperature, alpha=self.alpha
            )
        else:
            loss = distillation(logits, answers, temperature=self.temperature, tau2=self.tau2)
        agreement = (logits.detach().argmax(1) == answers.argmax(1)).float().mean()
        return {"loss": loss, "agreement": agreement}
