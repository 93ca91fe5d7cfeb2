"""Operations on whole batches ``[B, 3, H, W]`` of floats in 0 .. 1, in plain torch.

Every parameter is a tensor with one entry an image. No shape depends on a value, so a chain of these compiles into one
graph and runs on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from selfsight.datamodules.views import kernels
from selfsight.datamodules.views.arrays import constant

#: luma weights: Pillow's (and video standards'), and the rounded ones of TensorFlow and torchvision's tensors
LUMA = {"torchvision": (0.299, 0.587, 0.114), "simclr": (0.2989, 0.587, 0.114)}


def crop_resize(
    images: Tensor,
    top: Tensor,
    left: Tensor,
    height: Tensor,
    width: Tensor,
    size: int,
    *,
    interpolation: str = "bilinear",
    hflip: Tensor | None = None,
    vflip: Tensor | None = None,
    bounded: bool = True,
) -> Tensor:
    """Each image's box resampled to ``size x size``, then flipped.

    Args:
        images: ``[B, C, H, W]`` floats.
        top, left, height, width: ``[B]`` in source pixels.
        interpolation: one of `views.INTERPOLATIONS`; ``bicubic`` is clipped to 0 .. 1, SimCLR's are not.
        hflip, vflip: ``[B]`` bool.
        bounded: see `kernels.resize_matrix`.

    Returns:
        ``[B, C, size, size]``.
    """
    rows = kernels.resize_matrix(top, height, size, images.shape[-2], interpolation, bounded=bounded)
    columns = kernels.resize_matrix(left, width, size, images.shape[-1], interpolation, bounded=bounded)
    out = resample(images, rows, columns, hflip, vflip)
    return out.clamp(0, 1) if interpolation == "bicubic" else out


def resample(
    images: Tensor, rows: Tensor, columns: Tensor, hflip: Tensor | None = None, vflip: Tensor | None = None
) -> Tensor:
    """``A image B^T`` for matrices ``A`` ``[B, h, H]`` and ``B`` ``[B, w, W]``; a flip reverses the matrix's rows."""
    if vflip is not None:
        rows = torch.where(vflip[:, None, None], rows.flip(1), rows)
    if hflip is not None:
        columns = torch.where(hflip[:, None, None], columns.flip(1), columns)
    batch, channels, height, width = images.shape
    rows, columns = rows.to(images.dtype), columns.to(images.dtype)
    wide = torch.bmm(images.reshape(batch, channels * height, width), columns.transpose(1, 2))
    return torch.matmul(rows[:, None], wide.view(batch, channels, height, -1))


def flip(images: Tensor, hflip: Tensor | None, vflip: Tensor | None = None) -> Tensor:
    """The images of which ``hflip`` / ``vflip`` ``[B]`` is true, mirrored left to right / top to bottom."""
    if hflip is not None:
        images = torch.where(hflip[:, None, None, None], images.flip(-1), images)
    if vflip is not None:
        images = torch.where(vflip[:, None, None, None], images.flip(-2), images)
    return images


def luma(images: Tensor, weights: Sequence[float]) -> Tensor:
    """``[B, 1, H, W]``: weighted sum of the three channels."""
    red, green, blue = images.unbind(1)
    return (weights[0] * red + weights[1] * green + weights[2] * blue)[:, None]


def grayscale(images: Tensor, applied: Tensor, colour: str = "torchvision") -> Tensor:
    """Three equal channels where ``applied`` ``[B]``."""
    weights = LUMA["torchvision" if colour == "torchvision" else "simclr"]
    return torch.where(applied[:, None, None, None], luma(images, weights), images)


def adjust(images: Tensor, kind: Tensor, factor: Tensor, colour: str = "torchvision") -> Tensor:
    """One step of the jitter on each image: brightness (``kind`` 0), contrast (1) or saturation (2), clipped to 0 .. 1.

    All three are ``ref + factor (x - ref)``. For torchvision's colours ref is 0, the mean luma, or the luma. For
    SimCLR's it is 0, the mean of the channel, or the largest channel (saturation in HSV keeps the hue and the largest
    channel; its factor is limited where the saturation would pass 1).

    Args:
        images: ``[B, 3, H, W]``.
        kind, factor: ``[B]``.
        colour: one of `views.COLOURS`; ``simclr_v1`` adds the brightness's factor instead.
    """
    kind, factor = kind[:, None, None, None], factor[:, None, None, None].to(images.dtype)
    to_mean, to_grey = (kind == 1).to(images.dtype), (kind == 2).to(images.dtype)
    if colour == "torchvision":
        grey = luma(images, LUMA["torchvision"])
        ref = to_grey * grey + to_mean * grey.mean((-2, -1), keepdim=True)
        return torch.lerp(ref, images, factor).clamp_(0, 1)
    largest = images.amax(1, keepdim=True)
    spread = largest - images.amin(1, keepdim=True)
    ref = to_grey * largest + to_mean * images.mean((-2, -1), keepdim=True)
    limit = largest / spread.clamp(min=1e-9)
    limited = torch.where(kind == 2, torch.minimum(factor, limit), factor)
    if colour == "simclr_v1":
        added = torch.where(kind == 0, factor, torch.zeros_like(factor))
        limited = torch.where(kind == 0, torch.ones_like(limited), limited)
        return (ref + limited * (images - ref) + added).clamp_(0, 1)
    return (ref + limited * (images - ref)).clamp_(0, 1)


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """The hue of HSV turned by ``shift`` ``[B]`` of a full turn; largest and smallest channel stay as they are.

    With the hue ``h`` in sixths of a turn, channel ``n`` of HSV is ``max - (max - min) clip(min(k, 4 - k), 0, 1)`` for
    ``k = (n + h) mod 6`` and n = 5, 3, 1: no branches.
    """
    red, green, blue = images.unbind(1)
    largest, smallest = images.amax(1), images.amin(1)
    spread = largest - smallest
    scale = 1 / spread.clamp(min=1e-9)
    turn = torch.where(
        largest == red,
        (green - blue) * scale,
        torch.where(largest == green, (blue - red) * scale + 2, (red - green) * scale + 4),
    )
    turn = turn + 6 * shift[:, None, None].to(images.dtype)
    base = constant((5.0, 3.0, 1.0), images)[:, None, None]
    k = torch.remainder(turn[:, None] + base, 6)
    weight = torch.minimum(k, 4 - k).clamp_(0, 1)
    return (largest[:, None] - spread[:, None] * weight).clamp_(0, 1)


def colour_jitter(
    images: Tensor, factors: Tensor, order: Tensor, hue_slot: Tensor | int | None, colour: str = "torchvision"
) -> Tensor:
    """Brightness, contrast, saturation and hue, each image in an order of its own, clipped to 0 .. 1 after each.

    Args:
        images: ``[B, 3, H, W]``.
        factors: ``[B, 4]``: three factors and the hue's shift in turns.
        order: ``[B, 3]``: which of the three comes first, second, third.
        hue_slot: ``[B]``: how many of them come before the hue; a number for all images, or None for no hue at all.
    """
    for slot in range(4):
        if isinstance(hue_slot, Tensor):
            images = torch.where((hue_slot == slot)[:, None, None, None], hue(images, factors[:, 3]), images)
        elif hue_slot == slot:
            images = hue(images, factors[:, 3])
        if slot < 3:
            images = adjust(images, order[:, slot], factors.gather(1, order[:, slot : slot + 1])[:, 0], colour)
    return images


def colour_jitter_in_quarters(images: Tensor, factors: Tensor, order: Tensor, colour: str = "torchvision") -> Tensor:
    """`colour_jitter` for a batch whose first quarter has the hue first, whose second quarter has it second, and so on.

    The hue, the dearest of the four, is then computed once an image and not four times. ``B`` is a multiple of 4.
    """
    quarter = len(images) // 4
    for slot in range(4):
        rows = slice(slot * quarter, (slot + 1) * quarter)
        turned = hue(images[rows], factors[rows, 3])
        images = torch.cat([images[: rows.start], turned, images[rows.stop :]])
        if slot < 3:
            images = adjust(images, order[:, slot], factors.gather(1, order[:, slot : slot + 1])[:, 0], colour)
    return images


def blur(images: Tensor, sigma: Tensor, kernel: str, radius: int) -> Tensor:
    """Blur of standard deviation ``sigma`` ``[B]`` in pixels (0: none); kernels as in `kernels.blur_matrix`."""
    sigma = sigma.float() if sigma.dtype in (torch.float16, torch.bfloat16) else sigma
    rows = kernels.blur_matrix(sigma, images.shape[-2], kernel, radius)
    same = images.shape[-1] == images.shape[-2]
    columns = rows if same else kernels.blur_matrix(sigma, images.shape[-1], kernel, radius)
    return resample(images, rows, columns)


def solarize(images: Tensor, applied: Tensor, threshold: float = 128) -> Tensor:
    """Values from ``threshold`` (of 255) on inverted where ``applied`` ``[B]``."""
    inverted = torch.where(images * 255 < threshold - 0.5, images, 1 - images)
    return torch.where(applied[:, None, None, None], inverted, images)


def cutout(images: Tensor, square: Tensor, fill: Sequence[float]) -> Tensor:
    """Rows and columns of ``square`` ``[B, 4]`` (first, last row, first, last column) filled with ``fill`` (of 255)."""
    row = torch.arange(images.shape[-2], device=images.device)[None, :, None]
    column = torch.arange(images.shape[-1], device=images.device)[None, None]
    top, bottom, left, right = square[:, :, None, None].unbind(1)
    inside = (row >= top) & (row <= bottom) & (column >= left) & (column <= right)
    colour = constant(fill, images)[:, None, None] / 255
    return torch.where(inside[:, None], colour, images)


def normalize(images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """``(x - mean) / std`` per channel of floats in 0 .. 1; uint8 is divided by 255 first. None leaves values alone."""
    if images.dtype == torch.uint8 and mean is not None and std is not None:
        # in place on the one copy that is made: on the CPU memory traffic is what normalising costs
        floats = images.float()
        middle, spread = (constant([255 * value for value in each], floats) for each in (mean, std))
        last = floats.movedim(-3, -1)
        if last.is_contiguous():  # by rows: by the three channels of a pixel torch takes several times as long
            width = last.shape[-2]
            last.flatten(-2).sub_(middle.repeat(width)).mul_(spread.reciprocal().repeat(width))
        else:
            floats.sub_(middle[:, None, None]).mul_(spread.reciprocal()[:, None, None])
        return floats
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if mean is None or std is None:
        return images
    middle, spread = (constant(each, images)[:, None, None] for each in (mean, std))
    return (images - middle) / spread
