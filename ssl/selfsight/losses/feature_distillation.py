"""What a student is asked where a teacher gives features and no classes.

Fang, Wang, Wang, Zhang, Yang, Liu: SEED: Self-supervised Distillation for Visual Representation. ICLR 2021,
arXiv:2101.04731, section 3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import full_precision


@full_precision
def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean (1 - cos(s, t))`` over images, and places of a map; from 0 (same directions) to 2. No gradient into ``t``.

    Args:
        student, teacher: ``[B, D, ...]``.
    """
    return 1 - F.cosine_similarity(student, teacher.detach(), dim=1).mean()


@full_precision
def similarity_distillation(
    student: Tensor, teacher: Tensor, queue: Tensor, *, student_temperature: float, teacher_temperature: float
) -> Tensor:
    """Cross-entropy between what teacher and student find an image similar to (equations 4 and 5).

    ``L = mean_i -sum_j p_T(j | i) log p_S(j | i)``, where j runs over the teacher's own embedding of image i and over
    the queue, ``p_T(. | i) = softmax(z_T,i . d_j / tau_T)`` and ``p_S(. | i) = softmax(z_S,i . d_j / tau_S)``.

    Args:
        student, teacher: ``[B, D]``; made unit vectors here. Nothing flows into the teacher.
        queue: ``[K, D]`` unit vectors: the teacher's embeddings of earlier images.
    """
    z_s, z_t = F.normalize(student), F.normalize(teacher.detach())

    def logits(z: Tensor, temperature: float) -> Tensor:
        own = (z * z_t).sum(1, keepdim=True)  # [B, 1]
        found = torch.cat([own, z @ queue.to(z).T], dim=1) / temperature  # [B, 1 + K]
        return found - found.detach().amax(1, keepdim=True)

    l_s, l_t = logits(z_s, student_temperature), logits(z_t, teacher_temperature)
    p_t = (l_t - l_t.logsumexp(1, keepdim=True)).exp()
    # p_S - p_T, both rounded alike: where student and teacher agree the gradient is 0, and no rounding over tau
    return (l_s.logsumexp(1) - (p_t * l_s).sum(1)).mean()
