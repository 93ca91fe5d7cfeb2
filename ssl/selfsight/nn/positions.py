"""Position embeddings of vision transformers: fixed sines and cosines, and the rules by which others are resized."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from selfsight.errors import UserError, nearest

ResizeRule = Literal["dino", "size", "bilinear"]


def sincos_2d(
    grid: tuple[int, int], dim: int, *, first: Literal["row", "column"], prefix: int = 1, temperature: float = 1e4
) -> Tensor:
    """Sines and cosines of a patch's row and column, ``[1, prefix + h w, dim]`` float64.

    With ``w_i = temperature^(-i / (dim/4))``, the channels of a patch in row y and column x are
    ``[sin(y w), cos(y w), sin(x w), cos(x w)]`` where the row comes ``first`` (MoCo v3), and x before y where the
    column does (MAE). Neither matters for learning, both for loading weights.

    Args:
        grid: h, w. prefix: tokens before the patches (the class token), whose rows are zero.

    Raises:
        UserError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise UserError(f"Sine and cosine positions were asked for with {dim} channels; the number has to divide by 4.")
    frequencies = temperature ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    axes = (row, column) if first == "row" else (column, row)
    angles = [axis.flatten()[:, None] * frequencies for axis in axes]  # [h w, dim / 4] each
    table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(prefix, dim), table])[None]


def resize_positions(
    positions: Tensor, size: tuple[int, int], patch: int, *, rule: ResizeRule, prefix: int = 1
) -> Tensor:
    """A square table of positions for images of another size.

    - ``dino``: bicubic; places are read at the scale (h + 0.1) / g that DINO's code hands over, which moves them a
      little. The table is kept where the image is square and has as many patches.
    - ``size``: bicubic to the new grid (MAE, DeiT). ``bilinear``: likewise, linear (EfficientTrain).

    None of them smooths; timm's own rule (``dynamic_img_size``) does.

    Args:
        positions: ``[1, prefix + g g, D]``. size: height and width of the image. patch: side of a patch; what is left
            over at an edge does not count.

    Returns:
        ``[1, prefix + h w, D]``.

    Raises:
        UserError: an unknown rule, or a table that is not square.
    """
    rules = get_args(ResizeRule)
    if rule not in rules:
        raise UserError(f"The rule to resize positions is '{rule}'; one of {', '.join(rules)}.{nearest(rule, rules)}")
    count = positions.shape[1] - prefix
    g = math.isqrt(count)
    if g * g != count:
        raise UserError(f"A table of {count} positions is not square, and only square ones can be resized.")
    h, w = size[0] // patch, size[1] // patch
    if h * w == count and (size[0] == size[1] if rule == "dino" else h == w):
        return positions
    first, table = positions[:, :prefix], positions[:, prefix:]
    table = table.unflatten(1, (g, g)).permute(0, 3, 1, 2)  # [1, D, g, g]
    if rule == "dino":
        table = F.interpolate(table, scale_factor=((h + 0.1) / g, (w + 0.1) / g), mode="bicubic")
    else:
        table = F.interpolate(table, size=(h, w), mode="bicubic" if rule == "size" else "bilinear")
    return torch.cat([first, table.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
