"""Reconstruction of hidden cells: the loss, and the picture of it.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023; details
where the paper is silent follow the authors' ``pretrain/spark.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.nn.distributed import all_reduce_sum, world_size
from selfsight.nn.patches import patch_statistics, patchify, unpatchify
from selfsight.nn.precision import float32


def masked_patch_loss(reconstruction: Tensor, images: Tensor, active: Tensor, *, normalise: bool = True) -> Tensor:
    """Mean squared error of the hidden cells, against pixels normalised per cell.

    .. math:: \\ell = \\frac{1}{|H| + 10^{-8}} \\sum_{c \\in H} \\frac{1}{N} \\sum_{i=1}^{N}
              \\left(y_{ci} - \\frac{x_{ci} - m_c}{\\sigma_c}\\right)^2

    with H the hidden cells of the whole batch, N the entries of a cell, and m, sigma from `patch_statistics`; the mean
    over processes is that over the cells of all. 0 where nothing is hidden. A blank prediction scores about 1.

    Args:
        reconstruction: y, ``[B, C, h p, w p]``, not normalised.
        images: x, the unmasked input, same shape.
        active: bool ``[B, 1, h, w]``, True where visible.
        normalise: False compares with the pixels themselves.
    """
    patch = images.shape[-1] // active.shape[-1]
    target = patchify(float32(images), patch)  # [B, L, N]
    if normalise:
        mean, std = patch_statistics(target)
        target = (target - mean) / std
    error = (patchify(float32(reconstruction), patch) - target).square().mean(dim=2)  # [B, L]
    hidden = (~active).flatten(1).to(error.dtype)  # [B, L]
    count = (all_reduce_sum(hidden.sum()) + 1e-8) / world_size()
    return (error * hidden).sum() / count


def fill_hidden(reconstruction: Tensor, images: Tensor, active: Tensor, *, normalised: bool = True) -> Tensor:
    """The picture of a reconstruction: ``images`` in visible cells, the prediction in hidden ones.

    A prediction of normalised pixels is given the true mean and contrast of its cell, which it does not know itself.

    Args:
        reconstruction, images: ``[B, C, h p, w p]``. active: bool ``[B, 1, h, w]``.
    """
    patch = images.shape[-1] // active.shape[-1]
    true, predicted = patchify(float32(images), patch), patchify(float32(reconstruction), patch)
    if normalised:
        mean, std = patch_statistics(true)
        predicted = predicted * std + mean
    filled = torch.where(active.flatten(2).transpose(1, 2), true, predicted)  # [B, L, N]
    return unpatchify(filled, (active.shape[-2], active.shape[-1]), patch)
