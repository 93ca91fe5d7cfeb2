"""Where a view lies in its image, from the boxes of a `Batch`."""

from __future__ import annotations

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """``(x0, y0, x1, y1)`` of each view, relative to its image: 0 is the first pixel of an axis and 1 the last.

    The pixels meant are the first and the last inside the crop, so a whole image is (0, 0, 1, 1). A mirrored view runs
    backwards: a horizontal flip swaps x0 and x1, a vertical one y0 and y1. An axis of one pixel counts as two.
    Source: zdaxie/PixPro, contrast/data/transform_coord.py.

    Args:
        boxes: ``[B, 8]`` (see `Batch.boxes`).

    Returns:
        ``[B, 4]`` of the type of ``boxes``, at least float32.
    """
    boxes = boxes.float() if boxes.dtype != torch.float64 else boxes
    top, left, height, width, source_height, source_width, hflip, vflip = boxes.unbind(-1)
    across, down = (source_width - 1).clamp(min=1), (source_height - 1).clamp(min=1)
    x = torch.stack([left / across, (left + width - 1) / across], -1)
    y = torch.stack([top / down, (top + height - 1) / down], -1)
    x = torch.where(hflip[..., None] > 0, x.flip(-1), x)
    y = torch.where(vflip[..., None] > 0, y.flip(-1), y)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
