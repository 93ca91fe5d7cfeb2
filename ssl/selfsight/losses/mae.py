"""MAE's loss (He et al. 2022, section 3; facebookresearch/mae, models_mae.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.nn.patches import patch_statistics, patchify, unpatchify
from selfsight.nn.precision import full_precision


@full_precision
def masked_pixels(prediction: Tensor, images: Tensor, mask: Tensor, *, normalise: bool = True) -> Tensor:
    """Mean squared error of the hidden patches.

    ``L = sum_{l hidden} 1/n sum_i (y_li - (x_li - m_l) / s_l)^2 / number hidden`` over the batch, n the ``p p C``
    numbers of a patch, m and s from `patch_statistics`. A prediction of zeros scores ``(n - 1) / n``; NaN where nothing
    is hidden.

    Args:
        prediction: y, ``[B, L, p p C]``. images: x, ``[B, C, h p, w p]``. mask: ``[B, L]``, 1 where hidden.
        normalise: False takes the pixels themselves, m = 0 and s = 1.
    """
    target = patchify(images, patch_size(prediction, images))
    if normalise:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (prediction - target).square().mean(-1)  # [B, L]
    return (error * mask).sum() / mask.sum()


@full_precision
def filled(prediction: Tensor, images: Tensor, mask: Tensor, *, normalised: bool = True) -> Tensor:
    """The picture of a reconstruction ``[B, C, h p, w p]``: the image where visible, the prediction where hidden.

    A prediction of normalised pixels is given the true mean and contrast of its patch, which it does not know itself.
    Shapes as in `masked_pixels`.
    """
    patch = patch_size(prediction, images)
    true = patchify(images, patch)
    if normalised:
        mean, std = patch_statistics(true)
        prediction = prediction * std + mean
    grid = images.shape[-2] // patch, images.shape[-1] // patch
    return unpatchify(torch.where(mask[..., None] > 0, prediction, true), grid, patch)


def patch_size(prediction: Tensor, images: Tensor) -> int:
    """p, from ``[B, L, p p C]`` and ``[B, C, h p, w p]``."""
    return round((prediction.shape[-1] / images.shape[1]) ** 0.5)
