"""PixPro's positive pairs and losses (Xie et al. 2021, section 3; authors' contrast/models/PixPro.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.nn.precision import full_precision


@full_precision
@torch.no_grad()
def pixel_distances(corners_q: Tensor, corners_k: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How far the pixels of two maps lie apart in their common image, in diagonals of the larger pixel.

    ``D_ij = |centre_q(i) - centre_k(j)| / max(d_q, d_k)`` with d the diagonal of a map's pixel. The maximum makes the
    distances of (k, q) the transpose of these. A mirrored view has corners in reverse order and needs no other care.

    Args:
        corners_q, corners_k: ``[B, 4]``, x0, y0, x1, y1 of the views relative to their image (`nn.boxes.corners`).
        size: H, W of both maps; pixels are counted row by row.
    Returns:
        distances ``[B, HW, HW]`` and the larger diagonal ``[B]``.
    """
    (centres_q, d_q), (centres_k, d_k) = _centres(corners_q, size), _centres(corners_k, size)
    diagonal = torch.maximum(d_q, d_k)
    offset = centres_q[:, :, None] - centres_k[:, None]  # [B, HW, HW, 2]
    return offset.square().sum(-1).sqrt() / diagonal[:, None, None], diagonal


def _centres(corners: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Centres ``[B, HW, 2]`` (x, y) of a map's pixels and their diagonal ``[B]``."""
    H, W = size
    x0, y0, x1, y1 = corners[:, :, None].unbind(1)  # [B, 1] each
    width, height = (x1 - x0) / W, (y1 - y0) / H
    x = (torch.arange(W, device=corners.device) + 0.5) * width + x0  # [B, W]
    y = (torch.arange(H, device=corners.device) + 0.5) * height + y0  # [B, H]
    centres = torch.stack([x[:, None].expand(-1, H, -1), y[:, :, None].expand(-1, -1, W)], dim=-1)
    return centres.flatten(1, 2), (width.square() + height.square()).sqrt().squeeze(1)


def positives(corners_q: Tensor, corners_k: Tensor, size: tuple[int, int], *, pos_ratio: float) -> Tensor:
    """``A [B, HW, HW]``, bool: pixels of the two views strictly nearer than ``pos_ratio`` diagonals."""
    return pixel_distances(corners_q, corners_k, size)[0] < pos_ratio


@full_precision
def pixel_consistency(q: Tensor, k: Tensor, A: Tensor, *, skip_empty: bool = False) -> Tensor:
    """Twice the mean cosine of positive pairs, negative; mean within each image, then over the images.

    ``-2/B sum_b [ sum_ij A_ij q_i . k_j / (sum_ij A_ij + 1e-6) ]``, from -2 (all aligned) to 2.

    Images without positive pairs add 0 and count in B, as in the authors' code; ``skip_empty`` leaves them out of B
    (the paper's text). The paper's equation 5 has no factor 2.

    Args:
        q, k: ``[B, C, H, W]``, unit vectors over the channels.
        A: ``[B, HW, HW]``, see `positives`.
    """
    similarity = q.flatten(2).transpose(1, 2) @ k.flatten(2)  # [B, HW, HW]
    pairs = A.to(similarity.dtype)
    per_image = (similarity * pairs).sum((1, 2)) / (pairs.sum((1, 2)) + 1e-6)
    return -2 * _mean_over_images(per_image, A, skip_empty)


@full_precision
def pixel_contrast(q: Tensor, k: Tensor, A: Tensor, *, temperature: float, skip_empty: bool = False) -> Tensor:
    """PixContrast (section 3.1): positives against all pixels of the other view of the same image.

    ``L(i) = - log [ sum_{j: A_ij} exp(q_i . k_j / t) / sum_j exp(q_i . k_j / t) ]``, mean over the pixels i that have a
    positive, then over the images as in `pixel_consistency`. 0 when every pixel is a positive; ``log(n / n_positive)``
    when all similarities are equal.

    Args:
        q, k: ``[B, C, H, W]``, unit vectors over the channels.
        A: ``[B, HW, HW]``, see `positives`.
        temperature: t, 0.3 in the paper.
    """
    logits = q.flatten(2).transpose(1, 2) @ k.flatten(2) / temperature  # [B, HW, HW]
    found = A.any(-1)  # [B, HW]
    # A pixel without positives takes them all: its loss and its gradient are 0, and no logarithm of 0 is ever taken.
    chosen = A | ~found[..., None]
    per_pixel = logits.logsumexp(-1) - logits.masked_fill(~chosen, -torch.inf).logsumexp(-1)  # [B, HW]
    return _mean_over_images(per_pixel.sum(1) / found.sum(1).clamp(min=1), A, skip_empty)


def _mean_over_images(per_image: Tensor, A: Tensor, skip_empty: bool) -> Tensor:
    return per_image.sum() / A.any(2).any(1).sum().clamp(min=1) if skip_empty else per_image.mean()


@full_precision
def instance_consistency(a: Tensor, b: Tensor) -> Tensor:
    """``-2 mean_b a_b . b_b`` of unit rows ``[B, C]``: BYOL's loss without its constant."""
    return -2 * (a * b).sum(1).mean()
