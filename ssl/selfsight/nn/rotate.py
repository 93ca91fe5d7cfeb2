"""The four rotations of a batch, for rotation prediction (Gidaris, Singh, Komodakis 2018, arXiv 1803.07728)."""

from __future__ import annotations

import torch
from torch import Tensor

from selfsight.errors import UserError


def rotate4(images: Tensor) -> tuple[Tensor, Tensor]:
    """Each image turned by 0, 90, 180 and 270 degrees counter-clockwise, as an exact permutation of its pixels.

    Crop and flip come before: mirroring a picture turned by 90 degrees gives the mirrored picture turned by 270, so a
    flip afterwards would make two of the labels alike. Normalisation per channel may come before or after.

    Args:
        images: ``[B, C, S, S]``.

    Returns:
        images ``[4B, C, S, S]``, the four copies of an image next to each other, and labels ``[4B]`` int64: 0, 1, 2, 3,
        0, 1, 2, 3, …

    Raises:
        UserError: the images are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        height, width = images.shape[-2:]
        raise UserError(f"Images of {height}x{width} pixels were given to rotate; a square crop has to come first.")
    turned = torch.stack([rotate(images, quarter_turns) for quarter_turns in range(4)], 1)
    labels = torch.arange(4, device=images.device).repeat(len(images))
    return turned.flatten(0, 1), labels


def rotate_quarters(images: Tensor) -> tuple[Tensor, Tensor]:
    """The first quarter of the images ``[B, C, S, S]`` as it is, the others turned by 180, 90 and 270 degrees.

    Labels ``[B]`` are 0, 1, 2, 3 in that order (google-research/remixmatch). Of a batch that does not divide by four
    the first quarters are the larger ones.
    """
    parts = images.tensor_split(4)
    turned = [rotate(part, turns) for part, turns in zip(parts, (0, 2, 1, 3), strict=True)]
    sizes = torch.tensor([len(part) for part in parts], device=images.device)
    return torch.cat(turned), torch.arange(4, device=images.device).repeat_interleave(sizes)


def rotate(images: Tensor, quarter_turns: int) -> Tensor:
    """``[..., H, W]`` turned counter-clockwise by ``quarter_turns`` times 90 degrees."""
    return torch.rot90(images, quarter_turns, (-2, -1))
