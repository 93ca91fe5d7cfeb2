"""Mixed images and soft targets for fine-tuning: MixUp, CutMix, label smoothing and the losses that take them.

The whole batch shares one mixing weight, and image ``i`` is mixed with image ``B - 1 - i``: what the SparK authors
fine-tune with (``downstream_imagenet/mixup.py``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.nn.precision import float32


def even_batch(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Prepend a copy of the first example to an odd batch, in which the middle image would be its own partner."""
    if len(images) % 2 == 0:
        return images, labels
    return torch.cat([images[:1], images]), torch.cat([labels[:1], labels])


def mixup(images: Tensor, weight: float) -> Tensor:
    """``lambda x_i + (1 - lambda) x_(B-1-i)`` for images ``[B, C, H, W]`` (Zhang et al., 2018)."""
    return weight * images + (1 - weight) * images.flip(0)


def cutmix_box(height: int, width: int, weight: float, centre: tuple[int, int]) -> tuple[int, int, int, int]:
    """``top, bottom, left, right`` of a box of area share ``1 - lambda`` round ``centre``, cut at the border."""
    ratio = (1 - weight) ** 0.5
    half_h, half_w = int(height * ratio) // 2, int(width * ratio) // 2
    y, x = centre
    top, bottom = max(0, y - half_h), min(height, y + half_h)
    left, right = max(0, x - half_w), min(width, x + half_w)
    return top, bottom, left, right


def cutmix(images: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, float]:
    """Put the partner's ``box`` (``top, bottom, left, right``) into every image (Yun et al., 2019).

    Returns:
        the images ``[B, C, H, W]`` and the weight left to their own labels: one less the box's share of the area.
    """
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])


def mixed_targets(
    labels: Tensor, classes: int, weight: float, smoothing: float = 0.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """``[B, K]``: lambda times an image's smoothed label (``1 - s + s/K``, ``s/K``), the rest its partner's."""
    off = smoothing / classes
    one_hot = torch.full((len(labels), classes), off, dtype=dtype, device=labels.device)
    one_hot.scatter_(1, labels[:, None], 1 - smoothing + off)
    return weight * one_hot + (1 - weight) * one_hot.flip(0)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """``mean_i sum_k -t_ik log softmax(z_i)_k`` for ``[B, K]`` logits and target distributions."""
    return -(targets * F.log_softmax(float32(logits), dim=1)).sum(dim=1).mean()


def soft_binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of every class against its soft target, averaged over images and classes."""
    return F.binary_cross_entropy_with_logits(float32(logits), targets.to(float32(logits).dtype))
