"""Distillation on unlabelled images, the third step of SimCLRv2 (Chen et al. 2020, arXiv 2006.10029, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.distributed import mean_count
from selfsight.nn.precision import full_precision


@full_precision
def distillation(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float, tau2: bool) -> Tensor:
    """Cross-entropy between the softened predictions of teacher and student.

    ``L = mean_b -sum_y P_T(y | x_b) log P_S(y | x_b)``, both softmaxes at ``temperature`` (equation 2). Nothing flows
    into the teacher.

    Args:
        student_logits, teacher_logits: ``[B, K]``, of the same augmented images.
        tau2: multiply by ``temperature^2``, as the authors' notebook does and the paper does not.
    """
    targets = (teacher_logits.detach() / temperature).softmax(1)
    loss = F.cross_entropy(student_logits / temperature, targets)
    return loss * temperature**2 if tau2 else loss


@full_precision
def distillation_with_labels(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float, alpha: float
) -> Tensor:
    """``(1 - alpha) CE(labelled images) + alpha distillation(all images)`` (equation 3), both means, without tau^2.

    Args:
        labels: ``[B]``, -1 for images without a label; a batch without any has no first term.
    """
    labelled = mean_count(labels >= 0)
    supervised = F.cross_entropy(student_logits, labels, ignore_index=-1, reduction="sum") / labelled
    soft = distillation(student_logits, teacher_logits, temperature=temperature, tau2=False)
    return (1 - alpha) * supervised + alpha * soft
